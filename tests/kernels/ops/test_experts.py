"""The C++ experts against a float64 run of the reference, at every level and in both dtypes."""

from __future__ import annotations

import pytest
import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.packing import unpack_experts

from tests.kernels.compare import assert_as_good, assert_same_bits
from tests.kernels.ops.expert_cases import CASES, ExpertsCase, pack_stacked, union_bytes

MIXED = ExpertsCase(45, 9, 50, 64, 3, widths=(64, 7, 40, 16, 33), dropped=1)


def check(case: ExpertsCase, dtype: torch.dtype, level: str, terms_cancel: bool = False) -> None:
    """`terms_cancel`: shapes are so small that a result may be far below what it is a sum of."""
    weights, inputs = case.weights(dtype), case.inputs()
    x, ids, topk_weights, channels = inputs
    if dtype == torch.bfloat16:
        x = x.bfloat16().float()  # so that only the kernel's own rounding counts
    call = (x, ids, topk_weights, channels)
    doubled = [w.double() for w in weights]
    want = reference.experts(x.double(), ids, topk_weights.double(), channels, *doubled)
    same_dtype = reference.experts(*call, *weights)
    got = ops.experts(*call, case.packed(dtype), implementation="cpu", level=level)
    assert got.out.dtype == torch.float32
    scale = None
    if terms_cancel and case.rows:
        sizes = [w.abs() for w in doubled]
        terms = reference.experts(x.double().abs(), ids, topk_weights.double(), channels, *sizes)
        scale = float(terms.max())
    assert_as_good(got.out, same_dtype, want, 3e-7 if terms_cancel else 1e-6, scale)
    weight_bytes, flops, _ = union_bytes(ids, channels, case.hidden, dtype)
    assert (got.weight_bytes, got.flops) == (weight_bytes, flops)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_float64_reference(
    case: ExpertsCase, dtype: torch.dtype, level: str
) -> None:
    check(case, dtype, level)


def test_61_experts_of_520_channels(level: str) -> None:
    case = ExpertsCase(5, 61, 1000, 520, 5, widths=(520, 195, 455), only=(0, 7, 30, 53, 58, 60))
    check(case, torch.bfloat16, level)


def test_exact_where_arithmetic_is(dtype: torch.dtype, level: str) -> None:
    """Small integers, and gates so large that silu(x) = x: not one bit may be missing."""
    case = ExpertsCase(29, 5, 38, 41, 3, widths=(41, 16, 17, 2, 33))
    x, ids, _, channels = case.inputs()
    generator = torch.Generator().manual_seed(1)

    def small(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    x = small(*x.shape)
    x[:, 0] = 1.0
    gate, up, down = small(5, 41, 38), small(5, 41, 38), small(5, 38, 41)
    gate[..., 1:] = 0.0
    gate[..., 0] = 64.0
    weights = torch.tensor([0.5, 1.0, 2.0]).expand(29, 3).contiguous()
    packed = pack_stacked(gate, up, down, dtype)
    got = ops.experts(x, ids, weights, channels, packed, implementation="cpu", level=level)
    want = reference.experts(
        x.double(), ids, weights.double(), channels, *(w.double() for w in (gate, up, down))
    )
    assert want.abs().max() > 1000
    assert torch.equal(got.out.double(), want)


def test_inputs_are_rounded_to_even(level: str) -> None:
    case = ExpertsCase(6, 2, 24, 16, 1)
    x, ids, weights, channels = case.inputs()
    packed = case.packed(torch.bfloat16)
    assert not torch.equal(x, x.bfloat16().float())
    rounded = x.bfloat16().float()
    options = {"implementation": "cpu", "level": level}
    got = ops.experts(x, ids, weights, channels, packed, **options)
    assert_same_bits(got.out, ops.experts(rounded, ids, weights, channels, packed, **options).out)


def test_weights_that_no_row_uses_are_not_read(dtype: torch.dtype, level: str) -> None:
    """Experts that nobody chose, and channels beyond the widest row, may hold anything."""
    case = ExpertsCase(12, 5, 26, 64, 2, widths=(20, 36, 8), only=(1, 3))
    gate, up, down = (w.clone() for w in case.weights(dtype))
    for weight in (gate, up, down):
        weight[[0, 2, 4]] = torch.nan
    gate[:, 36:] = up[:, 36:] = torch.nan
    down[:, :, 36:] = torch.nan
    inputs = case.inputs()
    got = ops.experts(
        *inputs, pack_stacked(gate, up, down, dtype), implementation="cpu", level=level
    )
    want = ops.experts(*inputs, case.packed(dtype), implementation="cpu", level=level)
    assert_same_bits(got.out, want.out)


def test_row_does_not_depend_on_its_batch(dtype: torch.dtype, level: str) -> None:
    inputs, packed = MIXED.inputs(), MIXED.packed(dtype)
    options = {"implementation": "cpu", "level": level}
    whole = ops.experts(*inputs, packed, **options).out
    generator = torch.Generator().manual_seed(0)
    for order in (
        torch.arange(MIXED.rows).flip(0),
        torch.randperm(MIXED.rows, generator=generator),
        torch.randperm(MIXED.rows, generator=generator)[:23],
    ):
        shuffled = [tensor[order] for tensor in inputs]
        assert_same_bits(ops.experts(*shuffled, packed, **options).out, whole[order])
    for t in range(MIXED.rows):
        alone = [tensor[t : t + 1] for tensor in inputs]
        assert_same_bits(ops.experts(*alone, packed, **options).out, whole[t : t + 1])


def test_order_of_a_rows_choices_changes_nothing(dtype: torch.dtype, level: str) -> None:
    x, ids, weights, channels = MIXED.inputs()
    packed = MIXED.packed(dtype)
    options = {"implementation": "cpu", "level": level}
    whole = ops.experts(x, ids, weights, channels, packed, **options)
    flipped = ops.experts(x, ids.flip(1), weights.flip(1), channels, packed, **options)
    assert_same_bits(whole.out, flipped.out)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "case",
    [MIXED, CASES["one-token"], CASES["awkward-granules"], CASES["no-token"]],
    ids=["mixed", "one-token", "awkward-granules", "no-token"],
)
def test_thread_count_changes_nothing(case: ExpertsCase, dtype: torch.dtype, level: str) -> None:
    inputs, packed = case.inputs(), case.packed(dtype)
    results = []
    for count in (1, 2, 3):
        options = {"implementation": "cpu", "level": level, "threads": count}
        results.append(ops.experts(*inputs, packed, **options))
    for other in results[1:]:
        assert_same_bits(results[0].out, other.out)
        assert (other.weight_bytes, other.flops) == (results[0].weight_bytes, results[0].flops)


def test_poison_stays_in_its_row(dtype: torch.dtype, level: str) -> None:
    x, ids, weights, channels = MIXED.inputs()
    packed = MIXED.packed(dtype)
    options = {"implementation": "cpu", "level": level}
    clean = ops.experts(x, ids, weights, channels, packed, **options).out
    x[7] = torch.nan
    got = ops.experts(x, ids, weights, channels, packed, **options).out
    others = torch.arange(MIXED.rows) != 7
    assert got[7].isnan().all()
    assert_same_bits(got[others], clean[others])


def test_half_the_width_reads_half_the_bytes() -> None:
    case = ExpertsCase(8, 4, 64, 128, 2)
    x, ids, weights, channels = case.inputs()
    packed = case.packed(torch.bfloat16)
    full = ops.experts(x, ids, weights, channels, packed)
    half = ops.experts(x, ids, weights, channels // 2, packed)
    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.flops * 2 == full.flops


@pytest.mark.parametrize("name", ["prime-everything", "odd-hidden", "less-than-a-panel"])
def test_packing_loses_nothing(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for got, want in zip(unpack_experts(case.packed(dtype)), case.weights(dtype), strict=True):
        assert_same_bits(got, want)


def test_reference_through_the_same_door(dtype: torch.dtype) -> None:
    """Implementations answer the same call alike, counters included."""
    inputs, packed = MIXED.inputs(), MIXED.packed(dtype)
    ours = ops.experts(*inputs, packed, implementation="cpu")
    theirs = ops.experts(*inputs, packed, implementation="reference")
    torch.testing.assert_close(ours.out, theirs.out, rtol=0.01, atol=0.01)
    assert (ours.weight_bytes, ours.flops) == (theirs.weight_bytes, theirs.flops)
