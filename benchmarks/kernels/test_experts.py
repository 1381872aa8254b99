"""The experts of one layer: ours, the reference, transformers' implementations, zentorch.

Cold means that the weights of eight layers take turns, 1.6 GB together; warm that the same layer
runs again and again, which is warm only as far as the caches hold what a routing uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from elastic_moe_kernels import reference
from torch import Tensor

from benchmarks.kernels.cases import (
    CHANNELS,
    CHECKED_ROWS,
    EXPERTS,
    HIDDEN,
    LAYERS,
    ROUTINGS,
    ROWS,
    TOP_K,
    fused_experts,
    in_turn,
    layer_inputs,
    layer_weights,
    native_experts,
    relative_error,
)
from benchmarks.kernels.conftest import Report
from elastic_moe.lab.bench.layer import LayerInputs

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
MAX_BATCHED_ROWS = 64  # beyond, batched_mm copies every row's experts: gigabytes
MAX_ERROR = 0.02


def call_cpu(layers: list[LayerInputs], cold: bool) -> Callable[[], Tensor]:
    turns = in_turn(list(zip(native_experts(), layers, strict=True)), cold=cold)
    out = torch.zeros(len(layers[0].x), HIDDEN)

    def call() -> Tensor:
        experts, inputs = next(turns)
        result: Tensor = experts(inputs, out)
        return result

    return call


def call_reference(layers: list[LayerInputs], cold: bool) -> Callable[[], Tensor]:
    every = [(layer_weights(i), inputs) for i, inputs in enumerate(layers)]
    turns = in_turn(every, cold=cold)

    def call() -> Tensor:
        w, i = next(turns)
        return reference.experts(
            i.x.float(), i.topk_ids, i.topk_weights, i.channels, w.gate, w.up, w.down
        )

    return call


def call_transformers(name: str, layers: list[LayerInputs], cold: bool) -> Callable[[], Tensor]:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        eos_token_id=1,
    )
    config._experts_implementation = name
    every = []
    for (gate_up, down), inputs in zip(fused_experts(), layers, strict=True):
        with torch.device("meta"):
            module = OlmoeExperts(config)
        module.load_state_dict({"gate_up_proj": gate_up, "down_proj": down}, assign=True)
        every.append((module.requires_grad_(False).eval(), inputs, inputs.topk_ids.long()))
    turns = in_turn(every, cold=cold)

    def call() -> Tensor:
        module, inputs, ids = next(turns)
        assert module.config._experts_implementation == name
        result: Tensor = module(inputs.x, ids, inputs.topk_weights)
        return result

    return call


def call_zentorch(layers: list[LayerInputs], cold: bool) -> Callable[[], Tensor]:
    pytest.importorskip("zentorch")
    turns = in_turn(list(zip(fused_experts(), layers, strict=True)), cold=cold)
    out = torch.empty_like(layers[0].x)

    def call() -> Tensor:
        (gate_up, down), i = next(turns)
        torch.ops.zentorch.zentorch_fused_moe(
            out, i.x, gate_up, down, None, None, i.topk_weights, i.topk_ids, False, "silu"
        )
        return out

    return call


def make_call(implementation: str, layers: list[LayerInputs], cold: bool) -> Callable[[], Tensor]:
    makers: dict[str, Any] = {
        "cpu": call_cpu,
        "reference": call_reference,
        "zentorch": call_zentorch,
    }
    if implementation in makers:
        call: Callable[[], Tensor] = makers[implementation](layers, cold)
        return call
    return call_transformers(implementation.removeprefix("transformers "), layers, cold)


def check(call: Callable[[], Tensor], layers: list[LayerInputs]) -> float:
    """The first call runs layer 0: its first rows against float64."""
    i, w = layers[0], layer_weights(0)
    got = call()[:CHECKED_ROWS].clone()
    exact = reference.experts(
        i.x[:CHECKED_ROWS].double(),
        i.topk_ids[:CHECKED_ROWS],
        i.topk_weights[:CHECKED_ROWS].double(),
        i.channels[:CHECKED_ROWS],
        w.gate,
        w.up,
        w.down,
    )
    error = relative_error(got, exact)
    assert error < MAX_ERROR
    return error


def work(layers: list[LayerInputs], cold: bool) -> tuple[float, float]:
    """Bytes of weights and FLOPs of a call, on average; as our kernel counts them."""
    out, touched, flops = torch.zeros(len(layers[0].x), HIDDEN), [], []
    for experts, inputs in list(zip(native_experts(), layers, strict=True))[
        : LAYERS if cold else 1
    ]:
        experts(inputs, out)
        touched.append(experts.weight_bytes)
        flops.append(experts.flops)
    return sum(touched) / len(touched), sum(flops) / len(flops)


CASES = [
    *(("cpu", routing, "full", True) for routing in ROUTINGS),
    ("cpu", "balanced", "full", False),
    ("cpu", "balanced", "half k", True),
    ("cpu", "balanced", "half width", True),
    ("reference", "balanced", "full", True),
    *((f"transformers {name}", "balanced", "full", True) for name in TRANSFORMERS),
    ("zentorch", "balanced", "full", True),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("implementation", "routing", "subnet", "cold"), CASES)
def test_experts(
    measure: Report, rows: int, implementation: str, routing: str, subnet: str, cold: bool
) -> None:
    if implementation == "transformers batched_mm" and rows > MAX_BATCHED_ROWS:
        pytest.skip("batched_mm copies every row's experts")
    layers = [
        layer_inputs(
            rows,
            routing,
            top_k=TOP_K // 2 if subnet == "half k" else TOP_K,
            channels=CHANNELS // 2 if subnet == "half width" else CHANNELS,
            layer=i,
        )
        for i in range(LAYERS)
    ]
    call = make_call(implementation, layers, cold)
    error = check(call, layers)
    touched, flops = work(layers, cold)
    measure(
        call,
        kernel="experts",
        implementation=implementation,
        rows=rows,
        moved_bytes=touched,
        flops=flops,
        cache="cold" if cold else "warm",
        routing=routing,
        subnet=subnet,
        error=error,
    )
