"""Measure quality against cost over a grid of sub-networks of one checkpoint.

Writes sweep.json, frontier.png and report.html. Without values for an axis: depth x top-k at
quarters of the model's own values, and every other axis alone. With values: every combination of
those given, the other axes full. The same command continues an interrupted sweep, and prints the
result of a finished one. Results of another sweep are never replaced without --overwrite.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.arguments import (
    add_axis,
    add_model,
    add_ranking,
    load_engine,
    positive_integer,
)
from elastic_moe.routing.axes import TRAINED

if TYPE_CHECKING:
    from elastic_moe.lab.schema import SweepPoint, SweepResult
    from elastic_moe.lab.sweeps.sweep import Progress

EXAMPLES = """examples:
  elastic-moe sweep                                     the default grid on the bundled model
  elastic-moe sweep --overwrite                         the same again, measured anew
  elastic-moe sweep --quick --out quick                 a first look, in about a minute
  elastic-moe sweep --depth 12,24,36,48 --top-k 1,2,4 --out these   these combinations
  elastic-moe sweep --text notes.txt --out notes        on a text of your own
  elastic-moe sweep path/to/checkpoint --sparsity 0,0.5,0.65 --json --out sparse
  elastic-moe sweep path/to/checkpoint --expert-width 1,2,4 --rank-channels notes.txt --out w
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model(parser)
    add_ranking(parser)
    for axis in TRAINED:
        real = axis.kind == "real"
        number = _list_of(float if real else int)
        values = "T,T" if real else "N,N"
        add_axis(parser, axis, type=number, metavar=values, help=f"values: {axis.unit}")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to score (default: the language reference of this Python)",
    )
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help="score at most this many tokens (default: 12032, with --quick 1024)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sweep-out"),
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="measure again, and replace the result in DIR; it becomes sweep.previous.json",
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and tokens")
    parser.add_argument("--json", action="store_true", help="print sweep.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe.lab.load import busy_warning
    from elastic_moe.lab.sweeps.grid import check_values  # deferred: slow to load
    from elastic_moe.lab.sweeps.results import prepare_folder
    from elastic_moe.lab.sweeps.sweep import sweep
    from elastic_moe.model.checkpoints.checkpoint import load_config
    from elastic_moe.model.checkpoints.folder import find_checkpoint

    axes = {axis.name: getattr(args, axis.name) for axis in TRAINED}
    given = {name: values for name, values in axes.items() if values is not None}
    if given:  # before the weights, which may take minutes to load
        folder = find_checkpoint(args.model, download=args.download)
        check_values(load_config(folder).shape, given)
    prepare_folder(args.out)
    engine = load_engine(args, rank=False)
    with _progress() as progress:
        result = sweep(
            engine,
            **axes,
            text=args.text,
            tokens=args.tokens,
            out=args.out,
            quick=args.quick,
            overwrite=args.overwrite,
            rank_channels=args.rank_channels,
            progress=progress,
            notify=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if args.json:
        if warning := busy_warning(result):
            print(warning, file=sys.stderr)
        json.dump(result, sys.stdout, ensure_ascii=False)
        print()
    else:
        show(result, args.out)
    return 0


def show(result: SweepResult, out: Path) -> None:
    """Print the frontier: the sub-networks that no other beats in both cost and quality."""
    from rich import box

    from elastic_moe.cli.tables import Column, make_console, print_table
    from elastic_moe.lab.load import busy_warning
    from elastic_moe.lab.view.frontier import decode_speed, format_error, format_range, format_si

    full = next(point for point in result["points"] if point["name"] == "full")
    points = [point for point in result["points"] if point["pareto"] or point is full]
    points.sort(key=lambda point: -point["flops_per_token"])
    corpus = result["corpus"]
    columns: list[tuple[str, int, Callable[[SweepPoint], str]]] = [
        ("sub-network", 9, lambda p: p["name"] + ("" if p["trained"] else " *")),
        ("params", 1, lambda p: format_si(p["active_params"])),
        ("FLOP", 2, lambda p: format_si(p["flops_per_token"])),
        ("of full", 6, lambda p: f"{p['flops_per_token'] / full['flops_per_token']:.0%}"),
        ("bits/byte", 8, lambda p: f"{p['bits_per_byte']:.3f}"),
        ("+nats", 5, lambda p: f"{p['delta_nats']:+.3f}"),
        ("± SE", 5, lambda p: format_error(p["standard_error"])),
        ("agrees", 3, lambda p: f"{p['top1_agreement']:.1%}"),
        ("tok/s", 7, lambda p: f"{speed:.1f}" if (speed := decode_speed(p)) else "-"),
        ("min-max", 4, lambda p: format_range(p, "decode") or "-"),
    ]
    if not any(format_range(point, "decode") for point in points):
        columns.pop()
    console = make_console()
    print_table(
        console,
        [Column(heading, [cell(p) for p in points], keep) for heading, keep, cell in columns],
        title=f"Frontier of {result['model']['name']} on {corpus['name']} "
        f"({corpus['scored_tokens']:,} tokens)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    console.print("params, FLOP: used per token. +nats: loss added, per token. tok/s: decoding.")
    if any(not point["trained"] for point in points):
        console.print("* a value that the checkpoint was not trained for")
    for skipped in result["skipped"]:
        console.print(f"skipped {skipped['name']}: {skipped['reason']}")
    if warning := busy_warning(result):
        console.print(warning)
    console.print(
        f"{len(result['points'])} sub-networks in {result['seconds']:.0f} s: "
        f"{out / 'report.html'}, {out / 'frontier.png'}, {out / 'sweep.json'}",
        soft_wrap=True,  # paths stay whole
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line at each tenth of a stage. On standard error."""
    if not sys.stderr.isatty():
        shown: set[tuple[str, int]] = set()

        def line(stage: str, done: int, total: int) -> None:
            tenth = done * 10 // total
            if (stage, tenth) not in shown:
                shown.add((stage, tenth))
                print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield update


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of numbers separated by commas, such as 1,2,4"
            ) from None

    return parse
