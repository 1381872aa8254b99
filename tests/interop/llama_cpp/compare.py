"""Compare extracted checkpoints with llama.cpp: compare.py --python PYTHON --source LLAMA_CPP.

PYTHON has llama-cpp-python and what its converter imports; LLAMA_CPP is the source tree that came
with it. `make interop-llama-cpp` provides both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from elastic_moe import Engine
from elastic_moe.lab.provenance import describe_provenance, describe_versions
from elastic_moe.lab.sweeps.text import language_reference
from elastic_moe.model.checkpoints.extract import extract
from elastic_moe.model.checkpoints.folder import BUNDLED

HERE = Path(__file__).parent
MINI = BUNDLED / "elastic-mini"
TOKENS = 512
MAX_MEAN_KL = 1e-3
# Random models of the other architectures that llama.cpp has, with elastic-mini's tokenizer.
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
RANDOM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {
            "num_key_value_heads": 8,  # llama.cpp's OLMoE has no grouped queries
            "intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            # The converter derives the size of the shared experts from these: 512 / 2 = 2 x 128.
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "moe_num_shared_experts": 2,
            "moe_num_experts": 16,
            "moe_k": 4,
        },
    ),
}
# Checkpoint, sub-network.
CASES = [
    ("elastic-mini", "full"),
    ("elastic-mini", "L24-k2-w4-p8"),
    ("olmoe", "L3-k2-w4-p8"),
    ("mixtral", "L3-k1-w4-p4"),
    ("ernie4_5_moe", "L3-k2-p8"),
]


def random_checkpoint(name: str, folder: Path) -> Path:
    """A bf16 checkpoint whose logits and routing are far from flat."""
    config_class, model_class, sizes = RANDOM[name]
    config = getattr(transformers, config_class)(**{**SIZES, **sizes})
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("e_score_correction_bias"):
            parameter.data.normal_(std=0.1, generator=generator)
        elif parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            # Routers that are sure of themselves: a choice that flips with the last bit of a bf16
            # product says nothing about the checkpoint.
            std = 0.5 if key.endswith("mlp.gate.weight") else 0.05
            parameter.data.normal_(std=std, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    for companion in ("tokenizer.json", "tokenizer_config.json"):
        (folder / companion).write_bytes((MINI / companion).read_bytes())
    return folder


def compare(model: str | Path, subnet: str, python: str, source: str, work: Path) -> dict[str, Any]:
    """Extract, convert, run on both sides."""
    child = extract(model, subnet, work / "child")
    gguf, ids_path, logits_path = work / "m.gguf", work / "ids.npy", work / "logits.npy"
    run(python, HERE / "convert.py", source, child, gguf)
    with Engine.from_pretrained(child) as engine:
        ids = engine.encode(language_reference().text)[:TOKENS]
        ours = torch.log_softmax(torch.from_numpy(engine.score(ids)).double(), dim=-1)  # (T, V)
        dtype = engine.dtype
    np.save(ids_path, np.array(ids, dtype=np.int32))
    run(python, HERE / "score.py", gguf, ids_path, logits_path)
    theirs = torch.log_softmax(torch.from_numpy(np.load(logits_path)).double(), dim=-1)
    kl = (ours.exp() * (ours - theirs)).sum(dim=-1)
    return {
        "tokens": len(ids),
        "dtype": dtype,
        "mean_kl": float(kl.mean()),
        "median_kl": float(kl.median()),
        "max_kl": float(kl.max()),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


def run(python: str, *arguments: object) -> None:
    done = subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    version = subprocess.run(
        [args.python, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    lines, worst = [], 0.0
    for name, subnet in CASES:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            model = name if name not in RANDOM else random_checkpoint(name, work / name)
            record = {
                "benchmark": "interop_llama_cpp",
                "model": name,
                "subnet": subnet,
                **compare(model, subnet, args.python, args.source, work),
                "bar_mean_kl": MAX_MEAN_KL,
                **describe_provenance(),
                "versions": {**describe_versions(), "llama_cpp_python": version},
            }
        worst = max(worst, record["mean_kl"])
        lines.append(json.dumps(record))
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if worst < MAX_MEAN_KL else 1


if __name__ == "__main__":
    sys.exit(main())
