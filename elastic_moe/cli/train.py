"""Train a super-network: every step runs the whole network or a part of it, drawn by chance.

With nothing given it reads the Python library of this machine and needs no download. The folder of
the run gets checkpoint/ (a standard checkpoint, which sweep, extract and serve take), loss.png,
log.csv, and the state of the run. After Ctrl-C, a crash or the end of its time, run it again to
resume.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_moe.errors import require_torch
from elastic_moe.train.machine import keep_freed_memory
from elastic_moe.train.options import add_arguments as add_options
from elastic_moe.train.options import to_config
from elastic_moe.train.runs.progress import Event, Report, StepDone, clock

EXAMPLES = """examples:
  elastic-moe train --minutes 5                             a small model, in five minutes
  elastic-moe train --corpus notes/ --out notes-model       on texts of yours
  elastic-moe train --corpus src/ --include '*.py' --with-library --out code --tokens 20000000
  elastic-moe train --layers 16 --hidden 192 --experts 32 --top-k 8 --out larger --minutes 60
  elastic-moe train --fixed full --out inelastic            the control: nothing is ever reduced
  elastic-moe train --reduce-depth 0.4 --reduce-threshold 0 --distill 0.5 --out other
  elastic-moe train --from notes-model/checkpoint --fixed L6 --tokens 500000 --out refined
  elastic-moe train --out notes-model --corpus notes/       resumes where it was stopped
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status: 1 if a signal ended the run."""
    started = time.monotonic()
    require_torch("training")
    from elastic_moe.train.session import run as run_training  # deferred: loads torch
    from elastic_moe.train.session import summary_lines

    keep_freed_memory()

    config = to_config(args)
    with _progress() as (report, seconds):
        result = run_training(config, report=report, started=started, report_seconds=seconds)
    curve = _draw(result.out) if result.steps else None
    if args.json:
        print(json.dumps({**result.to_json(), "loss_curve": str(curve) if curve else None}))
    else:
        print("\n".join(summary_lines(result, curve)))
    return 1 if result.ended_by == "signal" else 0


def _draw(out: Path) -> Path:
    from elastic_moe.lab.view.loss_curve import write_loss_png  # deferred: loads matplotlib

    write_loss_png(out, out / "loss.png")
    return out / "loss.png"


@contextmanager
def _progress() -> Iterator[tuple[Report, float]]:
    """(report, seconds between two steps' events): a bar on a terminal, else lines; on stderr."""
    if not sys.stderr.isatty():
        yield lambda event: print(event, file=sys.stderr, flush=True), 10.0
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("step {task.completed:,} of {task.total:,}"),
        BarColumn(),
        TextColumn(
            "loss {task.fields[loss]}  {task.fields[rate]} tokens/s  {task.fields[left]} left"
        ),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        shown: dict[str, Any] = {}

        def report(event: Event) -> None:
            if not isinstance(event, StepDone):
                bars.console.print(str(event), markup=False, highlight=False, emoji=False)
                return
            # Steps of sub-networks differ: a smoothed number can be read.
            loss, rate = shown.get("loss", event.loss), shown.get("rate", event.tokens_per_second)
            shown["loss"] = loss + 0.1 * (event.loss - loss)
            shown["rate"] = rate + 0.1 * (event.tokens_per_second - rate)
            fields: dict[str, Any] = {
                "loss": f"{shown['loss']:.3f}",
                "rate": f"{shown['rate']:,.0f}",
                "left": clock(event.seconds_left),
            }
            if "task" not in shown:
                shown["task"] = bars.add_task("", total=event.total_steps, **fields)
            bars.update(shown["task"], completed=event.step, **fields)

        yield report, 0.25
