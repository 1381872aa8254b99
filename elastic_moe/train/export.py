"""From a training run to a checkpoint folder: `python -m elastic_moe.train.export RUN FOLDER`.

Writes the weights in bf16, config.json with the `elastic_moe` block, the tokenizer and its chat
template, and `manifest.json`: every file that was trained on, the plan, and the draws per axis.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elastic_moe.files import write_text
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import write_config
from elastic_moe.model.saving import save_checkpoint
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.ledger import replay
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.plan import TrainingPlan
from elastic_moe.train.tokens import BOS, END, IM_END, PAD, SPECIAL_TOKENS, special_id

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def export(run: Path, folder: Path, config: ModelConfig = ELASTIC_MINI) -> None:
    """Write the checkpoint folder of the run's latest state."""
    tensors, progress = load_state(run / "state.safetensors")
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    corpus = json.loads((run / "data" / "manifest.json").read_text(encoding="utf-8"))
    plan = TrainingPlan.from_json(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    ledger = replay(plan, config.shape, progress["step"])
    manifest = {
        "corpus": corpus,
        "training": {
            "plan": plan.to_json(),
            "steps": ledger.steps,
            "full_steps": ledger.full_steps,
            "tokens": ledger.tokens,
            "flops": ledger.flops,
            "draws": ledger.draws_to_json(),
        },
    }
    text = json.dumps(manifest, indent=1) + "\n"
    files = json.dumps(corpus["files"], sort_keys=True)
    elastic = ElasticBlock(
        width_granules=config.shape.width_granules,
        trained=ledger.trained_to_json(),
        tokens=ledger.tokens,
        corpus_sha256=hashlib.sha256(files.encode()).hexdigest(),
    )
    tokenizer = Tokenizer.from_file(str(run / "data" / "tokenizer.json"))
    bos, end, im_end, pad = (special_id(tokenizer, token) for token in (BOS, END, IM_END, PAD))
    data = write_config(
        replace(config, elastic=elastic), bos_id=bos, eos_ids=[end, im_end], pad_id=pad
    )
    save_checkpoint(folder, weights, data)
    write_text(folder / "manifest.json", text)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    write_text(folder / "tokenizer_config.json", _dump(tokenizer_config()))
    generation = {"bos_token_id": bos, "eos_token_id": [end, im_end], "pad_token_id": pad}
    write_text(folder / "generation_config.json", _dump(generation))


def tokenizer_config() -> dict[str, Any]:
    """What transformers needs beside tokenizer.json, the chat template included."""
    extra = [token for token in SPECIAL_TOKENS if token not in (BOS, END, PAD)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("folder", type=Path, help="checkpoint folder to write")
    args = parser.parse_args()
    export(args.run, args.folder)


if __name__ == "__main__":
    main()
