"""The routing kernel beside its PyTorch reference and the limit of the machine's memory.

Run with `make bench`. Inputs are warm: the same logits are routed over and over, so up to about
16 x 64 they sit in the first-level cache. The limit is the time to read the logits and the row
indices and to write ids and weights at the streaming bandwidth of main memory, measured in the
same session; a call of a few rows is bound by the cost of a Python call instead.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from elastic_moe_kernels import cpu, ops, reference
from elastic_moe_kernels.table import LayerTable
from pytest_benchmark.fixture import BenchmarkFixture

from elastic_moe.lab.record import describe_commit

TOP_K = {16: 4, 64: 8, 128: 8}  # elastic-mini, OLMoE, Qwen3-MoE


@pytest.fixture(scope="module")
def bandwidth() -> float:
    """Bytes per second of the best of several streaming reads of 512 MiB."""
    buffer = torch.ones(1 << 27)
    buffer.sum()
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Collects a record per benchmark; ends with one JSON line for all of them."""
    records: list[dict[str, Any]] = []
    yield records
    line = {
        "benchmark": "route",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "level": cpu.level(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": describe_commit(),
        "records": records,
    }
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + json.dumps(line))


def implementation_that_runs(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation one run of `call` reaches."""
    reached: list[str] = []
    with monkeypatch.context() as patch:
        for module, name in ((cpu, "cpu"), (reference, "reference")):
            route = module.route

            def spy(*args: Any, route: Any = route, name: str = name, **kwargs: Any) -> Any:
                reached.append(name)
                return route(*args, **kwargs)

            patch.setattr(module, "route", spy)
        call()
    return "+".join(reached)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("num_experts", TOP_K)
@pytest.mark.parametrize("rows", [1, 16, 512, 4096])
def test_route(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bandwidth: float,
    results: list[dict[str, Any]],
    rows: int,
    num_experts: int,
    implementation: ops.Implementation,
) -> None:
    top_k = TOP_K[num_experts]
    logits = torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(rows))
    subnet_of_row = torch.zeros(rows, dtype=torch.int64)
    one = torch.ones(1, dtype=torch.int32)
    table = LayerTable(
        top_k=top_k * one,
        min_experts=one,
        threshold=torch.zeros(1),
        channels=one,
        pool=torch.ones(1, num_experts, dtype=torch.bool),
    )

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.route(
            logits, table, subnet_of_row, renormalize=True, implementation=implementation
        )

    # Correct, and the one that was named?
    assert implementation_that_runs(call, monkeypatch) == implementation
    ids, weights = call()
    want_ids, want = reference.route(logits.double(), table, subnet_of_row, renormalize=True)
    assert (ids == want_ids).all(dim=-1).float().mean() > 0.99  # the rest are near-ties
    assert torch.allclose(weights.double(), want, atol=1e-6)

    moved_bytes = logits.nbytes + subnet_of_row.nbytes + ids.nbytes + weights.nbytes
    limit_seconds = moved_bytes / bandwidth
    with capsys.disabled():
        print(
            f"\nT={rows} E={num_experts} k={top_k} {implementation}, warm: limit "
            f"{limit_seconds * 1e6:.2f} us ({moved_bytes} bytes at {bandwidth / 1e9:.1f} GB/s)"
        )

    with torch.inference_mode():
        benchmark(call)

    record = {
        "rows": rows,
        "num_experts": num_experts,
        "top_k": top_k,
        "implementation": implementation,
        "level": cpu.level() if implementation == "cpu" else None,
        "cache": "warm",
        "moved_bytes": moved_bytes,
        "bandwidth_bytes_per_second": bandwidth,
        "limit_seconds": limit_seconds,
    }
    if benchmark.stats is not None:  # absent under --benchmark-disable
        median = benchmark.stats.stats.median
        record |= {"median_seconds": median, "share_of_limit": limit_seconds / median}
        with capsys.disabled():
            print(f"  median {median * 1e6:.1f} us, {limit_seconds / median:.1%} of the limit")
    benchmark.extra_info.update(record)
    results.append(record)
