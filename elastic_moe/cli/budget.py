"""Tell what a super-network cost to train, and what each network that comes out of it costs.

Counts the operations of a training that was done, from its plan or its manifest: of the
super-network, of refining a sub-network alone, and of training it from scratch instead; what one
network costs when n share the super-network, and from which n on sharing is cheaper.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.arguments import add_download, read_name

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """examples:
  elastic-moe budget                                  how the bundled super-network pays off
  elastic-moe budget --refine L24-k2:200k --networks 16
  elastic-moe budget runs/mini --refine L24 --refine L24-k2:1M --json
  elastic-moe budget path/to/checkpoint --refine k2:5M --scratch-tokens 100M
"""
MOST_COLUMNS = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([kKmMgGbBtT]?)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument(
        "trained",
        nargs="?",
        default="elastic-mini",
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a training run, a bundled model, or a checkpoint folder whose "
        "manifest.json tells of its training (default: %(default)s)",
    )
    add_download(parser)
    parser.add_argument(
        "--refine",
        action="append",
        default=[],
        type=_refinement,
        metavar="NAME[:TOKENS]",
        help="a sub-network to extract, such as L24-k2 or a JSON file of one, and the tokens it is "
        "then trained on alone, such as 500k or 1M (default: none); may be repeated",
    )
    parser.add_argument(
        "--began-with",
        action="append",
        default=[],
        metavar="RUN_OR_CHECKPOINT",
        help="an earlier training that this one went on from, which counts too, as those do that "
        "either of them tells of, each once; may be repeated, the first training first",
    )
    parser.add_argument(
        "--networks",
        type=_networks,
        default=8,
        metavar="N",
        help="share the super-network's cost among 1, 2, 4, ... N networks (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch-tokens",
        type=_positive_tokens,
        metavar="TOKENS",
        help="tokens of a training from scratch (default: those of the super-network)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe.config import resolve_routing  # deferred: loads pydantic
    from elastic_moe.lab.cost.budget import make_budget  # deferred: slow to load
    from elastic_moe.lab.cost.training import read_training

    training = read_training(args.trained, download=args.download)
    budget = make_budget(
        training,
        [
            (resolve_routing(training.whole_shape, read_name(name)), tokens)
            for name, tokens in args.refine
        ],
        earlier=[read_training(name, download=args.download) for name in args.began_with],
        networks=args.networks,
        scratch_tokens=args.scratch_tokens,
    )
    if args.json:
        json.dump(budget, sys.stdout, indent=1)
        print()
    else:
        show(budget)
    return 0


def show(budget: dict[str, Any]) -> None:
    """Print for a person."""
    from rich.console import Console

    # A pipe has no width of its own. No markup: names are not ours.
    width = None if sys.stdout.isatty() else 100
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(width=width, **plain)
    for line in _about_training(budget):
        console.print(line)
    Console(width=width and 160, **plain).print(_table(budget))  # large numbers stay whole
    for line in _about_networks(budget):
        console.print(line)


def _about_training(budget: dict[str, Any]) -> Iterator[str]:
    """Lines about the super-network: its trainings, and an inelastic one beside them."""
    from elastic_moe.lab.view.frontier import format_si

    trained = budget["super_network"]
    parts = [one for one in budget["trainings"] if one["part"] == "super-network"]
    done = [one for one in budget["trainings"] if one["part"] == "refinement"]
    for one in parts:
        yield _about_one(one)
    if len(parts) > 1:
        total = format_si(trained["flops"], "FLOP")
        yield f"together: {format_si(trained['tokens'])} tokens, {total}"
    if trained["uncounted"] is not None:
        before = trained["uncounted"]
        yield (
            f"NOT COUNTED: the training of {before['parent']} ({format_si(before['tokens'])} "
            f"tokens), with which it began. Name it with --began-with."
        )
    if trained["alone"] is not None:
        yield (
            f"Every step trained {trained['alone']} alone: what is called a super-network here is "
            f"this training."
        )
    ratio, extra = trained["of_inelastic"], trained["distillation_flops"]
    change = _percent(abs(1 - ratio))
    than = f"{change} {'less' if ratio < 1 else 'more'} than"
    distilled = f" Distilling took {_percent(extra / trained['flops'])}." if extra else ""
    yield (
        f"That is {'as much as' if change == _percent(0) else than} an inelastic run of the same "
        f"tokens ({format_si(trained['inelastic_flops'], 'FLOP')}).{distilled} "
        f"{_measured(trained['measured'])}"
    )
    if trained["grown_layers"] < trained["layers"]:
        yield (
            f"NOT GROWN: {trained['grown_layers']} of its {trained['layers']} layers have run so "
            f"far. Nothing can be extracted before all have, and what follows counts as if it "
            f"could."
        )
    for one in done:
        what = f"refining {one['alone']} alone"
        if one["extracted"]:
            what = f"training what was extracted, {budget['networks'][0]['name']}"
        yield f"{_about_one(one)}: {what}"
    yield (
        f"One network's cost in % of the super-network's, when n share it; from scratch: "
        f"{format_si(budget['scratch_tokens'])} tokens"
    )


def _about_one(one: dict[str, Any]) -> str:
    from elastic_moe.lab.view.frontier import format_si

    return (
        f"{one['name']} ({one['kind']}): {one['steps']:,} of {one['planned_steps']:,} steps, "
        f"{format_si(one['tokens'])} tokens, {format_si(one['flops'], 'FLOP')}"
    )


def _measured(measured: dict[str, Any] | None) -> str:
    from elastic_moe.lab.view.frontier import format_si

    if measured is None:
        return "Time: not measured."
    seconds, rate = f"Measured: {measured['seconds']:,.1f} s", measured["flops_per_second"]
    if rate is None:
        return f"{seconds} in {measured['timed_steps']:,} of the steps."
    return f"{seconds}, {format_si(rate, 'FLOP')}/s."


def _table(budget: dict[str, Any]) -> Table:
    """A row for every network, and one for their mean."""
    from rich import box
    from rich.table import Table

    from elastic_moe.lab.view.frontier import format_si

    rows = [*budget["networks"]]
    if len(rows) > 1:
        rows.append({"name": "mean", **budget["mean"]})
    counts = [one["networks"] for one in rows[0]["shared"]]
    stride = max(1, -(-(len(counts) - 1) // (MOST_COLUMNS - 1)))
    counts = [*counts[:-1:stride], counts[-1]]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    shared = (f"n={n:,}" for n in counts)
    for heading in ("tokens", "refinement", *shared, "from scratch", "pays from"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        tokens, least = row.get("refinement_tokens"), row["break_even_networks"]
        costs = {one["networks"]: one["of_super_network"] for one in row["shared"]}
        shares = (
            row["refinement_of_super_network"],
            *(costs[n] for n in counts),
            row["scratch_of_super_network"],
        )
        table.add_row(
            f"{row['name']} (done)" if row.get("refinement_done") else row["name"],
            format_si(tokens) if tokens else "",
            *(f"{100 * share:,.1f}" for share in shares),
            "never" if least is None else f"n={least:,}",
        )
    return table


def _about_networks(budget: dict[str, Any]) -> Iterator[str]:
    """Lines that put the shares in their place, and say what was counted."""
    from elastic_moe.lab.view.frontier import format_si

    flops = budget["super_network"]["flops"]
    refined = [row for row in budget["networks"] if row["refinement_tokens"]]
    for row in refined:
        last, took = row["shared"][-1], row["refinement_measured"]
        done = f" It was done. {_measured(took)}" if row["refinement_done"] else ""
        yield (
            f"Refining {row['name']} costs {_percent(row['refinement_of_super_network'])} of an "
            f"existing super-network, and {_percent(row['refinement_of_scratch'])} of training "
            f"{row['name']} from scratch.{done} When {last['networks']:,} networks bear the "
            f"super-network's cost, {row['name']} costs {_percent(last['of_super_network'])} of it "
            f"in all, of which refinement is {_percent(last['refinement_of_total'])}."
        )
    if not refined:
        last = budget["mean"]["shared"][-1]
        yield (
            f"Extracting one costs 0 % of an existing super-network, and "
            f"{_percent(last['of_super_network'])} of it when {last['networks']:,} networks bear "
            f"its cost."
        )
    together = budget["together"]
    if together["networks"] > 1:
        yield (
            f"These {together['networks']} cost {format_si(together['flops'], 'FLOP')} with the "
            f"super-network, {format_si(together['scratch_flops'], 'FLOP')} if each is trained "
            f"from scratch."
        )
    yield (
        "Pays from: so many networks cost less by extracting them from one super-network than each "
        "from scratch."
    )
    ungrown = [
        f"{row['name']} {_percent(row['ungrown_scratch_flops'] / flops)}"
        for row in budget["networks"]
        if row["ungrown_scratch_flops"] > row["scratch_flops"]
    ]
    grows = "From scratch grows as the super-network did"
    if ungrown:
        yield f"{grows}; with all layers from the first step on: {', '.join(ungrown)}."
    yield (
        "Counted: forward and backward, attention over half a sequence, the head; not the "
        "embedding look-up, nor the optimiser; a threshold as if it dropped nothing. Equal tokens "
        "do not make equal quality."
    )


def _percent(ratio: float) -> str:
    return f"{100 * ratio:,.1f} %"


def _networks(text: str) -> int:
    from elastic_moe.lab.cost.budget import MOST_NETWORKS  # deferred: slow to load

    short = len(text) <= 20  # Python reads no integer of more than 4300 digits
    number = int(text) if short and text.isdecimal() else 0
    if not 1 <= number <= MOST_NETWORKS:
        shown = repr(text) if short else f"{len(text):,} characters"
        raise argparse.ArgumentTypeError(
            f"must be an integer in [1, {MOST_NETWORKS:,}], got {shown}"
        )
    return number


def _tokens(text: str) -> int:
    """500 -> 500, 200k -> 200,000, 1.5M -> 1,500,000."""
    match = _TOKENS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"tokens must be a number such as 200000, 200k or 1.5M, got {text!r}"
        )
    tokens = Fraction(match[1]) * _UNITS[match[2].upper()]
    if tokens.denominator != 1:
        raise argparse.ArgumentTypeError(f"tokens must be a whole number, got {text!r}")
    return int(tokens)


def _positive_tokens(text: str) -> int:
    tokens = _tokens(text)
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"tokens must be at least 1, got {text!r}")
    return tokens


def _refinement(text: str) -> tuple[str, int]:
    name, colon, tokens = text.partition(":")
    return name, _tokens(tokens) if colon else 0
