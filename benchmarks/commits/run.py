"""Is a commit as fast as another? python -m benchmarks.commits.run OLD NEW, two checkouts.

Each checkout has its own .venv. Slices of about a second alternate between the two; each side's
lower quartile of time is compared, as noise only ever adds. OLD runs against itself first: what
that shows is what the machine cannot tell apart.

Without --model the engine and the server of elastic-mini are timed; with it, steps of that model
at the contexts of --contexts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commits.checkout_worker import CheckoutWorker, commit_of, lower_quartile
from benchmarks.result_file import replace_lines
from elastic_moe.lab.provenance import describe_provenance

WORKER = Path(__file__).with_name("worker.py")
CONTEXT_WORKER = Path(__file__).with_name("context_worker.py")
# Kind, sequences, position.
CONTEXTS = (
    "decode 1 64",
    "decode 1 2048",
    "decode 1 8192",
    "decode 16 64",
    "decode 16 2048",
    "prefill 1 0",
    "prefill 1 7680",
)
SLICES = ("decode", "decode16", "prefill", "outside", "outside_mixed", "stream", "stream16")
LEAST, LEAST_MEAN = 0.95, 0.98


def compare(
    old: Path,
    new: Path,
    rounds: int,
    script: Sequence[str | Path],
    slices: Sequence[str],
    levels: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Ratios of old to new by slice: above 1, new is faster.

    Args:
        script: a worker and its arguments.
        slices: what it is asked for.
        levels: instruction-set levels of old and new; "" for the best one.
    """
    environment = {**os.environ, "GOMP_SPINCOUNT": "3000"}
    sides = [
        CheckoutWorker(checkout, script, {**environment, "ELASTIC_MOE_ISA": level})
        for checkout, level in zip((old, new), levels, strict=True)
    ]
    with sides[0] as a, sides[1] as b:
        seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in slices}
        for number in range(rounds + 2):
            for name in slices:
                pair = ((0, a), (1, b)) if number % 2 else ((1, b), (0, a))
                for index, side in pair:
                    taken = float(side.ask(name))
                    if number >= 2:  # the first ones warm up
                        seconds[name][index].append(taken)
        cases = {
            name: {
                "old_seconds": lower_quartile(first),
                "new_seconds": lower_quartile(second),
                "ratio": lower_quartile(first) / lower_quartile(second),
            }
            for name, (first, second) in seconds.items()
        }
        return {"old": commit_of(old), "new": commit_of(new), "slices": rounds, "cases": cases}


def geometric_mean(found: dict[str, Any]) -> float:
    """Of the ratios."""
    ratios = [case["ratio"] for case in found["cases"].values()]
    return math.exp(statistics.fmean(map(math.log, ratios)))


def show(found: dict[str, Any]) -> None:
    print(f"{found['old']} against {found['new']}, {found['slices']} slices each")
    for name, case in found["cases"].items():
        print(
            f"  {name:16} {case['old_seconds'] * 1e6:9.1f} us  {case['new_seconds'] * 1e6:9.1f} us"
            f"  ratio {case['ratio']:.3f}, of the time {1 / case['ratio']:.3f}"
        )
    print(f"  geometric mean {geometric_mean(found):.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--slices", type=int, default=100, help="of each side; default: 100")
    parser.add_argument("--out", type=Path, help="JSON lines to write the result to")
    parser.add_argument("--model", help="time steps of this model: a name, or a folder")
    parser.add_argument(
        "--contexts",
        default=",".join(CONTEXTS),
        help="of --model: kind (decode or prefill), sequences, position; default: %(default)s",
    )
    parser.add_argument(
        "--levels",
        type=lambda text: tuple(text.split(",")),
        default=("", ""),
        help="instruction-set levels of OLD and NEW, such as avx2,avx512f; default: the best one",
    )
    parser.add_argument("--only-new", action="store_true", help="skip OLD against itself")
    args = parser.parse_args()
    script: list[str | Path] = [WORKER]
    slices: Sequence[str] = SLICES
    case = "commits"
    if args.model is not None:
        script, slices = [CONTEXT_WORKER, args.model], args.contexts.split(",")
        case = f"contexts, {Path(args.model).name}"
    if any(args.levels):
        case += f", {' and '.join(args.levels)}"
    same = {} if args.only_new else compare(args.old, args.old, args.slices, script, slices)
    if same:
        show(same)
    found = compare(args.old, args.new, args.slices, script, slices, args.levels)
    show(found)
    record = {
        "case": case,
        **describe_provenance(),
        "commit": found["new"],
        **found,
        "geometric_mean": geometric_mean(found),
        "same_commit": same.get("cases"),
    }
    if args.out is not None:
        replace_lines(args.out, [record], "case")
    print(json.dumps(record))
    slow = [name for name, case in found["cases"].items() if case["ratio"] < LEAST]
    return int(bool(slow) or geometric_mean(found) < LEAST_MEAN)


if __name__ == "__main__":
    sys.exit(main())
