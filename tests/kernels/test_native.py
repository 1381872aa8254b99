"""The seam between Python and C++: shared constants, fields by name, and arrays that are checked.

Python's own checks come first and give users their messages; these are what C++ refuses by itself.
"""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels import constants, native
from elastic_moe_kernels.arrays import array
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import block_bytes
from elastic_moe_kernels.packing import pack_matrix
from elastic_moe_kernels.step import ModelDims

LEVEL = native.level_index(None)
DIMS = ModelDims(
    vocab_size=10,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=3,
    expert_hidden=5,
    rms_norm_eps=1e-5,
)


def test_both_languages_have_the_same_constants() -> None:
    mine = {name: value for name, value in vars(constants).items() if name.isupper()}
    assert mine == native.extension().CONSTANTS
    assert mine["BLOCK_POSITIONS"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"BLOCK_POSITIONS": 32}, "compiled with BLOCK_POSITIONS = 32, and this package has 16"),
        ({"PANEL": None}, "compiled with PANEL = None, and this package has 16"),
        ({"NEW": 1}, "compiled with NEW = 1, and this package has None"),
    ],
)
def test_an_extension_with_other_constants_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, int | None], message: str
) -> None:
    found = {k: v for k, v in (native.extension().CONSTANTS | change).items() if v is not None}
    other = SimpleNamespace(CONSTANTS=found)
    monkeypatch.setattr(native.importlib, "import_module", lambda _name: other)
    with pytest.raises(KernelError, match=message):
        native.extension.__wrapped__()


def test_a_spec_has_every_field_and_no_other() -> None:
    fields = asdict(DIMS)
    native.extension().Model(LEVEL, bf16=False, **fields)
    for name in fields:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.extension().Model(
                LEVEL, bf16=False, **{k: fields[k] for k in fields if k != name}
            )
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.extension().Model(LEVEL, bf16=False, **fields, heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "each"}, "qk_norm must be none, head or all, got each"),
        ({"rope": "whole"}, "rope must be half or interleaved, got whole"),
        ({"num_experts": 4097}, "outside what these kernels take"),
        ({"head_dim": 514}, "outside what these kernels take"),
    ],
)
def test_a_spec_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.extension().Model(LEVEL, bf16=False, **{**asdict(DIMS), **change})


def layer_fields() -> dict[str, Any]:
    packed = {
        "qkv": pack_matrix(torch.ones(16, 8)),
        "out": pack_matrix(torch.ones(8, 8)),
    }
    ones = np.ones(8, dtype=np.float32)
    return {
        **{name: array(matrix.data) for name, matrix in packed.items()},
        "attention_norm": ones,
        "mlp_norm": ones,
        "everyone": None,
        "everyone_channels": 0,
        **dict.fromkeys(("q_norm", "k_norm", "router", "correction_bias", "experts")),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, None, ""),
        ({"qkv": np.zeros(511, np.uint8)}, ValueError, "qkv must have 512 bytes, got 511"),
        ({"mlp_norm": np.ones(7, np.float32)}, ValueError, "mlp_norm must have 8 numbers, got 7"),
        ({"mlp_norm": np.ones(8)}, TypeError, "incompatible"),
        ({"mlp_norm": np.ones(16, np.float32)[::2]}, TypeError, "incompatible"),
        ({"mlp_norm": None}, TypeError, "incompatible"),
        ({"mlp_norm": 123456}, TypeError, "incompatible"),
        ({"experts": np.zeros(64, np.uint8)}, ValueError, "router and experts"),
        ({"extra": 1}, TypeError, "incompatible"),
    ],
    ids=["fine", "short", "size", "float64", "strided", "none", "address", "router", "unknown"],
)
def test_a_layer_of_the_wrong_arrays_is_refused(
    change: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    model = native.extension().Model(LEVEL, bf16=False, **asdict(DIMS))
    if error is None:
        model.set_layer(0, **layer_fields())
        return
    with pytest.raises(error, match=message):
        model.set_layer(0, **{**layer_fields(), **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_of_numpy_and_of_torch_are_the_same(dtype: torch.dtype, level: str) -> None:
    """bfloat16 comes from torch as itself, from numpy as its bits."""
    torch.manual_seed(0)
    matrix = pack_matrix(torch.randn(20, 32).to(dtype))
    x = torch.randn(3, 32).to(dtype)
    results = []
    for give in (array, lambda tensor: tensor):
        out = torch.empty(3, 20)
        native.extension().linear(
            native.level_index(level),
            matrix=give(matrix.data),
            x=give(x),
            out=give(out),
            inputs=32,
            threads=1,
        )
        results.append(out)
    assert torch.equal(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("name", ["queries", "out"])
def test_attention_takes_rows_that_lie_one_after_the_other(name: str) -> None:
    """The kernel addresses them so."""
    fields = {
        "kv": np.zeros((1, block_bytes(1, 4, torch.float32)), np.uint8),
        "kv_heads": 1,
        "scale": 1.0,
        "queries": np.ones((2, 1, 4), np.float32),
        "spans": np.array([[0, 2, 0, 0]], np.int32),
        "block_tables": np.zeros((1, 1), np.int32),
        "out": np.ones((2, 1, 4), np.float32),
        "threads": 1,
    }
    native.extension().attention(LEVEL, **fields)
    assert not fields["out"].any()
    fields[name] = np.ones((2, 1, 8), np.float32)[:, :, ::2]
    with pytest.raises(TypeError, match="incompatible"):
        native.extension().attention(LEVEL, **fields)


def head_fields() -> dict[str, Any]:
    x, weight = (np.ones(shape, dtype=np.float32) for shape in ((4, 16), (5, 16)))
    targets = np.zeros(4, dtype=np.int64)
    return {"x": x, "weight": weight, "targets": targets, "grad_x": x.copy(), "grad_weight": weight}


def test_training_fields_are_known_and_complete() -> None:
    run = native.extension().attention_training
    with pytest.raises(ValueError, match="rows is missing"):
        run(LEVEL, False)
    numbers = {
        "rows": 2,
        "length": 2,
        "hidden": 16,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 16,
        "interleaved": False,
        "eps": 1e-6,
        "threads": 1,
    }
    sizes = {
        "x": 32,
        "norm": 16,
        **dict.fromkeys(("q", "k", "v", "o"), 256),
        "cos": 16,
        "sin": 16,
        "norm_scale": 2,
        "qkv": 96,
        "head_scale": 4,
        "rotated": 64,
        "attended": 32,
        "log_sums": 2,
        "out": 32,
    }
    fields = numbers | {name: np.ones(size, dtype=np.float32) for name, size in sizes.items()}
    fields |= {"q_norm": None, "k_norm": None}
    run(LEVEL, False, **fields)
    for name in fields:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            run(LEVEL, False, **{k: v for k, v in fields.items() if k != name})
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name} must have {sizes[name]} numbers"):
            run(LEVEL, False, **{**fields, name: np.ones(sizes[name] - 1, dtype=np.float32)})
        with pytest.raises(ValueError, match=f"{name} must be a contiguous array"):
            run(LEVEL, False, **{**fields, name: np.ones(sizes[name])})
    with pytest.raises(ValueError, match="got 27 fields, of which 26 are known"):
        run(LEVEL, False, **fields, address=1)
    with pytest.raises(ValueError, match="sizes must be positive"):
        run(LEVEL, False, **{**fields, "rows": 3})


def test_the_head_refuses_arrays_that_do_not_fit() -> None:
    run = native.extension().head_loss
    run(LEVEL, **head_fields(), threads=1)
    for name, other in (("targets", np.zeros(3, dtype=np.int64)), ("grad_x", np.ones((3, 16)))):
        with pytest.raises((ValueError, TypeError)):
            run(LEVEL, **{**head_fields(), name: other}, threads=1)
