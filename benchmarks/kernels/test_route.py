"""The routing kernel beside its PyTorch reference and the limit of the machine's memory.

Run with `make bench`. Inputs are warm: the same logits are routed over and over, so up to about
16 x 64 they sit in the first-level cache. The limit is the time to read the logits and the row
indices and to write ids and weights at the streaming bandwidth of main memory, measured in the
same run; a call of a few rows is bound by the cost of a Python call instead.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.table import build_table

from benchmarks.kernels.conftest import Report
from elastic_moe.routing.subnet import full_layer

TOP_K = {16: 4, 64: 8, 128: 8}  # elastic-mini, OLMoE, Qwen3-MoE


def implementation_that_runs(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation one run of `call` reaches."""
    reached: list[str] = []
    with monkeypatch.context() as patch:
        face = import_module("elastic_moe_kernels.ops.route")  # `ops.route` is the function
        for module, function, name in (
            (face, "route_native", "cpu"),
            (reference, "route", "reference"),
        ):
            route = getattr(module, function)

            def spy(*args: Any, route: Any = route, name: str = name, **kwargs: Any) -> Any:
                reached.append(name)
                return route(*args, **kwargs)

            patch.setattr(module, function, spy)
        call()
    return "+".join(reached)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("num_experts", TOP_K)
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 512, 2048])
def test_route(
    measure: Report,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    num_experts: int,
    implementation: ops.Implementation,
) -> None:
    top_k = TOP_K[num_experts]
    logits = torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(rows))
    subnet_of_row = torch.zeros(rows, dtype=torch.int64)
    sizes = {"num_experts": num_experts, "max_top_k": top_k, "width_granules": 1}
    table = build_table([[full_layer(sizes)]], num_experts, 1).layer(0)

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

    measure(
        call,
        kernel="route",
        implementation=implementation,
        rows=rows,
        moved_bytes=logits.nbytes + subnet_of_row.nbytes + ids.nbytes + weights.nbytes,
        flops=0,
        cache="warm",
        num_experts=num_experts,
        top_k=top_k,
    )
