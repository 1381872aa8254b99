"""What a caller of route can get wrong is refused, with what was got and what to do."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels import ops
from elastic_moe_kernels.constants import MAX_EXPERTS
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.table import LayerTable, SubnetTable, build_table

from elastic_moe.routing import LayerSubnet
from tests.kernels.ops.route_cases import Entry, make_table

IMPLEMENTATIONS = ("reference", "cpu", "auto")


def arguments() -> dict[str, Any]:
    """A call that works: 3 rows, 4 experts, 2 sub-networks."""
    return {
        "router_logits": torch.zeros(3, 4),
        "table": make_table(4, [Entry(k=2), Entry(k=1)]),
        "subnet_of_row": torch.tensor([0, 1, 0]),
        "renormalize": True,
        "epsilon": 0.0,
        "correction_bias": torch.zeros(4),
    }


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {  # for test_op_arguments.py
    "logits-no-tensor": ({"router_logits": [[0.0] * 4] * 3}, "router_logits must be a numpy or"),
    "logits-bf16": ({"router_logits": torch.zeros(3, 4).bfloat16()}, "got bfloat16"),
    "logits-1d": ({"router_logits": torch.zeros(4)}, r"router_logits must have 2 dimensions.*\(4,"),
    "logits-other-E": ({"router_logits": torch.zeros(3, 5)}, "must have 4 columns.*got 5"),
    "logits-strided": ({"router_logits": torch.zeros(4, 3).T}, "router_logits must be contiguous"),
    "logits-elsewhere": ({"router_logits": torch.zeros(3, 4, device="meta")}, "is on meta and the"),
    "table-no-table": ({"table": None}, "table must be a LayerTable, got NoneType"),
    "index-float": ({"subnet_of_row": torch.zeros(3)}, "subnet_of_row must be int64 or int32"),
    "index-2d": ({"subnet_of_row": torch.zeros(3, 1).int()}, "subnet_of_row must have 1 dim"),
    "index-too-short": ({"subnet_of_row": torch.tensor([0, 1])}, "each of the 3 rows.*got 2"),
    "index-strided": ({"subnet_of_row": torch.zeros(6).int()[::2]}, "subnet_of_row must be contig"),
    "index-above": ({"subnet_of_row": torch.tensor([0, 2, 0])}, r"row\[1\] must be in \[0, 1\].*2"),
    "index-negative": ({"subnet_of_row": torch.tensor([0, 0, -1])}, r"row\[2\] must be in.*got -1"),
    "index-int32-above": ({"subnet_of_row": torch.tensor([9, 0, 0]).int()}, r"row\[0\].*got 9"),
    "bias-other-E": ({"correction_bias": torch.zeros(3)}, "each of the 4 experts, got 3"),
    "bias-other-dtype": ({"correction_bias": torch.zeros(4).double()}, "correction_bias must be f"),
    "bias-nan": ({"correction_bias": torch.tensor([0, torch.nan, 0, 0])}, "must be finite"),
    "bias-inf": ({"correction_bias": torch.tensor([0, 0, 0, -torch.inf])}, "must be finite"),
    "epsilon-negative": ({"epsilon": -1e-9}, "epsilon must be finite and at least 0, got -1e-09"),
    "epsilon-nan": ({"epsilon": float("nan")}, "epsilon must be finite"),
    "epsilon-above-float32": (
        {"epsilon": 1e39},
        r"epsilon must be .*1e\+39; numbers of",
    ),
    "renormalize-number": ({"renormalize": 1}, "renormalize must be True or False, got 1"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_good_arguments_are_taken(implementation: Any) -> None:
    ids, _ = ops.route(**arguments(), implementation=implementation)
    assert ids.tolist() == [[0, 1], [0, -1], [0, 1]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_whose_layer_routes_nothing(implementation: Any) -> None:
    table = build_table([[Entry(k=2).choice(4)], [LayerSubnet(active=False)]], 4, 8)
    with pytest.raises(KernelError, match="row 1: its sub-network has top_k 0 here"):
        ops.route(**{**arguments(), "table": table.layer(0)}, implementation=implementation)


def test_unknown_implementation() -> None:
    with pytest.raises(KernelError, match="'auto', 'reference' or 'cpu', got 'cuda'"):
        ops.route(**arguments(), implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="'reference' or 'cpu', got 'cuda'"):
        ops.require("cuda")


def test_cpu_refuses_what_only_the_reference_can() -> None:
    call = {**arguments(), "correction_bias": None}
    with pytest.raises(KernelError, match=r"needs float32.*float64.*reference"):
        ops.route(**{**call, "router_logits": torch.zeros(3, 4).double()}, implementation="cpu")
    logits = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(KernelError, match=r"no backward.*no_grad"):
        ops.route(**{**call, "router_logits": logits}, implementation="cpu")
    wide = {
        "router_logits": torch.zeros(1, MAX_EXPERTS + 1),
        "table": make_table(MAX_EXPERTS + 1, [Entry(k=1)]),
        "subnet_of_row": torch.tensor([0]),
    }
    with pytest.raises(KernelError, match="at most 4096 experts, got 4097"):
        ops.route(**{**call, **wide}, implementation="cpu")


def test_auto_falls_back_to_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    logits = torch.zeros(3, 4)
    monkeypatch.setattr(
        ops.reference, "route", lambda *_, **__: calls.append("reference") or (logits, logits)
    )
    module = import_module("elastic_moe_kernels.ops.route")  # `ops.route` is the function
    monkeypatch.setattr(
        module, "route_native", lambda *_, **__: calls.append("cpu") or (None, None)
    )
    call = {**arguments(), "correction_bias": None}
    ops.route(**call)
    ops.route(**{**call, "router_logits": torch.zeros(3, 4).double()})
    trained = torch.zeros(3, 4, requires_grad=True)
    ops.route(**{**call, "router_logits": trained})
    with torch.no_grad():
        ops.route(**{**call, "router_logits": trained})
    assert calls == ["cpu", "reference", "reference", "cpu"]


def test_gradient_of_auto_is_the_references() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    _, weights = ops.route(
        logits, make_table(4, [Entry(k=2)]), torch.zeros(3).long(), renormalize=False
    )
    weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


BAD_TABLES = {
    "k-zero": ({"top_k": [0, 1]}, r"sub-network 0: top_k must be in \[1, 4\].*got 0"),
    "k-above-pool": ({"top_k": [2, 5]}, r"sub-network 1: top_k must be in \[1, 4\].*got 5"),
    "min-zero": ({"min_experts": [0, 1]}, r"min_experts must be in \[1, 2\], its top_k, got 0"),
    "min-above-k": ({"min_experts": [1, 2]}, r"sub-network 1: min_experts.*\[1, 1\].*got 2"),
    "threshold-above-1": ({"threshold": [0.0, 1.5]}, r"threshold must be a number in \[0, 1\]"),
    "threshold-negative": ({"threshold": [-0.5, 0.0]}, "sub-network 0: threshold.*got -0.5"),
    "threshold-nan": ({"threshold": [0.0, float("nan")]}, "sub-network 1: threshold.*got nan"),
    "no-channels": ({"channels": [8, 0]}, "channels must be at least 1, got 0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
@pytest.mark.parametrize("whole_model", [False, True])
def test_bad_table_value(change: dict[str, list[float]], message: str, whole_model: bool) -> None:
    good = make_table(4, [Entry(k=2), Entry(k=1)])
    fields = {f.name: getattr(good, f.name) for f in dataclasses.fields(good) if f.init}
    fields |= {name: np.array(v, dtype=fields[name].dtype) for name, v in change.items()}
    if whole_model:
        if change == {"top_k": [0, 1]}:
            pytest.skip("0 says that the layer routes nothing")
        message = re.sub(r"(sub-network \d):", r"\1, layer 0:", message)
        fields = {name: column[:, None] for name, column in fields.items()}
        fields["active"] = np.ones((2, 1), dtype=np.bool_)
    with pytest.raises(KernelError, match=message):
        (SubnetTable if whole_model else LayerTable)(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": torch.ones(2)}, "top_k must be int32, got float32"),
        ({"top_k": torch.ones(3).int()}, r"top_k must have shape \(S\).*got \(3,\)"),
        ({"top_k": [1, 2]}, "top_k must be a numpy or torch array, got list"),
        ({"pool": torch.ones(2, 4)}, "pool must be bool"),
        ({"pool": torch.ones(2, 0).bool()}, "at least one expert"),
        ({"threshold": torch.zeros(2, device="meta")}, "threshold is on meta and pool on cpu"),
    ],
)
def test_bad_table_tensor(change: dict[str, Any], message: str) -> None:
    good = make_table(4, [Entry(k=2), Entry(k=1)])
    with pytest.raises(KernelError, match=message):
        dataclasses.replace(good, **change)


def test_layers_of_a_model_keep_their_own_slots() -> None:
    """K is per layer, inactive entries are never read, and a layer is made once."""
    pool = (0, 1, 2)
    dense = LayerSubnet(active=True, expert_pool=pool)
    first = Entry(k=2, pool=pool).choice(4)
    second = Entry(k=3, min_experts=3, threshold=1.0, pool=pool).choice(4)
    half = replace(Entry(k=1, threshold=0.5, pool=pool).choice(4), expert_width=1)
    wrong = Entry(k=-7, min_experts=99, threshold=float("nan"), pool=pool).choice(4)
    wrong = replace(wrong, active=False, expert_width=-1)
    wide = [replace(layer, expert_width=2) for layer in (first, second)]
    table = build_table([[*wide, dense], [half, wrong, dense]], 4, 4)
    assert [table.layer(i).max_top_k for i in range(3)] == [2, 3, 0]
    assert table.layer(1) is table.layer(1)
    assert table.to("cpu") is table
    assert table.layer(0).top_k.tolist() == [2, 1]
    assert table.layer(0).channels.tolist() == [8, 4]
    moved = table.to("meta")
    assert moved.layer(1).pool.device.type == "meta"
    assert moved.layer(1).max_top_k == 3
