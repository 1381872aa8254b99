"""What all kernel benchmarks share: the limits of this run, the record of each, one last line."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

# Before torch loads OpenMP, as in tests/conftest.py.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pytest
import torch
from elastic_moe_kernels import native
from pytest_benchmark.fixture import BenchmarkFixture

from elastic_moe.lab.bench.limits import Limits, LimitsProbe
from elastic_moe.lab.provenance import describe_provenance, describe_versions

LIMITS_AGE_SECONDS = 20.0
SECONDS_PER_CASE = 0.4
MIN_ROUNDS, MAX_ROUNDS = 3, 60
MIN_CALL_SECONDS = 2e-4  # shorter calls are timed several at once

Report = Callable[..., dict[str, Any]]
RECORDS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture(scope="session")
def probe() -> LimitsProbe:
    return LimitsProbe()


@pytest.fixture(scope="session")
def _limits_now(probe: LimitsProbe) -> Callable[[], Limits]:
    """Measured anew when they are old: a machine drifts."""
    kept: list[tuple[float, Limits]] = []

    def now() -> Limits:
        if not kept or time.monotonic() - kept[0][0] > LIMITS_AGE_SECONDS:
            kept[:] = [(time.monotonic(), probe.measure(reads=3))]
        return kept[0][1]

    return now


@pytest.fixture
def limits(_limits_now: Callable[[], Limits]) -> Limits:
    """B and M, measured right before the case."""
    return _limits_now()


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Collects a record per benchmark; they are the last line that is printed."""
    return pytestconfig.stash.setdefault(RECORDS, [])


def pytest_unconfigure(config: pytest.Config) -> None:
    """End with one JSON line for all benchmarks."""
    records = config.stash.get(RECORDS, [])
    if not records:
        return
    line = {
        "benchmark": "kernels",
        "level": native.level(),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        **describe_provenance(),
        "versions": {**describe_versions(), **_peers()},
        "records": records,
    }
    print(json.dumps(line))


def _peers() -> dict[str, str]:
    found = {}
    for name in ("transformers", "zentorch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    limits: Limits,
    results: list[dict[str, Any]],
) -> Report:
    """Print the ceiling, time a call, and record it: measure(call, kernel=..., ...)."""

    def run(
        call: Callable[[], object],
        *,
        kernel: str,
        implementation: str,
        rows: int,
        moved_bytes: float,
        flops: float,
        cache: str,
        **more: Any,
    ) -> dict[str, Any]:
        B, M = limits.read_bytes_per_second, limits.matmul_flops_per_second
        limit = max(moved_bytes / B, flops / M)
        named = " ".join(str(value) for name, value in more.items() if name != "error")
        with capsys.disabled():
            print(
                f"\n{kernel} T={rows} {implementation} {named}, {cache}: limit {limit * 1e6:.2f} us"
                f" ({moved_bytes / 1e6:.2f} MB at {B / 1e9:.1f} GB/s, {flops / 1e9:.3f} GFLOP at "
                f"{M / 1e9:.0f} GFLOP/s)"
            )
        record: dict[str, Any] = {
            "kernel": kernel,
            "implementation": implementation,
            "level": native.level() if implementation == "cpu" else None,
            "rows": rows,
            "cache": cache,
            **more,
            "moved_bytes": moved_bytes,
            "flops": flops,
            "limit_seconds": limit,
            "limits": limits.to_json(),
        }
        with torch.inference_mode():
            start = time.perf_counter()
            call()
            once = max(time.perf_counter() - start, 1e-7)
            iterations = max(1, round(MIN_CALL_SECONDS / once))
            rounds = round(SECONDS_PER_CASE / once / iterations)
            rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))
            pedantic: Callable[..., object] = benchmark.pedantic
            pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
        if benchmark.stats is not None:  # absent under --benchmark-disable
            median = benchmark.stats.stats.median
            record |= {
                "median_seconds": median,
                "gigabytes_per_second": moved_bytes / median / 1e9,
                "gigaflops_per_second": flops / median / 1e9,
                "share_of_limit": limit / median,
            }
            with capsys.disabled():
                print(
                    f"  median {median * 1e6:.1f} us, {moved_bytes / median / 1e9:.1f} GB/s, "
                    f"{flops / median / 1e9:.0f} GFLOP/s, {limit / median:.1%} of the limit"
                )
        benchmark.extra_info.update(record)
        results.append(record)
        return record

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What was compiled and runs must be the level that was named, or the best there is."""
    named = os.environ.get(native.ISA_VARIABLE) or native.levels()[-1]
    if items and native.level() != named:
        raise pytest.UsageError(f"level {named} was asked for, {native.level()} runs")
