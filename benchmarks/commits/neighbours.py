"""Decoding beside busy neighbours: python -m benchmarks.commits.neighbours OLD NEW MODEL.

OLD and NEW are checkouts with a .venv each. OLD runs as it is, with GOMP_SPINCOUNT=3000, and on one
thread; NEW with its own number of threads, on one and on eight. They take turns of half a second,
while so many busy loops run, each in a session of its own. Compared are lower quartiles of the
seconds per token, and the 99th percentile of all native steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.commits.checkout_worker import CheckoutWorker, lower_quartile
from benchmarks.result_file import replace_lines
from elastic_moe.lab.provenance import describe_provenance

WORKER = Path(__file__).with_name("neighbour_worker.py")
LOOP = "while True: pass"
LEAST, LEAST_OF_IDLE, LEAST_EIGHT, MOST_P99 = 0.95, 0.30, 0.90, 1.5


class Contestant(CheckoutWorker):
    """Decodes for one slice at a time, in one checkout."""

    def __init__(self, checkout: Path, model: str, spin_count: str | None, threads: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment["PYTHONPATH"] = str(checkout)
        if spin_count:
            environment["GOMP_SPINCOUNT"] = spin_count
        super().__init__(checkout, [WORKER, model, str(threads)], environment)
        self.seconds: list[float] = []
        self.steps: list[float] = []

    def run(self, *, count: bool) -> None:
        seconds, steps = self.ask("")
        if count:
            self.seconds.append(seconds)
            self.steps += steps

    def summary(self) -> dict[str, float]:
        """Lower quartile of seconds per token, 99th percentile of a step; forgets the slices."""
        found = {
            "seconds_per_token": lower_quartile(self.seconds),
            "step_p99_seconds": statistics.quantiles(self.steps, n=100)[98],
        }
        self.seconds, self.steps = [], []
        return found


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that never sleep, each in a session of its own."""
    loops = [
        subprocess.Popen([sys.executable, "-c", LOOP], start_new_session=True) for _ in range(count)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(old: Path, new: Path, model: str, loops: list[int], slices: int) -> dict[str, Any]:
    """Summaries by number of loops and contestant."""
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(*arguments))
            for name, arguments in {
                "old": (old, model, None, 0),
                "old again": (old, model, None, 0),
                "old, spin count 3000": (old, model, "3000", 0),
                "old, one thread": (old, model, None, 1),
                "new": (new, model, None, 0),
                "new, one thread": (new, model, None, 1),
                "new, eight threads": (new, model, None, 8),
            }.items()
        }
        found: dict[str, Any] = {}
        for count in loops:
            with busy_loops(count):
                for number in range(slices + 2):
                    order = list(contestants.values())
                    for contestant in order if number % 2 else reversed(order):
                        contestant.run(count=number >= 2)
            found[str(count)] = {name: c.summary() for name, c in contestants.items()}
            show(str(count), found)
        return found


def show(count: str, found: dict[str, Any]) -> None:
    cases = found[count]
    new = cases["new"]["seconds_per_token"]
    print(f"beside {count} busy loops")
    for name, case in cases.items():
        idle = ""
        if "0" in found:
            share = found["0"][name]["seconds_per_token"] / case["seconds_per_token"]
            idle = f", {share:.2f} of idle"
        print(
            f"  {name:22} {case['seconds_per_token'] * 1e6:9.1f} us"
            f"  new is {case['seconds_per_token'] / new:5.2f} times as fast"
            f"  p99 {case['step_p99_seconds'] * 1e3:7.2f} ms{idle}"
        )
    sys.stdout.flush()


def verdicts(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """(what, ratio, whether the bar is met)."""
    out = []
    for count, cases in found.items():
        new = cases["new"]["seconds_per_token"]
        best = min(c["seconds_per_token"] for name, c in cases.items() if name.startswith("old"))
        one = cases["new, one thread"]
        tail = cases["new"]["step_p99_seconds"] / one["step_p99_seconds"]
        out.append((f"beside {count}: over the best of old", best / new, best / new >= LEAST))
        out.append((f"beside {count}: p99 over one thread's", tail, tail <= MOST_P99))
    if "0" not in found:
        return out
    idle = found["0"]
    new = idle["new"]["seconds_per_token"]
    eight = new / idle["new, eight threads"]["seconds_per_token"]
    out.append(("idle: eight threads over two", eight, eight >= LEAST_EIGHT))
    if "4" in found:
        share = new / found["4"]["new"]["seconds_per_token"]
        out.append(("beside 4: of idle", share, share >= LEAST_OF_IDLE))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model", help="elastic-mini or a folder")
    parser.add_argument("--loops", default="0,1,2,4,8", help="default: 0,1,2,4,8")
    parser.add_argument("--slices", type=int, default=100, help="of each; default: 100")
    parser.add_argument("--out", type=Path, help="JSON lines to write the result to")
    args = parser.parse_args()
    loops = [int(count) for count in args.loops.split(",")]
    found = measure(args.old, args.new, args.model, loops, args.slices)
    bars = verdicts(found)
    for what, ratio, met in bars:
        print(f"{what:40} {ratio:6.3f}  {'met' if met else 'MISSED'}")
    record = {
        "case": f"neighbours, {Path(args.model).name}",
        **describe_provenance(),
        "slices": args.slices,
        "loops": found,
        "bars": [{"name": what, "ratio": ratio, "met": met} for what, ratio, met in bars],
    }
    if args.out is not None:
        replace_lines(args.out, [record], "case")
    print(json.dumps(record))
    return int(not all(met for _, _, met in bars))


if __name__ == "__main__":
    sys.exit(main())
