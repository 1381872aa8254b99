"""What a caller of an op can get wrong is refused."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels import ops
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import KVBlocks, new_blocks
from elastic_moe_kernels.ops.sample_reference import LOGIT_CHANGE, Changes, Masks, new_rows
from elastic_moe_kernels.packing import pack_matrix

from tests.kernels.ops import test_arguments as route
from tests.kernels.ops.expert_cases import ExpertsCase

IMPLEMENTATIONS = ("reference", "cpu", "auto")
CASE = ExpertsCase(rows=3, experts=4, hidden=6, channels=5, k=2)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def linear() -> dict[str, Any]:
    return {"x": torch.zeros(3, 6), "matrix": pack_matrix(torch.zeros(5, 6))}


def rms_norm() -> dict[str, Any]:
    return {"x": torch.ones(3, 6), "gain": torch.ones(6), "eps": 1e-5}


def experts() -> dict[str, Any]:
    names = ("x", "topk_ids", "topk_weights", "channels")
    packed = {"experts": CASE.packed(torch.float32)}
    return dict(zip(names, CASE.inputs(), strict=True)) | packed


def attention() -> dict[str, Any]:
    blocks = new_blocks(4, 2, 4, torch.float32)
    blocks.data.fill(0)
    return {
        "queries": torch.zeros(3, 4, 4),
        "blocks": blocks,
        "block_tables": ints(0, 1, 3, -1).view(2, 2),
        "lengths": ints(2, 1),
        "starts": ints(15, 0),
    }


def sample() -> dict[str, Any]:
    return {"logits": np.zeros((3, 40), np.float32), "rows": new_rows(3)}


def token_logprobs() -> dict[str, Any]:
    return {"logits": np.zeros((3, 40), np.float32), "token_ids": np.zeros(3, np.int32)}


def divergence() -> dict[str, Any]:
    logits = torch.arange(15.0).view(3, 5)
    return {
        "logits": logits,
        "reference": logits.flip(1).contiguous(),
        "targets": torch.tensor([4, 0, 2]),
    }


# A call of each op that works; the first argument may want gradients if it is a tensor.
GOOD = {
    "linear": linear,
    "rms_norm": rms_norm,
    "experts": experts,
    "attention": attention,
    "divergence": divergence,
    "route": route.arguments,
    "sample": sample,
    "token_logprobs": token_logprobs,
}


def parameters(op: str) -> list[str]:
    """Names of an op's parameters; [] for what is no op."""
    found = getattr(ops, op)
    names = list(inspect.signature(found).parameters) if inspect.isfunction(found) else []
    return names if "implementation" in names else []


@pytest.mark.parametrize("op", [name for name in ops.__all__ if parameters(name)])
def test_every_op_is_tested_here(op: str) -> None:
    assert op in GOOD, "give GOOD a call that works, which the tests of this file change"
    assert op in BAD, "give BAD the op's bad arguments"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", [[object()], "text"], ids=["list", "text"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in GOOD for name in parameters(op)])
def test_argument_of_a_wrong_kind(op: str, name: str, wrong: Any, implementation: Any) -> None:
    with pytest.raises(KernelError, match=name):
        getattr(ops, op)(**{"implementation": implementation, **GOOD[op](), name: wrong})


def ids(*values: int) -> torch.Tensor:
    return ints(*values).view(3, 2)


def changes(tokens: list[int], ends: list[int], bias: float = 0.0) -> Changes:
    entries = np.zeros(len(tokens), LOGIT_CHANGE)
    entries["token"], entries["bias"] = tokens, bias
    return Changes(entries, np.array(ends, np.int64))


def masks(words: int, rows: list[int]) -> Masks:
    return Masks(np.full((1, words), 2**32 - 1, np.uint32), np.array(rows, np.int32))


def changed_row(field: str, value: float) -> np.ndarray:
    rows = new_rows(3)
    rows[field][1] = value
    return rows


# op -> what is wrong with a call -> the change and the message
BAD: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "linear": {
        "x-other-D": ({"x": torch.zeros(3, 5)}, r"shape \(3, 6\).*got shape \(3, 5\)"),
        "x-double": ({"x": torch.zeros(3, 6).double()}, "x must be float32"),
        "x-1d": ({"x": torch.zeros(6)}, "x must have 2 dimensions"),
        "x-strided": ({"x": torch.zeros(6, 3).T}, "x must be contiguous"),
        "x-elsewhere": ({"x": torch.zeros(3, 6, device="meta")}, "x is on meta"),
        "not-packed": ({"matrix": torch.zeros(5, 6)}, "must be a PackedMatrix"),
    },
    "rms_norm": {
        "eps-above-float32": (
            {"eps": 1e39},
            r"eps must be finite and at least 0, got 1e\+39; numbers of float32 end",
        ),
        "gain-no-tensor": ({"gain": [1.0] * 6}, r"gain must be a numpy or torch array, got list"),
        "gain-other-D": ({"gain": torch.ones(5)}, r"gain must have shape \(6,\)"),
        "gain-bf16": ({"gain": torch.ones(6).bfloat16()}, "gain must be"),
        "x-other-dtype": ({"x": torch.ones(3, 6).double()}, "x must be float32"),
        "eps-nan": ({"eps": float("nan")}, "eps must be finite and at least 0"),
        "eps-negative": ({"eps": -1.0}, "eps must be finite and at least 0, got -1"),
        "no-columns": (
            {"x": torch.ones(3, 0), "gain": torch.ones(0)},
            "at least one column",
        ),
    },
    "experts": {
        "not-packed": ({"experts": None}, "must be PackedExperts, got NoneType"),
        "id-above": (
            {"topk_ids": ids(0, 1, 2, 4, 0, 1)},
            r"topk_ids\[1, 1\] must be in \[-1, 3\], an expert, or -1 for none, got 4",
        ),
        "id-below": ({"topk_ids": ids(0, 1, 2, 3, 0, -2)}, r"\[2, 1\].* got -2"),
        "id-far": ({"topk_ids": ids(2**31 - 1, 1, 2, 3, 0, 0)}, "got 2147483647"),
        "ids-int64": (
            {"topk_ids": ids(0, 0, 0, 0, 0, 0).long()},
            "must be int32, got int64",
        ),
        "ids-short": ({"topk_ids": ints(0, 1).view(1, 2)}, r"shape \(3, 2\)"),
        "weights-short": ({"topk_weights": torch.ones(3, 1)}, r"topk_weights must"),
        "no-channels": ({"channels": ints(5, 0, 5)}, r"channels\[1\] .*\[1, 5\]"),
        "channels-above": ({"channels": ints(5, 5, 6)}, r"channels\[2\] .*got 6"),
        "channels-short": ({"channels": ints(5)}, r"channels must have shape \(3,"),
        "x-other-D": ({"x": torch.zeros(3, 7)}, r"x must have shape \(3, 6\)"),
    },
    "attention": {
        "scale-above-float32": (
            {"scale": -1e39},
            r"scale must be finite, got -1e.39; numbers of float32 end",
        ),
        "no-blocks": ({"blocks": None}, "must be KVBlocks, got NoneType"),
        "queries-flat": ({"queries": torch.zeros(3, 16)}, "3 dimensions"),
        "other-heads": ({"queries": torch.zeros(3, 3, 4)}, "times the 2 key"),
        "no-heads": ({"queries": torch.zeros(3, 0, 4)}, "got 0"),
        "group-of-65": ({"queries": torch.zeros(3, 130, 4)}, "got 130"),
        "other-channels": ({"queries": torch.zeros(3, 4, 6)}, "heads of 4 chan"),
        "lengths-sum": ({"lengths": ints(1, 1)}, "add up to the 3 rows.*got 2"),
        "length-negative": ({"lengths": ints(-1, 3)}, r"lengths\[0\].*got -1"),
        "lengths-short": ({"lengths": ints(3)}, r"lengths must have shape \(2,"),
        "start-negative": ({"starts": ints(-1, 0)}, r"starts\[0\].*got -1"),
        "start-far": ({"starts": ints(2**31 - 1, 0)}, r"starts\[0\].*\[0, 31\]"),
        "end-beyond": (
            {"starts": ints(31, 0)},
            "sequence 0 ends at position 32",
        ),
        "block-above": (
            {"block_tables": ints(0, 4, 3, -1).view(2, 2)},
            r"block_tables\[0, 1\] must be in \[0, 3\], the blocks, got 4",
        ),
        "block-negative": (
            {"block_tables": ints(0, 1, -1, -1).view(2, 2)},
            r"block_tables\[1, 0\] .* got -1",
        ),
        "scale-nan": ({"scale": float("nan")}, "scale must be finite, got nan"),
        "blocks-empty": (
            {
                "blocks": new_blocks(0, 2, 4, torch.float32),
                "block_tables": ints(0, 0, 0, 0).view(2, 2),
            },
            "at least one block",
        ),
    },
    "divergence": {
        "reference-other-V": (
            {"reference": torch.zeros(3, 4)},
            r"reference must have shape \(3, 5",
        ),
        "reference-double": ({"reference": torch.zeros(3, 5).double()}, "must be float32"),
        "logits-strided": ({"logits": torch.zeros(5, 3).T}, "logits must be contiguous"),
        "no-columns": (
            {"logits": torch.zeros(3, 0), "reference": torch.zeros(3, 0)},
            "at least one column",
        ),
        "targets-short": ({"targets": torch.tensor([0])}, r"targets must have shape \(3,\)"),
        "targets-int32": ({"targets": ints(0, 1, 2)}, "targets must be int64"),
        "target-above": ({"targets": torch.tensor([0, 5, 0])}, r"targets\[1\] .*\[0, 4\].* got 5"),
        "target-negative": ({"targets": torch.tensor([0, 0, -1])}, r"targets\[2\] .* got -1"),
    },
    "route": route.BAD_ARGUMENTS,
    "sample": {
        "no-columns": ({"logits": np.zeros((3, 0), np.float32)}, "at least one column"),
        "logits-double": ({"logits": np.zeros((3, 40))}, "logits must be float32, got float64"),
        "logits-strided": ({"logits": np.zeros((40, 3), np.float32).T}, "logits must be contig"),
        "rows-no-record": ({"rows": np.zeros(3)}, "rows must be .*temperature.*got float64"),
        "rows-other-count": ({"rows": new_rows(2)}, "a row for each of 2, got 3"),
        "logits_rows-short": ({"logits_rows": np.zeros(2, np.int32)}, "each of the 3 rows, got 2"),
        "logits_rows-above": (
            {"logits_rows": np.array([0, 3, 1], np.int32)},
            r"logits_rows\[1\] must be in \[0, 2\], a row of logits, got 3",
        ),
        "logits_rows-below": ({"logits_rows": np.array([0, 1, -1], np.int32)}, r"\[2\].*got -1"),
        "changes-short": ({"changes": changes([0], [1, 1])}, "changes.ends must have one entry"),
        "changes-descend": ({"changes": changes([0], [1, 0, 1])}, "changes.ends must ascend"),
        "changes-left": ({"changes": changes([0, 1], [1, 1, 1])}, "ascend to the 2 entries"),
        "change-above": (
            {"changes": changes([0, 40], [1, 2, 2])},
            r"changes of row 1 must be of tokens in \[0, 39\] .*got token 40",
        ),
        "change-below": ({"changes": changes([-1], [0, 0, 1])}, "changes of row 2 .*got token -1"),
        "change-nan": ({"changes": changes([7], [1, 1, 1], np.nan)}, "finite bias, got token 7"),
        "mask-short": ({"masks": masks(1, [0, 0, 0])}, "a bit for each of the 40 tokens, got 1"),
        "mask-above": ({"masks": masks(2, [0, 0, 1])}, r"masks.rows\[2\] must be in \[-1, 0\]"),
        "mask-below": ({"masks": masks(2, [-2, 0, 0])}, r"masks.rows\[0\] .*got -2"),
        "no-threads": ({"threads": 0}, "threads must be at least 1, got 0"),
        **{
            f"{field}-{value}": ({"rows": changed_row(field, value)}, r"rows\[1\] must have temp")
            for field, values in {
                "temperature": (-1, np.nan, np.inf),
                "top_p": (0, 1.1, np.nan),
                "min_p": (-0.1, 1.1, np.nan),
                "repetition_penalty": (0, np.inf, np.nan),
                "frequency_penalty": (np.inf, np.nan),
                "presence_penalty": (np.inf, np.nan),
                "top_k": (-1,),
            }.items()
            for value in values
        },
    },
    "token_logprobs": {
        "top-above": ({"top": 41}, r"top must be an integer in \[0, 40\], the tokens, got 41"),
        "top-below": ({"top": -1}, "got -1"),
        "token-above": (
            {"token_ids": np.array([0, 40, 0], np.int32)},
            r"token_ids\[1\] must be in \[0, 39\], got 40",
        ),
        "token-below": ({"token_ids": np.array([-1, 0, 0], np.int32)}, r"\[0\].*got -1"),
        "tokens-int64": ({"token_ids": np.zeros(3, np.int64)}, "token_ids must be int32"),
        "logits_rows-above": (
            {"logits_rows": np.array([0, 3, 1], np.int32)},
            r"logits_rows\[1\] must be in \[0, 2\], a row of logits, got 3",
        ),
        "no-threads": ({"threads": True}, "threads must be at least 1, got True"),
    },
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        pytest.param(op, *case, id=f"{op}-{why}")
        for op, cases in BAD.items()
        for why, case in cases.items()
    ],
)
def test_bad_argument(op: str, change: dict[str, Any], message: str, implementation: Any) -> None:
    with pytest.raises(KernelError, match=message):
        getattr(ops, op)(**{**GOOD[op](), **change}, implementation=implementation)


@pytest.mark.parametrize("op", [op for op in GOOD if "level" in parameters(op)])
def test_good_arguments_are_taken(op: str) -> None:
    """By every implementation; a level belongs to "cpu" alone, and gradients to the reference."""
    call = GOOD[op]()
    for implementation in IMPLEMENTATIONS:
        getattr(ops, op)(**call, implementation=implementation)
    getattr(ops, op)(**call, level="portable")
    with pytest.raises(KernelError, match="level 'portable' was named, but this call runs on the"):
        getattr(ops, op)(**call, implementation="reference", level="portable")
    with pytest.raises(KernelError, match="level must be one of"):
        getattr(ops, op)(**call, level="avx9000")
    with pytest.raises(KernelError, match="'auto', 'reference' or 'cpu', got 'cuda'"):
        getattr(ops, op)(**call, implementation="cuda")
    name = next(iter(call))
    if not isinstance(call[name], torch.Tensor):
        return
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
        (
            (torch.zeros(3, 2560, dtype=torch.uint8), 2, 4, torch.float64),
            "be bfloat16 or float32",
        ),
        ((torch.zeros(3, 2560, dtype=torch.uint8), 2, 5, torch.float32), "must be even"),
        ((torch.zeros(3, 0, dtype=torch.uint8), 0, 4, torch.float32), "at least one head"),
    ],
)
def test_blocks_of_another_size(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        KVBlocks(*arguments)
