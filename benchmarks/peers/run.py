"""Ours beside transformers, llama.cpp and zentorch: python -m benchmarks.peers.run, `make peers`.

Every contestant is a process that runs one request at a time, so that they take turns within each
round and nothing else runs. All compute the same: the logits of the last row of every
sequence, from the same ids. Before anything is timed, their results are compared with float32.
Within a round a contestant's time is that of its fastest call, as the limits are. Exit status 1 if
a bar is missed or was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.bars import ALL_BARS, MIN_ROUNDS, Round, judge
from benchmarks.peers.contestants.slowdown import SLOWER
from benchmarks.peers.engine_stage import EngineStage
from benchmarks.peers.layer_stage import LayerStage
from benchmarks.peers.model_stage import ModelStage
from benchmarks.peers.stage import THREADS, Places
from elastic_moe.files import write_text
from elastic_moe.lab.provenance import describe_provenance, describe_versions
from elastic_moe.model.checkpoints.folder import BUNDLED

Stage = ModelStage | LayerStage | EngineStage
STAGES: dict[str, tuple[Callable[[Places], Stage], tuple[str, ...]]] = {
    "standard": (
        lambda places: ModelStage(places, "standard"),
        ("prefill512", "decode1", "decode16", "saving"),
    ),
    "layer": (lambda places: LayerStage(places, "standard"), ("layer16", "layer64", "layer512")),
    "mini": (lambda places: ModelStage(places, "mini"), ("mini",)),
    "engine": (EngineStage, ("engine16", "mix k", "mix width", "mix depth", "prefix", "load")),
    "awkward": (
        lambda places: ModelStage(places, "awkward"),
        ("awkward prefill512", "awkward decode1", "awkward decode16"),
    ),
    "awkward-layer": (
        lambda places: LayerStage(places, "awkward"),
        ("awkward layer16", "awkward layer64"),
    ),
}
# Tokens that one call brings forward.
TOKENS = {"prefill512": 512, "decode1": 1, "decode16": 16, "mini": 1, "saving": 1, "engine16": 16}


def run_stage(name: str, places: Places, rounds: int, level: str | None) -> list[dict[str, Any]]:
    """One stage: check, print the ceiling, measure, judge."""
    make, cases = STAGES[name]
    print(f"\n{name}: starting", flush=True)
    stage = make(places)
    try:
        ran = (stage.identity["backend"], stage.identity["level"])
        if ran[0] != "cpu" or level not in (None, ran[1]):
            raise SystemExit(f"{name}: backend cpu, level {level} was asked for, {ran} runs")
        errors = stage.check()
        measured: dict[str, list[Round]] = {case: [] for case in cases}
        for case in cases:
            print(f"  {case}: {ceiling(case, stage.measure(case, rounds))}", flush=True)  # warms up
        for number in range(rounds):
            for case in cases:
                measured[case].append(stage.measure(case, number))
            print(f"  round {number + 1} of {rounds} done", flush=True)
    finally:
        stage.close()
    records = []
    for case, values in measured.items():
        show(case, values)
        judged = [judge(bar, values) for bar in ALL_BARS[case]]
        for verdict in judged:
            print(f"    {verdict}")
        records.append(
            {
                "benchmark": "peers",
                "case": case,
                "bars": [verdict.to_json() for verdict in judged],
                "rounds": [asdict(value) for value in values],
                "errors": errors,
                "backend": ran[0],
                "level": ran[1],
                "threads": THREADS,
                "slow": places.slow,
                "spin_count": os.environ.get("GOMP_SPINCOUNT"),
                **describe_provenance(),
                "versions": {**describe_versions(), **stage.versions},
            }
        )
    return records


def ceiling(case: str, sample: Round) -> str:
    """What the limits of this moment allow."""
    B, M = sample.read_bytes_per_second, sample.matmul_flops_per_second
    seconds = max(sample.touched_bytes / B, sample.flops / M)
    line = (
        f"ceiling {seconds * 1e3:.3f} ms ({sample.touched_bytes / 1e6:.1f} MB at B = "
        f"{B / 1e9:.1f} GB/s, {sample.flops / 1e9:.2f} GFLOP at M = {M / 1e9:.0f} GFLOP/s)"
    )
    tokens = TOKENS.get(case.removeprefix("awkward "))
    warm = "warm" if case == "mini" else "cold"
    return f"{line}, weights {warm}" + (f", {tokens / seconds:.1f} tokens/s" if tokens else "")


def show(case: str, rounds: list[Round]) -> None:
    """Every round's values, and their medians."""
    tokens = TOKENS.get(case.removeprefix("awkward "))
    unit = "tokens/s" if tokens else "ms"
    print(f"\n  {case}, {unit}; B in GB/s, M in GFLOP/s")

    def row(label: str, values: list[float], digits: int = 1) -> None:
        listed = " ".join(f"{value:9.{digits}f}" for value in values)
        print(f"    {label:36} {listed}  median {statistics.median(values):.{digits}f}")

    for name in rounds[0].seconds:
        seconds = [r.seconds[name] for r in rounds]
        row(name, [tokens / s if tokens else s * 1e3 for s in seconds], 1 if tokens else 2)
    row("B", [r.read_bytes_per_second / 1e9 for r in rounds])
    row("B on huge pages", [r.other["read_huge_bytes_per_second"] / 1e9 for r in rounds])
    row("M", [r.matmul_flops_per_second / 1e9 for r in rounds], 0)
    row("touched GB/s", [r.touched_bytes / r.seconds["ours"] / 1e9 for r in rounds])
    row("GFLOP/s", [r.flops / r.seconds["ours"] / 1e9 for r in rounds], 0)
    for name in rounds[0].other:
        if name.endswith(" seconds"):
            row(f"{name.removesuffix(' seconds')}, us", [r.other[name] * 1e6 for r in rounds], 0)


def main(argv: list[str] | None = None) -> int:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="Python with transformers and llama.cpp")
    parser.add_argument("--zentorch", type=Path, help="Python with zentorch")
    parser.add_argument("--standard", type=Path, default=root / "build/olmoe-standard")
    parser.add_argument("--gguf", type=Path, help="the standard checkpoint for llama.cpp")
    parser.add_argument("--awkward", type=Path, default=root / "build/olmoe-awkward")
    parser.add_argument("--stages", nargs="+", choices=sorted(STAGES), default=list(STAGES))
    parser.add_argument(
        "--rounds", type=int, default=MIN_ROUNDS, help=f"bars count from {MIN_ROUNDS} on"
    )
    parser.add_argument("--level", help="fail unless this instruction-set level runs")
    parser.add_argument(
        "--slow", choices=SLOWER, help="run this kernel twice: bars must turn red, nothing is kept"
    )
    parser.add_argument("--out", type=Path, help="JSON lines, one per case")
    args = parser.parse_args(argv)
    places = Places(
        Path(sys.executable),
        args.peers,
        args.zentorch,
        args.standard,
        args.gguf,
        args.awkward,
        BUNDLED / "elastic-mini",
        args.slow,
    )
    records: list[dict[str, Any]] = []
    for name in args.stages:
        records += run_stage(name, places, args.rounds, args.level)
    return finish(args, records)


def finish(args: argparse.Namespace, records: list[dict[str, Any]]) -> int:
    """Print the table of bars and one JSON line, write the file; the exit status."""
    summary: Mapping[str, list[str]] = {"met": [], "missed": [], "not measured": []}
    print("\nbars")
    for record in records:
        for bar in record["bars"]:
            key = {True: "met", False: "missed", None: "not measured"}[bar["met"]]
            summary[key].append(f"{record['case']}: {bar['name']}")
            median = "-" if bar["median"] is None else f"{bar['median']:.3f}"
            goal = "" if bar["goal"] is None else f", goal {bar['goal']:g}"
            line = f"{record['case']}: {bar['name']}"
            print(f"  {key:12} {line:60} {median:>8}  bar {bar['direction']} {bar['bar']:g}{goal}")
    if args.out is not None and args.slow is None:
        write_text(args.out, "".join(json.dumps(record) + "\n" for record in records))
    print(
        json.dumps(
            {
                "benchmark": "peers",
                "rounds": args.rounds,
                "bars": summary,
                "slow": args.slow,
                **describe_provenance(),
                "versions": records[0]["versions"] if records else describe_versions(),
            }
        )
    )
    return 1 if summary["missed"] or summary["not measured"] else 0


if __name__ == "__main__":
    sys.exit(main())
