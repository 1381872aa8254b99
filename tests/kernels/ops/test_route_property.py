"""Random tables of sub-networks, mixed within a batch."""

from __future__ import annotations

import torch
from elastic_moe_kernels import native, reference
from elastic_moe_kernels.ops.route import route_native
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ops.route_cases import Case, Entry, comparable


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 70))
    entries = []
    for _ in range(draw(st.integers(1, 5))):
        members = draw(
            st.one_of(
                st.none(),
                st.integers(1, num_experts).map(lambda p: tuple(range(p))),
                st.sets(st.integers(0, num_experts - 1), min_size=1).map(
                    lambda p: tuple(sorted(p))
                ),
            )
        )
        k = draw(st.integers(1, min(9, num_experts if members is None else len(members))))
        threshold = draw(st.sampled_from([0.0, 0.25, 0.65, 0.9, 1.0]))
        entries.append(Entry(k, draw(st.integers(1, k)), threshold, members))
    return Case(
        rows=draw(st.integers(0, 40)),
        num_experts=num_experts,
        entries=entries,
        options={
            "renormalize": draw(st.booleans()),
            "epsilon": draw(st.sampled_from([0.0, 1e-12, 0.5])),
        },
        biased=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(case=cases(), level=st.sampled_from(native.levels()))
def test_random_tables(case: Case, level: str) -> None:
    logits, table, rows, bias = case.build()
    ids, weights = route_native(
        logits, table, rows, correction_bias=bias, level=level, **case.options
    )
    for t, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        entry = case.entries[t % len(case.entries)]
        kept = [e for e in row_ids if e >= 0]
        assert row_ids == kept + [-1] * (len(row_ids) - len(kept)), "padding comes last"
        assert entry.min_experts <= len(kept) <= entry.k
        assert len(set(kept)) == len(kept)
        assert entry.pool is None or set(kept) <= set(entry.pool)
        assert row_weights == sorted(row_weights, reverse=True), "best first"
        assert all(w == 0 for w in row_weights[len(kept) :])
        if case.options["renormalize"] and case.options["epsilon"] < 0.5:
            assert abs(sum(row_weights) - 1) < 1e-6

    clear = comparable(logits, table, rows, bias)
    want_ids, want = reference.route(
        logits.double(),
        table,
        rows,
        correction_bias=None if bias is None else bias.double(),
        **case.options,
    )
    assert torch.equal(ids[clear], want_ids[clear])
    assert torch.allclose(weights[clear].double(), want[clear], rtol=2e-6, atol=1e-9)
