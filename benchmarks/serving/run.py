"""What the server costs beyond its engine: python -m benchmarks.serving.run, `make bench-serving`.

The cases: the throughput of 16 streams of olmoe-0.9b over HTTP as a share of the engine's own, in
alternating rounds; that of 16 sampled streams beside 16 greedy ones; the server's CPU time per
streamed token of elastic-mini; the time from the command to the first token. Before anything is
timed over HTTP, streamed texts are compared with the engine's.
Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.bars import MIN_ROUNDS
from benchmarks.result_file import replace_lines
from benchmarks.serving import cpu, first_token, sampled, throughput
from benchmarks.verdict import Verdict
from elastic_moe.lab.bench.limits import LimitsProbe
from elastic_moe.lab.provenance import describe_provenance

FIRST_TOKEN_ROUNDS = 5
CASES = {
    "throughput": throughput.BARS,
    "sampled": sampled.BARS,
    "cpu": cpu.BARS,
    "first-token": first_token.BARS,
}


def measure(case: str, checkpoint: Path, rounds: int) -> tuple[dict[str, Any], list[Verdict]]:
    """The record of a case and its verdicts."""
    if case == "throughput":
        return throughput.measure(checkpoint, rounds)
    if case == "sampled":
        return sampled.measure(checkpoint, rounds)
    if case == "cpu":
        return cpu.measure(rounds)
    return first_token.measure(FIRST_TOKEN_ROUNDS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("build/serving/olmoe-0.9b"),
        help="made there if it is not (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--out", type=Path, help="put the results into this .jsonl file")
    args = parser.parse_args()
    cases = args.cases.split(",")
    for unknown in sorted(set(cases) - CASES.keys()):
        parser.error(f"there is no case {unknown}; there are {', '.join(CASES)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    limits = LimitsProbe().measure()
    print(
        f"limits: B {limits.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"M {limits.matmul_flops_per_second / 1e9:.0f} GFLOP/s"
    )
    for case in cases:
        for name, bar in CASES[case].items():
            print(f"bar: {name} {bar}")
    lines = []
    for case in cases:
        print(f"\n{case}", flush=True)
        found, verdicts = measure(case, args.checkpoint, args.rounds)
        for row in cpu.rows(found) if case == "cpu" else ():
            print(f"  {row}")
        for one in verdicts:
            print(f"  {one}")
        lines.append(
            {
                "benchmark": "serving",
                **found,
                "bars": [one.to_json() for one in verdicts],
                "limits": limits.to_json(),
                "spin_count": os.environ.get("GOMP_SPINCOUNT"),
                **describe_provenance(),
            }
        )
    print()
    for line in lines:
        print(json.dumps(line))
    if args.out is not None:
        replace_lines(args.out, lines, "case")
    return 0 if all(bar["met"] for line in lines for bar in line["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
