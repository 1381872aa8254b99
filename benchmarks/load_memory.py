"""Peak memory of loading: load_memory.py [--backend cpu] [--shards 1] [--fused].

Writes a synthetic OLMoE checkpoint in bf16, loads it in a process of its own, and compares that
process's peak resident memory with the size of the checkpoint. The bar is 1.15 times the size,
everything included: interpreter, torch, and pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elastic_moe_kernels.arrays import array
from numpy.typing import NDArray

from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.model.checkpoints.saving import Item, write_config_json, write_tensors
from elastic_moe.model.families import FAMILIES, parameter_shapes, read_config
from elastic_moe.model.pack import load_packed
from elastic_moe.model.reference.loading import load_model

BAR = 1.15


def write_checkpoint(folder: Path, gigabytes: float, shards: int, fused: bool) -> int:
    """Layers are added until the size is reached; returns the bytes of weights."""
    config: dict[str, Any] = {
        "model_type": "olmoe",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    config["num_hidden_layers"] = round(gigabytes * 1e9 / 211e6)
    parsed = read_config(config, "synthetic")
    noise = array(torch.randn(1 << 22).mul_(0.02).bfloat16())
    items: list[Item] = []
    seen = set()
    for name, shape in parameter_shapes(parsed):
        ways = list(FAMILIES["olmoe"].sources(parsed, name, shape))
        for source in ways[-1] if fused and ".experts." in name else ways[0]:
            if source.tensor not in seen:
                seen.add(source.tensor)
                items.append(Item(source.tensor, source.shape, "bfloat16", fill(noise, source)))
    total = sum(item.nbytes for item in items)
    write_tensors(folder, items, total // shards + 1)
    write_config_json(folder, config)
    return total


def fill(noise: NDArray[Any], source: Any) -> Any:
    def values() -> NDArray[Any]:
        return np.resize(noise, source.shape)

    return values


def load(folder: Path, backend: str) -> int:
    """Load in this process; print what its memory peaked at."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = load_packed(folder) if backend == "cpu" else load_model(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del kept
    print(json.dumps({"before_bytes": before, "peak_bytes": peak}))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="the layout of one tensor per layer")
    parser.add_argument("--backend", choices=("cpu", "reference"), default="cpu")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        return load(args.load, args.backend)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder, args.gigabytes, args.shards, args.fused)
        done = subprocess.run(
            [sys.executable, __file__, "--load", folder, "--backend", args.backend],
            capture_output=True,
            text=True,
            check=True,
        )
    measured = json.loads(done.stdout)
    ratio = measured["peak_bytes"] / size
    print(
        json.dumps(
            {
                "benchmark": "load_memory",
                "backend": args.backend,
                "layout": "fused" if args.fused else "per expert",
                "shards": args.shards,
                "checkpoint_bytes": size,
                **measured,
                "peak_over_size": round(ratio, 4),
                "bar": BAR,
                **describe_provenance(),
            }
        )
    )
    return 0 if ratio < BAR else 1


if __name__ == "__main__":
    sys.exit(main())
