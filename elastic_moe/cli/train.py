"""Train a super-network: every step runs the whole network or a part of it, drawn by chance.

With nothing given it reads the Python library of this machine and needs no download. The folder of
the run gets checkpoint/ (a standard checkpoint, which sweep, extract and serve take), loss.png,
log.csv, and what the run needs to go on: the same command goes on from where the run was stopped,
by Ctrl-C, by a crash or because its time was over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_moe.train.options import add_arguments as add_options
from elastic_moe.train.options import share_the_machine
from elastic_moe.train.runs.memory import keep_freed_memory
from elastic_moe.train.runs.progress import StepReport, clock

EXAMPLES = """examples:
  elastic-moe train --minutes 5                             a small model, in five minutes
  elastic-moe train --corpus notes/ --out notes-model       on texts of yours
  elastic-moe train --corpus src/ --include '*.py' --with-library --out code --tokens 20000000
  elastic-moe train --layers 16 --hidden 192 --experts 32 --top-k 8 --out larger --minutes 60
  elastic-moe train --fixed full --out inelastic            the control: nothing is ever reduced
  elastic-moe train --reduce-depth 0.4 --reduce-threshold 0 --distill 0.5 --out other
  elastic-moe train --from notes-model/checkpoint --fixed L6 --tokens 500000 --out refined
  elastic-moe train --out notes-model --corpus notes/       goes on where it was stopped
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status: 1 if a signal ended the run."""
    began = time.monotonic()
    share_the_machine()
    from elastic_moe.train.command import summary_lines, train  # deferred: loads torch

    keep_freed_memory()

    with _progress() as (report, seconds):
        summary = train(args, report, began=began, report_seconds=seconds)
    summary["loss_curve"] = _draw(Path(summary["out"])) if summary["steps"] else None
    print(json.dumps(summary) if args.json else "\n".join(summary_lines(summary)))
    return 1 if summary["ended_by"] == "signal" else 0


def _draw(out: Path) -> str:
    from elastic_moe.lab.view.loss_curve import write_loss_png  # deferred: loads matplotlib

    write_loss_png(out, out / "loss.png")
    return str(out / "loss.png")


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], float]]:
    """What reports go to, and the seconds between two of a step: a bar on a terminal, else lines.

    On standard error.
    """
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True), 10.0
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

        def report(line: str) -> None:
            if not isinstance(line, StepReport):
                bars.console.print(line, markup=False, highlight=False, emoji=False)
                return
            # Steps of sub-networks differ: a smoothed number can be read.
            loss, rate = shown.get("loss", line.loss), shown.get("rate", line.tokens_per_second)
            shown["loss"] = loss + 0.1 * (line.loss - loss)
            shown["rate"] = rate + 0.1 * (line.tokens_per_second - rate)
            fields: dict[str, Any] = {
                "loss": f"{shown['loss']:.3f}",
                "rate": f"{shown['rate']:,.0f}",
                "left": clock(line.seconds_left),
            }
            if "task" not in shown:
                shown["task"] = bars.add_task("", total=line.total_steps, **fields)
            bars.update(shown["task"], completed=line.step, **fields)

        yield report, 0.25
