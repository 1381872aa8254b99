"""Train the networks of the experiment, one after the other.

    python -m experiments.science.train --data DIR --out runs/science --minutes 60
    python -m experiments.science.train --out runs/science --status

DIR holds prepared text: tokens and manifest, as `python -m elastic_moe.train` leaves them in
RUN/data. Stopped or killed at any moment, the same command resumes. A finished run leaves a
checkpoint folder, which `python -m experiments.science.evaluate` measures. Runs from a bare
checkout with torch, numpy, safetensors and tokenizers: PYTHONPATH=.:kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from elastic_moe.errors import ElasticMoEError, TrainingError
from elastic_moe.train.export import export
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event, NextCommand, Report
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.prepare import open_stream
from experiments.science.runs import (
    CHECKPOINT,
    CONFIG,
    RUNS,
    SESSIONS,
    STATE,
    TOKENS,
    Run,
    bring_data,
    check_text,
    choose,
    is_finished,
    progress_of,
    saved_step,
)


def train(
    runs: Sequence[Run],
    data: Path,
    out: Path,
    *,
    tokens: int = TOKENS,
    seconds: float = math.inf,
    device: str = "cpu",
    dtype: str = "float32",
) -> bool:
    """Bring the runs to their end, in order, until the time is over; True if all are finished.

    Raises:
        TrainingError: a folder holds a run with another plan or other text.
    """
    began = time.monotonic()
    for run in runs:
        folder, plan = out / run.name, run.plan(tokens, dtype)
        check_text(data, folder)
        if is_finished(folder, plan):
            say(f"{run.name}: finished before")
            continue
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            return False
        bring_data(data, folder)
        trainer = Trainer(CONFIG, plan, open_stream(data, run.seed), device=device)
        note_session(folder, device)
        say(f"{run.name}: step {saved_step(folder / STATE)} of {plan.total_steps}")
        run_steps(trainer, folder, max_seconds=left, report=reporter(run.name))
        if trainer.step < plan.total_steps:
            return False
        export(folder, folder / CHECKPOINT)
        say(f"{run.name}: finished")
    return True


def reporter(name: str) -> Report:
    """Prints the loop's events, but for the command that would come next."""

    def report(event: Event) -> None:
        if not isinstance(event, NextCommand):
            say(f"{name}: {event}")

    return report


def note_session(folder: Path, device: str) -> None:
    """Append the machine and the first step of this start to the run's folder."""
    on_cuda = torch.device(device).type == "cuda"
    line = {
        "from_step": saved_step(folder / STATE),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    with (folder / SESSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def status(out: Path) -> str:
    """A table of all runs."""
    rows = [f"{'run':12} {'state':9} {'steps':>12} {'loss':>7} {'minutes':>8}"]
    for run in RUNS:
        p = progress_of(out / run.name)
        steps = "" if p.total is None else f"{p.steps} / {p.total}"
        loss = "" if p.loss is None else f"{p.loss:.3f}"
        rows.append(f"{run.name:12} {p.state:9} {steps:>12} {loss:>7} {p.seconds / 60:8.1f}")
    return "\n".join(rows)


def say(line: str) -> None:
    """Print a line at once, even into a file."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of prepared text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--only", metavar="NAME,...", help="these runs alone, such as elastic-0")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--status", action="store_true", help="print how far all are, and end")
    args = parser.parse_args(argv)
    if args.status:
        say(status(args.out))
        return 0
    if args.data is None:
        parser.error("--data is needed, unless --status is given")
    if not args.minutes >= 0:
        parser.error(f"--minutes must be at least 0, got {args.minutes}")
    try:
        if not args.data.is_dir():
            raise TrainingError(f"--data: {args.data} is not a folder. Prepare the text first.")
        done = train(
            choose(args.only),
            args.data,
            args.out,
            tokens=args.tokens,
            seconds=args.minutes * 60,
            device=args.device,
            dtype=args.dtype,
        )
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    say(status(args.out))
    if not done:
        say("next: run the same command again to resume")
    return 0


if __name__ == "__main__":
    sys.exit(main())
