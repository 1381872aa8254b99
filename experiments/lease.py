"""Train on a machine that is lent for minutes, has no installer, and sees only this checkout.

    python -m experiments.lease pack --data runs/mini/data --out lease        here
    PYTHONPATH=.:kernels python -m experiments.lease train --packed lease \
        --state /tmp/state --out $OUT --minutes 9 --device cuda --plan runs/mini/plan.json
    PYTHONPATH=.:kernels python -m experiments.lease train --packed lease \
        --state /tmp/state --out $OUT --minutes 9 --device cuda --science --only elastic-1
    python -m experiments.lease take FOLDER --into runs/leased                here

`pack` puts tokens, manifest and tokenizer, compressed, into a folder that git ignores, with
--weights also a checkpoint to go on from. `train` needs torch, numpy, safetensors and tokenizers.
The whole state stays in --state, so that the next call of the same lease goes on to the bit; what
comes back in --out is the log and, in bf16 and files below 16 MiB, the weights. A later lease has
no state: it begins with those weights (--weights), fresh optimisers and a warm-up of its own, and
its checkpoint names them as its parent. Of the science's runs a later lease knows nothing: --only
names those that are still to be trained.
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
from elastic_moe_kernels.arrays import tensor

from elastic_moe.errors import CorpusError, ElasticMoEError, TrainingError
from elastic_moe.files import exchanging_folder, replacing
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.config import ModelConfig
from elastic_moe.train.export import export, keep_parent
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.settings import check_device
from elastic_moe.train.step.plan import DTYPES, TrainingPlan
from elastic_moe.train.step.state import STATE, load_state
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.prepare import MANIFEST, TOKENIZER, TOKENS, open_stream, read_manifest
from experiments.science.runs import SESSIONS, choose, is_finished
from experiments.science.runs import TOKENS as RUN_TOKENS
from experiments.science.train import train as train_science

PACKED_TOKENS, WEIGHTS = "tokens.xz", "weights"
MOST_PACKED_BYTES = 60 << 20  # what travels with the checkout
SHARD_BYTES, MOST_SHARDS = (16 << 20) - (64 << 10), 3  # below 16 MiB with their headers
REWARM_STEPS = 30


def pack(data: Path, out: Path, weights: Path | None = None) -> int:
    """Write a prepared folder of text, and weights to begin with, to `out`; returns the bytes.

    Raises:
        CorpusError: the text is damaged.
        TrainingError: it is more than may travel.
    """
    manifest, _ = read_manifest(data)
    out.mkdir(parents=True, exist_ok=True)
    try:
        tokens = np.load(data / TOKENS)
    except ValueError as error:
        raise CorpusError(f"{data / TOKENS} cannot be read: {error}. Prepare it again.") from None
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
        CorpusError: the tokens cannot be unpacked, or are not those that the manifest names. Or
            another text lies there.
    """
    if (data / MANIFEST).is_file():
        there, sent = (read_manifest(one)[0]["stream_sha256"] for one in (data, packed))
        if there != sent:
            raise CorpusError(
                f"{data} holds text {there[:12]}, but {packed} another one, {sent[:12]}: a run "
                f"goes on with the text of its start. Name another --state, or pack the "
                f"first text again."
            )
        return
    remedy = "It was damaged on the way: pack the text again."
    path = packed / PACKED_TOKENS
    try:
        tokens = np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")
    except (lzma.LZMAError, ValueError) as error:  # ValueError: half a token
        raise CorpusError(f"{path} cannot be unpacked: {error}. {remedy}") from None
    data.mkdir(parents=True, exist_ok=True)
    np.save(data / TOKENS, tokens.astype(np.uint16))
    shutil.copyfile(packed / TOKENIZER, data / TOKENIZER)
    shutil.copyfile(packed / MANIFEST, data / MANIFEST)  # last: with it the folder is whole
    try:
        open_stream(data, 0)  # compares the sums
    except CorpusError as error:
        (data / MANIFEST).unlink()  # or the next call would take it for whole
        raise CorpusError(f"{packed}: {error} {remedy}") from None


def read_plan(path: Path) -> TrainingPlan:
    """The plan of a run, from its plan.json.

    Raises:
        TrainingError: it is none.
    """
    try:
        return TrainingPlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TrainingError) as error:
        raise TrainingError(
            f"{path} is no plan of a training run ({error!r:.200}). Name the plan.json that is in "
            f"the folder of one."
        ) from None


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
    check_device(device)
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
        weights = {name: tensor(checkpoint.read(name, "float32")) for name in checkpoint.shapes}
        trainer.adopt(weights, f"sha256:{checkpoint.files.sha256()}")
        keep_parent(folder, begins_with)
    run_steps(trainer, folder, max_seconds=seconds, report=say, report_seconds=30)
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
    for name in ("log.jsonl", SESSIONS):
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


def train_runs(
    packed: Path,
    state: Path,
    out: Path,
    *,
    seconds: float,
    device: str,
    only: str | None = None,
    dtype: str | None = None,
    tokens: int = RUN_TOKENS,
) -> None:
    """The science's runs, in their order; those that are finished come back.

    Args:
        only: their names, with commas between; None for all. What an earlier lease finished is not
            here, and would be trained again.
        dtype: of matrix products; None is bfloat16 on CUDA, float32 elsewhere. Runs are compared
            with those of one dtype only.
        tokens: of each run.

    Raises:
        OptionError: there is no such device.
        TrainingError: there is no such run, or `state` holds one with another plan or other text.
    """
    runs = choose(only)
    check_device(device)
    if dtype is None:
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    unpack(packed, state / "data")
    train_science(
        runs,
        state / "data",
        state / "science",
        tokens=tokens,
        seconds=seconds,
        device=device,
        dtype=dtype,
    )
    for one in runs:
        folder = state / "science" / one.name
        if is_finished(folder, one.plan(tokens, dtype)):
            bring_back(folder, out / "science" / one.name)


def take(folder: Path, into: Path) -> list[Path]:
    """Copy what a lease brought back, once all of it has been looked at; returns the checkpoints.

    A checkpoint that is there already is replaced as a whole.

    Raises:
        TrainingError: there is none, or its weights are in too many or too large files.
        CheckpointError: one is not whole.
    """
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise TrainingError(f"{folder} has no checkpoint. Name the folder that came back.")
    if folder in found:
        raise TrainingError(
            f"{folder} is a checkpoint itself. Name the folder that came back, which it lies in."
        )
    for checkpoint in found:
        check_shards(checkpoint)
        stored = Checkpoint(checkpoint)
        for name in stored.shapes:
            stored.read(name)
    taken = []
    for checkpoint in found:
        to = into / checkpoint.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        for path in checkpoint.parent.iterdir():  # the logs
            if path.is_file():
                shutil.copyfile(path, to.parent / path.name)
        with exchanging_folder(to) as beside:
            shutil.copytree(checkpoint, beside, dirs_exist_ok=True)
        taken.append(to)
    return taken


def say(line: object) -> None:
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
    training.add_argument("--only", metavar="NAME,...", help="with --science: these runs alone")
    training.add_argument(
        "--dtype", choices=DTYPES, help="with --science (default: bfloat16 on CUDA, else float32)"
    )
    training.add_argument(
        "--tokens", type=int, help=f"with --science: of each run (default: {RUN_TOKENS})"
    )
    taking = commands.add_parser("take", help="take over what came back")
    taking.add_argument("folder", type=Path)
    taking.add_argument("--into", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "train":
        for option in ("only", "dtype", "tokens"):
            if args.plan and getattr(args, option) is not None:
                parser.error(f"--{option} is for --science; with --plan, the plan decides it")
        if not args.minutes >= 0:
            parser.error(f"--minutes must be at least 0, got {args.minutes}")
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
                train_runs(
                    args.packed,
                    args.state,
                    args.out,
                    seconds=seconds,
                    device=args.device,
                    only=args.only,
                    dtype=args.dtype,
                    tokens=RUN_TOKENS if args.tokens is None else args.tokens,
                )
            else:
                plan = read_plan(args.plan)
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
