"""What a caller of linear, rms_norm, experts or attention can get wrong is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elastic_moe_kernels import ops
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import KVBlocks, new_blocks
from elastic_moe_kernels.packing import pack_matrix

from tests.kernels.ops.expert_cases import ExpertsCase

IMPLEMENTATIONS = ("reference", "cpu", "auto")
CASE = ExpertsCase(rows=3, experts=4, hidden=6, channels=5, k=2)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good(op: str) -> dict[str, Any]:
    """A call that works."""
    if op == "linear":
        return {"x": torch.zeros(3, 6), "matrix": pack_matrix(torch.zeros(5, 6))}
    if op == "rms_norm":
        return {"x": torch.ones(3, 6), "gain": torch.ones(6), "eps": 1e-5}
    if op == "experts":
        x, ids, weights, channels = CASE.inputs()
        packed = CASE.packed(torch.float32)
        return {
            "x": x,
            "topk_ids": ids,
            "topk_weights": weights,
            "channels": channels,
            "experts": packed,
        }
    blocks = new_blocks(4, 2, 4, torch.float32)
    blocks.data.zero_()
    return {
        "queries": torch.zeros(3, 4, 4),
        "blocks": blocks,
        "block_tables": ints(0, 1, 3, -1).view(2, 2),
        "lengths": ints(2, 1),
        "starts": ints(15, 0),
    }


def ids(*values: int) -> torch.Tensor:
    return ints(*values).view(3, 2)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear-x-other-D": ("linear", {"x": torch.zeros(3, 5)}, r"shape \(3, 6\).*got shape \(3, 5\)"),
    "linear-x-double": ("linear", {"x": torch.zeros(3, 6).double()}, "x must be torch.float32"),
    "linear-x-1d": ("linear", {"x": torch.zeros(6)}, "x must have 2 dimensions"),
    "linear-x-strided": ("linear", {"x": torch.zeros(6, 3).T}, "x must be contiguous"),
    "linear-x-elsewhere": ("linear", {"x": torch.zeros(3, 6, device="meta")}, "x is on meta"),
    "linear-not-packed": ("linear", {"matrix": torch.zeros(5, 6)}, "must be a PackedMatrix"),
    "norm-gain-other-D": ("rms_norm", {"gain": torch.ones(5)}, r"gain must have shape \(6,\)"),
    "norm-gain-bf16": ("rms_norm", {"gain": torch.ones(6).bfloat16()}, "gain must be"),
    "norm-x-other-dtype": ("rms_norm", {"x": torch.ones(3, 6).double()}, "x must be torch.float32"),
    "norm-eps-nan": ("rms_norm", {"eps": float("nan")}, "eps must be finite and at least 0"),
    "norm-eps-negative": ("rms_norm", {"eps": -1.0}, "eps must be finite and at least 0, got -1"),
    "norm-no-columns": (
        "rms_norm",
        {"x": torch.ones(3, 0), "gain": torch.ones(0)},
        "at least one column",
    ),
    "experts-not-packed": ("experts", {"experts": None}, "must be PackedExperts, got NoneType"),
    "experts-id-above": (
        "experts",
        {"topk_ids": ids(0, 1, 2, 4, 0, 1)},
        r"topk_ids\[1, 1\] must be in \[-1, 3\], an expert, or -1 for none, got 4",
    ),
    "experts-id-below": ("experts", {"topk_ids": ids(0, 1, 2, 3, 0, -2)}, r"\[2, 1\].* got -2"),
    "experts-id-far": ("experts", {"topk_ids": ids(2**31 - 1, 1, 2, 3, 0, 0)}, "got 2147483647"),
    "experts-ids-int64": ("experts", {"topk_ids": ids(0, 0, 0, 0, 0, 0).long()}, "torch.int32"),
    "experts-ids-short": ("experts", {"topk_ids": ints(0, 1).view(1, 2)}, r"shape \(3, 2\)"),
    "experts-weights-short": ("experts", {"topk_weights": torch.ones(3, 1)}, r"topk_weights must"),
    "experts-no-channels": ("experts", {"channels": ints(5, 0, 5)}, r"channels\[1\] .*\[1, 5\]"),
    "experts-channels-above": ("experts", {"channels": ints(5, 5, 6)}, r"channels\[2\] .*got 6"),
    "experts-channels-short": ("experts", {"channels": ints(5)}, r"channels must have shape \(3,"),
    "experts-x-other-D": ("experts", {"x": torch.zeros(3, 7)}, r"x must have shape \(3, 6\)"),
    "attention-no-blocks": ("attention", {"blocks": None}, "must be KVBlocks, got NoneType"),
    "attention-queries-flat": ("attention", {"queries": torch.zeros(3, 16)}, "3 dimensions"),
    "attention-other-heads": ("attention", {"queries": torch.zeros(3, 3, 4)}, "times the 2 key"),
    "attention-no-heads": ("attention", {"queries": torch.zeros(3, 0, 4)}, "got 0"),
    "attention-group-of-65": ("attention", {"queries": torch.zeros(3, 130, 4)}, "got 130"),
    "attention-other-channels": ("attention", {"queries": torch.zeros(3, 4, 6)}, "heads of 4 chan"),
    "attention-lengths-sum": ("attention", {"lengths": ints(1, 1)}, "add up to the 3 rows.*got 2"),
    "attention-length-negative": ("attention", {"lengths": ints(-1, 3)}, r"lengths\[0\].*got -1"),
    "attention-lengths-short": ("attention", {"lengths": ints(3)}, r"lengths must have shape \(2,"),
    "attention-start-negative": ("attention", {"starts": ints(-1, 0)}, r"starts\[0\].*got -1"),
    "attention-start-far": ("attention", {"starts": ints(2**31 - 1, 0)}, r"starts\[0\].*\[0, 31\]"),
    "attention-end-beyond": (
        "attention",
        {"starts": ints(31, 0)},
        "sequence 0 ends at position 32",
    ),
    "attention-block-above": (
        "attention",
        {"block_tables": ints(0, 4, 3, -1).view(2, 2)},
        r"block_tables\[0, 1\] must be in \[0, 3\], the blocks, got 4",
    ),
    "attention-block-negative": (
        "attention",
        {"block_tables": ints(0, 1, -1, -1).view(2, 2)},
        r"block_tables\[1, 0\] .* got -1",
    ),
    "attention-scale-nan": ("attention", {"scale": float("nan")}, "scale must be finite, got nan"),
    "attention-blocks-empty": (
        "attention",
        {"blocks": new_blocks(0, 2, 4, torch.float32), "block_tables": ints(0, 0, 0, 0).view(2, 2)},
        "at least one block",
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("op", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument(op: str, change: dict[str, Any], message: str, implementation: Any) -> None:
    with pytest.raises(KernelError, match=message):
        getattr(ops, op)(**{**good(op), **change}, implementation=implementation)


@pytest.mark.parametrize("op", ["linear", "rms_norm", "experts", "attention"])
def test_good_arguments_are_taken(op: str) -> None:
    """By every implementation; a level belongs to "cpu" alone, and gradients to the reference."""
    call = good(op)
    for implementation in IMPLEMENTATIONS:
        getattr(ops, op)(**call, implementation=implementation)
    getattr(ops, op)(**call, level="portable")
    with pytest.raises(KernelError, match="level 'portable' was named, but this call runs on the"):
        getattr(ops, op)(**call, implementation="reference", level="portable")
    with pytest.raises(KernelError, match="level must be one of"):
        getattr(ops, op)(**call, level="avx9000")
    with pytest.raises(KernelError, match="'auto', 'reference' or 'cpu', got 'cuda'"):
        getattr(ops, op)(**call, implementation="cuda")
    name = "queries" if op == "attention" else "x"
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(KernelError, match="no backward pass"):
        getattr(ops, op)(**call, implementation="cpu")
    with torch.no_grad():
        getattr(ops, op)(**call, implementation="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8, dtype=torch.uint8), 2, 4, torch.float32), "uint8 with 2560 bytes each"),
        ((torch.zeros(3, 2560), 2, 4, torch.float32), "must be contiguous uint8"),
        ((torch.zeros(3, 2560, dtype=torch.uint8), 2, 4, torch.float64), "torch.bfloat16 or torch"),
        ((torch.zeros(3, 2560, dtype=torch.uint8), 2, 5, torch.float32), "must be even"),
        ((torch.zeros(3, 0, dtype=torch.uint8), 0, 4, torch.float32), "at least one head"),
    ],
)
def test_blocks_of_another_size(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        KVBlocks(*arguments)
