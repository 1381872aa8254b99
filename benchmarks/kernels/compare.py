"""Compare two kernel benchmark runs: python -m benchmarks.kernels.compare OLD.json NEW.json.

The files are what `make bench ARGS="--benchmark-json FILE"` writes. Exit status 1 if a benchmark
takes longer than the tolerance allows or is gone, 2 if a file cannot be read. With --share the
shares of the limits are compared, which takes a machine's drift between the runs out of what is
bound by memory or arithmetic.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class Change:
    """One benchmark in both runs.

    Attributes:
        ratio: how many times as long the new run takes; below 1 is faster.
    """

    name: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs; the lists are sorted, worst first."""

    slower: list[Change]
    faster: list[Change]
    same: list[Change]
    gone: list[str]
    new: list[str]

    @property
    def passed(self) -> bool:
        return not self.slower and not self.gone


def read_run(path: Path, *, share: bool) -> dict[str, float]:
    """Name of each benchmark -> its median seconds, or those as a multiple of the limit.

    Raises:
        ValueError: the file is no run, or a benchmark has no limit and `share` asks for it.
    """
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ValueError(f"{path} is no run of pytest-benchmark: it has no list 'benchmarks'.")
    run: dict[str, float] = {}
    for entry in data["benchmarks"]:
        name, median = entry["fullname"], entry["stats"]["median"]
        if share:
            limit = entry.get("extra_info", {}).get("limit_seconds")
            if not limit:
                raise ValueError(f"{path}: {name} has no limit_seconds. Compare without --share.")
            median /= limit
        run[name] = median
    return run


def compare(old: Mapping[str, float], new: Mapping[str, float], tolerance: float) -> Comparison:
    """Sort every benchmark by what became of it; within 1 + tolerance either way it is the same."""
    both = sorted(
        (Change(name, new[name] / old[name]) for name in old.keys() & new.keys()),
        key=lambda change: -change.ratio,
    )
    most = 1 + tolerance
    return Comparison(
        slower=[c for c in both if c.ratio > most],
        faster=[c for c in both if c.ratio < 1 / most],
        same=[c for c in both if 1 / most <= c.ratio <= most],
        gone=sorted(old.keys() - new.keys()),
        new=sorted(new.keys() - old.keys()),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="how much longer is no regression yet, as a fraction (default: %(default)s)",
    )
    parser.add_argument("--share", action="store_true", help="compare shares of the limits")
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        parser.error(f"--tolerance must be at least 0, got {args.tolerance}")
    try:
        old, new = (read_run(path, share=args.share) for path in (args.old, args.new))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    result = compare(old, new, args.tolerance)
    for title, changes in (("SLOWER", result.slower), ("faster", result.faster)):
        for change in changes:
            print(f"{title} {change.ratio:7.2f}x  {change.name}")
    for title, names in (("GONE", result.gone), ("new", result.new)):
        for name in names:
            print(f"{title:16} {name}")
    print(
        f"{len(result.slower)} slower by more than {args.tolerance:.0%}, {len(result.faster)} "
        f"faster, {len(result.same)} the same, {len(result.gone)} gone, {len(result.new)} new"
    )
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
