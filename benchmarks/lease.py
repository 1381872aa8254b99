"""Train on a machine that is lent for minutes, has no installer, and sees only this checkout.

    python -m benchmarks.lease pack --data runs/mini/data --out lease        here
    PYTHONPATH=.:kernels python -m benchmarks.lease train --packed lease \
        --state /tmp/state --out $OUT --minutes 9 --device cuda --plan runs/mini/plan.json
    PYTHONPATH=.:kernels python -m benchmarks.lease train --packed lease \
        --state /tmp/state --out $OUT --minutes 9 --device cuda --science
    python -m benchmarks.lease take FOLDER --into runs/leased                here

`pack` puts tokens, manifest and tokenizer, compressed, into a folder that git ignores, with
--weights also a checkpoint to go on from. `train` needs torch, numpy, safetensors and tokenizers.
The whole state stays in --state, so that the next call of the same lease goes on to the bit; what
comes back in --out is the log and, in bf16 and files below 16 MiB, the weights. A later lease has
no state: it begins with those weights (--weights), fresh optimisers and a warm-up of its own, and
its checkpoint names them as its parent.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.science.runs import RUNS, SITTINGS, is_finished
from benchmarks.science.train import train as train_science
from elastic_moe.errors import ElasticMoEError, TrainingError
from elastic_moe.files import replacing
from elastic_moe.model.checkpoint import Checkpoint
from elastic_moe.model.config import ModelConfig
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.data import MANIFEST, TOKENIZER, TOKENS, open_stream, read_manifest
from elastic_moe.train.export import STATE, export
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.parents import keep_parent
from elastic_moe.train.plan import TrainingPlan

PACKED_TOKENS, WEIGHTS = "tokens.xz", "weights"
MOST_PACKED_BYTES = 60 << 20  # what travels with the checkout
SHARD_BYTES, MOST_SHARDS = (16 << 20) - (64 << 10), 3  # below 16 MiB with their headers
REWARM_STEPS = 30


def pack(data: Path, out: Path, weights: Path | None = None) -> int:
    """Write a prepared folder of text, and weights to begin with, to `out`; returns the bytes.

    Raises:
        TrainingError: it is more than may travel.
    """
    manifest, _ = read_manifest(data)
    out.mkdir(parents=True, exist_ok=True)
    tokens = np.load(data / TOKENS)
    with replacing(out / PACKED_TOKENS) as beside:
        beside.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), preset=6))
    for name in (MANIFEST, TOKENIZER):
        shutil.copyfile(data / name, out / name)
    if (out / WEIGHTS).exists():
        shutil.rmtree(out / WEIGHTS)
    if weights is not None:
        shutil.copytree(weights, out / WEIGHTS)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST_PACKED_BYTES:
        raise TrainingError(
            f"{out} has {size:,} bytes, and at most {MOST_PACKED_BYTES:,} may travel. Prepare less "
            f"text: {manifest['stream_tokens']:,} tokens are in it."
        )
    return size


def unpack(packed: Path, data: Path) -> None:
    """Lay the text out as training reads it; nothing is done where it lies already.

    Raises:
        CorpusError: the tokens are not those that the manifest names.
    """
    if (data / MANIFEST).is_file():
        return
    data.mkdir(parents=True, exist_ok=True)
    tokens = np.frombuffer(lzma.decompress((packed / PACKED_TOKENS).read_bytes()), dtype="<u2")
    np.save(data / TOKENS, tokens.astype(np.uint16))
    shutil.copyfile(packed / TOKENIZER, data / TOKENIZER)
    shutil.copyfile(packed / MANIFEST, data / MANIFEST)  # last: with it the folder is whole
    open_stream(data, 0)  # compares the sums


def train_mini(
    packed: Path,
    state: Path,
    out: Path,
    plan: TrainingPlan,
    *,
    seconds: float,
    device: str,
    config: ModelConfig = ELASTIC_MINI,
) -> Path:
    """Train elastic-mini for so long, and put its checkpoint and log into `out`."""
    folder = state / "mini"
    unpack(packed, folder / "data")
    begins_with = packed / WEIGHTS
    if begins_with.is_dir():  # a fresh optimiser needs a warm-up, however warm the weights are
        plan = replace(plan, warmup_steps=min(plan.warmup_steps, REWARM_STEPS))
    trainer = Trainer(config, plan, open_stream(folder / "data", plan.seed), device=device)
    if (folder / STATE).is_file():
        trainer.parent = load_state(folder / STATE)[1].get("parent")
    elif begins_with.is_dir():
        checkpoint = Checkpoint(begins_with)
        weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.shapes}
        trainer.adopt(weights, f"sha256:{checkpoint.files.sha256()}")
        keep_parent(folder, begins_with)
    run(trainer, folder, max_seconds=seconds, report=say, report_seconds=30)
    grown = trainer.step and plan.stage(trainer.step - 1).layers == config.num_layers
    if not grown:
        say("no step has run all layers yet: no checkpoint comes back, the state stays here")
        return out / "mini"
    return bring_back(folder, out / "mini")


def bring_back(folder: Path, to: Path) -> Path:
    """Export a run's latest state, copy its logs; few files, each small enough to travel.

    Raises:
        TrainingError: the weights take more files than may travel.
    """
    export(folder, to / "checkpoint", max_shard_bytes=SHARD_BYTES)
    check_shards(to / "checkpoint")
    for name in ("log.jsonl", SITTINGS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    return to


def check_shards(checkpoint: Path) -> None:
    """Raises: TrainingError: there are no weights, or in too many or too large files."""
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))]
    if not 1 <= len(sizes) <= MOST_SHARDS or max(sizes) >= 16 << 20:
        raise TrainingError(
            f"{checkpoint}: weights must be in 1 to {MOST_SHARDS} files below 16 MiB, got {sizes}."
        )


def train_runs(packed: Path, state: Path, out: Path, *, seconds: float, device: str) -> None:
    """The science's runs, in their order; finished ones come back."""
    unpack(packed, state / "data")
    dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    train_science(
        RUNS, state / "data", state / "science", seconds=seconds, device=device, dtype=dtype
    )
    for one in RUNS:
        folder = state / "science" / one.name
        if is_finished(folder, one.plan(dtype=dtype)):
            bring_back(folder, out / "science" / one.name)


def take(folder: Path, into: Path) -> list[Path]:
    """Copy what a lease brought back, once it has been looked at; returns the checkpoints.

    Raises:
        TrainingError: there is none, or one is not whole.
    """
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise TrainingError(f"{folder} has no checkpoint. Name the folder that came back.")
    taken = []
    for checkpoint in found:
        check_shards(checkpoint)
        for path in checkpoint.glob("*.safetensors"):
            load_file(path)
        to = into / checkpoint.parent.relative_to(folder)
        shutil.copytree(checkpoint.parent, to, dirs_exist_ok=True)
        taken.append(to / checkpoint.name)
    return taken


def say(line: str) -> None:
    """Print a line at once, even into a file."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make what travels")
    packing.add_argument("--data", type=Path, required=True, help="a run's data folder")
    packing.add_argument("--weights", type=Path, help="a checkpoint folder to begin with")
    packing.add_argument("--out", type=Path, default=Path("lease"), help="default: %(default)s")
    training = commands.add_parser("train", help="train there")
    training.add_argument("--packed", type=Path, required=True)
    training.add_argument("--state", type=Path, required=True, help="kept between calls")
    training.add_argument("--out", type=Path, required=True, help="what comes back")
    training.add_argument("--minutes", type=float, default=math.inf)
    training.add_argument("--device", default="cuda", help="default: %(default)s")
    what = training.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="plan.json of the bundled model's run")
    what.add_argument("--science", action="store_true", help="the runs of the experiment")
    taking = commands.add_parser("take", help="take over what came back")
    taking.add_argument("folder", type=Path)
    taking.add_argument("--into", type=Path, required=True)
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        if args.command == "pack":
            say(f"{args.out}: {pack(args.data, args.out, args.weights):,} bytes")
        elif args.command == "take":
            for checkpoint in take(args.folder, args.into):
                say(f"took {checkpoint}")
        else:
            seconds = args.minutes * 60
            if args.science:
                train_runs(args.packed, args.state, args.out, seconds=seconds, device=args.device)
            else:
                plan = TrainingPlan.from_json(json.loads(args.plan.read_text(encoding="utf-8")))
                train_mini(
                    args.packed, args.state, args.out, plan, seconds=seconds, device=args.device
                )
            say(f"{time.monotonic() - began:.0f} s in all")
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
