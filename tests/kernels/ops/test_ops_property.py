"""Random shapes: nothing, one, primes, everything dropped."""

from __future__ import annotations

import torch
from elastic_moe_kernels import native
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ops.expert_cases import ExpertsCase
from tests.kernels.ops.test_attention import Case
from tests.kernels.ops.test_attention import check as check_attention
from tests.kernels.ops.test_experts import check as check_experts
from tests.kernels.ops.test_linear import check_linear

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LEVELS = st.sampled_from(native.levels())


@st.composite
def expert_cases(draw: st.DrawFn) -> ExpertsCase:
    experts, channels = draw(st.integers(1, 11)), draw(st.integers(1, 50))
    k = draw(st.integers(0, min(4, experts)))
    return ExpertsCase(
        rows=draw(st.integers(0, 40)),
        experts=experts,
        hidden=draw(st.integers(1, 70)),
        channels=channels,
        k=k,
        widths=tuple(draw(st.lists(st.integers(1, channels), max_size=5))),
        dropped=draw(st.integers(0, k)),
        only=tuple(draw(st.sets(st.integers(0, experts - 1), max_size=3))),
    )


@settings(max_examples=100, deadline=None)
@given(case=expert_cases(), dtype=DTYPES, level=LEVELS)
def test_random_experts(case: ExpertsCase, dtype: torch.dtype, level: str) -> None:
    check_experts(case, dtype, level, terms_cancel=True)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 150),
    dtype=DTYPES,
    level=LEVELS,
)
def test_random_linear(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, level: str
) -> None:
    check_linear((rows, outputs, inputs), dtype, level)


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    spans = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 300)), max_size=4))
    return Case(
        heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        lengths=tuple(length for length, _ in spans),
        starts=tuple(start for _, start in spans),
    )


@settings(max_examples=60, deadline=None)
@given(case=attention_cases(), dtype=DTYPES, level=LEVELS)
def test_random_attention(case: Case, dtype: torch.dtype, level: str) -> None:
    check_attention(case, dtype, level)
