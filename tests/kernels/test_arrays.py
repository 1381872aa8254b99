"""Arrays of any kind go in, and come back as the kind they were; torch is not asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels import arrays, ops
from elastic_moe_kernels.arrays import array, tensor, to_dtype
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.packing import pack_matrix, unpack_matrix

from tests.foreign import Foreign
from tests.kernels.compare import assert_same_bits
from tests.kernels.ops.test_op_arguments import GOOD


def outputs(result: Any) -> list[Any]:
    every = result if isinstance(result, tuple) else [getattr(result, "out", result)]
    return list(every)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("op", [op for op in GOOD if op != "token_logprobs"])  # always numpy's
def test_results_are_of_the_kind_of_the_arguments(op: str, implementation: Any) -> None:
    call = GOOD[op]()
    first = next(iter(call))  # which the results are like
    call[first] = tensor(call[first])
    want = outputs(getattr(ops, op)(**call, implementation=implementation))
    assert all(isinstance(found, torch.Tensor) for found in want)
    for kind in (array, lambda given: Foreign(array(given))):
        own = {name: kind(v) if isinstance(v, torch.Tensor) else v for name, v in call.items()}
        got = outputs(getattr(ops, op)(**own, implementation=implementation))
        assert all(isinstance(found, np.ndarray) for found in got)
        for found, other in zip(got, want, strict=True):
            assert torch.equal(tensor(found), other)


def test_memory_is_shared_and_not_copied() -> None:
    values = np.arange(6, dtype=np.float32)
    assert np.shares_memory(array(tensor(values)), values)
    assert np.shares_memory(array(Foreign(values)), values)


def test_bits_stand_for_bfloat16() -> None:
    weight = torch.randn(5, 6).bfloat16()
    assert array(weight).dtype == np.uint16
    assert torch.equal(tensor(array(weight)), weight)
    packed = pack_matrix(array(weight))
    assert packed.dtype == "bfloat16"
    assert_same_bits(unpack_matrix(packed), weight)
    for name in ("bfloat16", torch.bfloat16, np.uint16, np.dtype(np.uint16)):
        assert arrays.dtype_name(name) == "bfloat16"
    for name in ("float32", torch.float32, np.float32):
        assert arrays.dtype_name(name) == "float32"
    with pytest.raises(KernelError, match="weights must be bfloat16 or float32, got int8"):
        arrays.value_dtype(torch.int8, "weights")


def test_rounding_is_that_of_torch() -> None:
    """Every float32 of a sample: halves between two, subnormal numbers, infinities, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 300_001, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # a tie
    bits[:6] = 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0, 0x80000000
    values = bits.view(np.float32)
    got, want = to_dtype(values, "bfloat16"), torch.from_numpy(values).bfloat16()
    number = ~np.isnan(values)
    assert np.array_equal(got[number], array(want)[number])
    assert want.isnan().numpy()[~number].all()
    assert tensor(got).isnan().numpy()[~number].all()
    assert np.array_equal(to_dtype(got, "float32")[number], want.float().numpy()[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_widening_is_that_of_torch(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).to(dtype)
    assert np.array_equal(to_dtype(array(values), "float32"), values.float().numpy())
    single = values.float().numpy()
    assert to_dtype(single, "float32") is single


def test_the_kernels_do_not_load_torch() -> None:
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from elastic_moe_kernels import ops, step, table, packing\n"
        "matrix = packing.pack_matrix(np.ones((4, 3), np.float32), dtype='bfloat16')\n"
        "print(ops.linear(np.ones((1, 3), np.float32), matrix).tolist())\n"
        "print(ops.backends()[0].available, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[[3.0, 3.0, 3.0, 3.0]]", "True False"]


def test_the_reference_without_torch_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "has_torch", lambda: False)
    x, matrix = np.ones((1, 3), np.float32), pack_matrix(np.ones((4, 3), np.float32))
    assert not ops.available("reference")
    with pytest.raises(KernelError, match=r"needs torch.*pip install 'elastic-moe\[torch\]'"):
        ops.linear(x, matrix, implementation="reference")
    with pytest.raises(KernelError, match=r"elastic-moe\[torch\]"):
        ops.require("reference")
    monkeypatch.setattr(ops.dispatch.native, "missing", lambda: "no C++ kernels: reason.")
    with pytest.raises(KernelError, match=r"no C\+\+ kernels: reason\. .*elastic-moe\[torch\]"):
        ops.linear(x, matrix)
