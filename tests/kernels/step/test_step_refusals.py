"""Every bad argument of a step is refused with its place and range, and nothing is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.step import CpuModel, LayerTensors, ModelDims
from elastic_moe_kernels.table import SubnetTable

from elastic_moe.routing import resolve
from tests.kernels.step.steps import Runner, make_model, runner_of, table_of

MODEL = make_model(torch.float32)  # 5 layers, 61 tokens, 128 positions
SUBNETS = [resolve(MODEL.shape), resolve(MODEL.shape, depth=2), resolve(MODEL.shape, top_k=1)]


@pytest.fixture(scope="module")
def runner() -> Runner:
    """Three sequences of up to 64 positions."""
    return runner_of(MODEL, SUBNETS, sequences=3)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def arguments(runner: Runner) -> dict[str, Any]:
    """A call that works: tokens of sequence 2 at 5..7, one of sequence 0 at 33."""
    return {
        "token_ids": ints(1, 2, 60, 0),
        "positions": ints(5, 6, 7, 33),
        "sequences": ints(2, 2, 2, 0),
        "subnets": ints(0, 0, 2, 1),
        "table": runner.table,
        "blocks": runner.blocks,
        "block_tables": runner.tables,
        "logits_rows": ints(3, 2),
    }


# StepRefusal in csrc/bindings/model.h; the last one is in test_step.py.
BAD_IDS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "token-above": ({"token_ids": ints(1, 61, 0, 0)}, r"token_ids\[1\] .* \[0, 60\], got 61"),
    "token-negative": ({"token_ids": ints(1, 2, 0, -1)}, r"token_ids\[3\] .* got -1"),
    "token-far": ({"token_ids": ints(2**31 - 1, 2, 0, 1)}, r"token_ids\[0\] .* got 2147483647"),
    "position-negative": ({"positions": ints(5, 6, 7, -1)}, r"positions\[3\] .* got -1"),
    "position-beyond-the-blocks": (
        {"positions": ints(5, 6, 7, 64)},
        r"positions\[3\] must be in \[0, 63\].* got 64",
    ),
    "position-far": ({"positions": ints(5, 6, 7, 2**31 - 1)}, r"positions\[3\] .* got 2147483647"),
    "sequence-above": ({"sequences": ints(2, 2, 2, 3)}, r"sequences\[3\] must be in \[0, 2\].* 3"),
    "sequence-negative": ({"sequences": ints(-1, 2, 2, 0)}, r"sequences\[0\] .* got -1"),
    "positions-with-a-gap": ({"positions": ints(5, 7, 8, 33)}, "row 1: .* sequence 2 .* consec"),
    "position-twice": ({"positions": ints(5, 6, 6, 33)}, "row 2: .* sequence 2 .* consecutive"),
    "positions-backwards": ({"positions": ints(7, 6, 5, 33)}, "row 1: .* consecutive"),
    "sequence-in-two-runs": ({"sequences": ints(2, 0, 0, 2)}, "row [13]: .* consecutive rows"),
    "sequence-comes-back": (
        {"sequences": ints(2, 0, 1, 2), "positions": ints(5, 0, 0, 6)},
        "row 3: the tokens of sequence 2 must be consecutive rows",
    ),
    "subnet-above": ({"subnets": ints(0, 0, 3, 1)}, r"subnets\[2\] must be in \[0, 2\], got 3"),
    "subnet-negative": ({"subnets": ints(0, 0, 0, -1)}, r"subnets\[3\] .* got -1"),
    "other-depth-within-a-sequence": (
        {"subnets": ints(0, 0, 1, 1)},
        "row 2: sub-network 1 runs other layers than the one of the row before",
    ),
    "logits-row-above": ({"logits_rows": ints(0, 4)}, r"logits_rows\[1\] .* \[0, 3\], got 4"),
    "logits-row-negative": ({"logits_rows": ints(-1)}, r"logits_rows\[0\] .* got -1"),
}


def refused(runner: Runner, message: str, **changes: Any) -> None:
    """The call raises, and leaves the cache as it was."""
    runner.blocks.fill_(255)
    with pytest.raises(KernelError, match=message):
        runner.model.step(**{**arguments(runner), **changes})
    assert runner.blocks.eq(255).all(), "something was computed"


def test_the_call_itself_works(runner: Runner) -> None:
    runner.blocks.fill_(0)
    assert np.isfinite(runner.model.step(**arguments(runner)).logits).all()
    assert runner.blocks.ne(0).any()


@pytest.mark.parametrize(("change", "message"), BAD_IDS.values(), ids=BAD_IDS.keys())
def test_bad_id(runner: Runner, change: dict[str, np.ndarray], message: str) -> None:
    refused(runner, message, **change)


@pytest.mark.parametrize("bad", [-1, 10**6])
@pytest.mark.parametrize(
    ("at", "seen"),
    [
        ((2, 4, 0), True),
        ((0, 1, 2), True),
        ((0, 1, 0), True),
        ((0, 2, 0), False),
        ((2, 0, 1), False),
    ],
    ids=["last-layer", "last-block", "first-block", "idle-layer", "block-beyond"],
)
def test_bad_block(runner: Runner, at: tuple[int, int, int], seen: bool, bad: int) -> None:
    """Only blocks up to the last position, of layers that run, are looked at."""
    tables = runner.tables.copy()
    tables[at] = bad
    if seen:
        most = len(runner.blocks) - 1
        message = rf"sequence {at[0]}, layer {at[1]} must name blocks in \[0, {most}\], got {bad}"
        refused(runner, message, block_tables=tables)
    else:
        runner.blocks.fill_(0)
        runner.model.step(**{**arguments(runner), "block_tables": tables})


def test_position_beyond_the_angles(runner: Runner) -> None:
    angles = runner.model._angles
    assert angles is not None
    runner.model.set_angles(angles[0][:33], angles[1][:33])
    try:
        refused(runner, r"positions\[3\] must be in \[0, 32\]")
    finally:
        runner.model.set_angles(*angles)


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "int64": ({"token_ids": np.zeros(4, dtype=np.int64)}, "token_ids must be contiguous int32"),
    "two-dimensions": ({"token_ids": ints(1, 2, 3, 4).reshape(2, 2)}, "token_ids must be contig"),
    "too-few-positions": ({"positions": ints(1)}, r"positions must be .* shape \(4,\)"),
    "strided": ({"subnets": np.zeros(8, dtype=np.int32)[::2]}, "subnets must be contiguous"),
    "tables-of-other-depth": ({"block_tables": np.zeros((3, 4, 4), np.int32)}, "block_tables must"),
    "tables-flat": ({"block_tables": ints(1, 2)}, r"block_tables must be \(S, L, B\)"),
    "tables-strided": (
        {"block_tables": np.zeros((3, 5, 8), np.int32)[..., ::2]},
        "block_tables must be contiguous",
    ),
    "logits-rows-2d": ({"logits_rows": np.zeros((1, 1), np.int32)}, "logits_rows must be"),
    "blocks-of-other-size": ({"blocks": torch.zeros(60, 8, dtype=torch.uint8)}, "blocks must be"),
    "blocks-float": ({"blocks": torch.zeros(60, 2048)}, "blocks must be contiguous uint8"),
    "states-negative": ({"states_after": (-1,)}, r"ascending layer counts in \[0, 5\], got \[-1\]"),
    "states-above": ({"states_after": (0, 6)}, r"in \[0, 5\], got \[0, 6\]"),
    "states-twice": ({"states_after": (1, 1)}, "states_after must be ascending"),
    "no-threads": ({"threads": 0}, "threads must be at least 1, got 0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_bad_array(runner: Runner, change: dict[str, Any], message: str) -> None:
    refused(runner, message, **change)


def changed(**columns: Any) -> SubnetTable:
    good = table_of(SUBNETS)
    names = [f.name for f in dataclasses.fields(good) if f.init]
    return SubnetTable(**{name: columns.get(name, getattr(good, name)) for name in names})


def test_table_of_another_model(runner: Runner) -> None:
    good = table_of(SUBNETS)
    refused(
        runner,
        r"the table's pool must have shape \(5, 6\)",
        table=changed(pool=torch.ones(3, 5, 7, dtype=torch.bool)),
    )
    wide = good.channels.copy()
    wide[1, 1] = 25
    refused(runner, r"channels must be in \[1, 24\].* got 25", table=changed(channels=wide))


def test_table_that_routes_nothing_where_there_are_experts(runner: Runner) -> None:
    """The channels of such an entry were never checked: they may be anything."""
    good = table_of(SUBNETS)
    top_k, channels = good.top_k.copy(), good.channels.copy()
    top_k[2, 3], channels[2, 3] = 0, 10**6
    refused(
        runner,
        "sub-network 2, layer 3: top_k must be at least 1",
        table=changed(top_k=top_k, channels=channels),
    )


def dims(**changes: Any) -> ModelDims:
    sizes = ModelDims(
        vocab_size=10,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        num_experts=3,
        expert_hidden=5,
        rms_norm_eps=1e-5,
        qk_norm="head",
    )
    return dataclasses.replace(sizes, **changes)


def layer(**changes: Any) -> LayerTensors:
    tensors = LayerTensors(
        attention_norm=torch.ones(8),
        q=torch.ones(8, 8),
        k=torch.ones(4, 8),
        v=torch.ones(4, 8),
        out=torch.ones(8, 8),
        mlp_norm=torch.ones(8),
        q_norm=torch.ones(4),
        k_norm=torch.ones(4),
        router=torch.ones(3, 8),
        experts=[(torch.ones(5, 8), torch.ones(5, 8), torch.ones(8, 5))] * 3,
    )
    return dataclasses.replace(tensors, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_norm": torch.ones(7)}, r"attention_norm must have shape \(8,\), got \(7,\)"),
        ({"mlp_norm": torch.ones(9)}, "mlp_norm must have shape"),
        ({"q_norm": None}, "q_norm must have 4 gains, got none"),
        ({"k_norm": torch.ones(8)}, r"k_norm must have shape \(4,\)"),
        ({"correction_bias": torch.ones(4)}, r"correction_bias must have shape \(3,\)"),
        ({"router": None}, "a router and experts, or neither"),
        ({"experts": None}, "a router and experts, or neither"),
        ({"router": torch.ones(4, 8)}, r"router must have shape \(3, 8\)"),
        ({"q": torch.ones(4, 8)}, r"q, k and v must have shape \(16, 8\)"),
        ({"out": torch.ones(8, 7)}, r"out must have shape \(8, 8\)"),
    ],
)
def test_layer_of_another_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        CpuModel(dims(), torch.float32).set_layer(0, layer(**change))


def test_step_before_the_weights_are_there() -> None:
    model = CpuModel(dims(num_layers=2), torch.float32)
    call = {
        "token_ids": ints(0),
        "positions": ints(0),
        "sequences": ints(0),
        "subnets": ints(0),
        "table": table_of([resolve(MODEL.shape)]),
        "blocks": model.new_blocks(2),
        "block_tables": ints(0, 1).reshape(1, 2, 1),
        "logits_rows": ints(0),
    }
    with pytest.raises(KernelError, match="no rotary angles are set"):
        model.step(**call)
    with pytest.raises(KernelError, match=r"sin must have shape \(9, 2\), got \(8, 2\)"):
        model.set_angles(torch.ones(9, 2), torch.ones(8, 2))
    with pytest.raises(KernelError, match=r"cos must have shape \(9, 2\), got \(9, 4\)"):
        model.set_angles(torch.ones(9, 4), torch.ones(9, 2))
    model.set_angles(torch.ones(9, 2), torch.ones(9, 2))
    model.set_layer(1, layer())
    with pytest.raises(KernelError, match=r"weights are missing: 0, ends\. Call"):
        model.step(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, r"head_dim must be even and in \[2, 512\], got 7"),
        ({"head_dim": 514}, "got 514"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads must be 1 to 64 times num_kv_heads"),
        ({"num_heads": 65}, "got 65 and 1"),
        ({"num_experts": 4097}, "num_experts must be at most 4096, got 4097"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps must be finite and at least 0, got 1e\+39"),
        ({"routing_epsilon": -1.0}, r"routing_epsilon must be finite and at least 0, got -1"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        CpuModel(dims(**change), torch.float32)
