"""A prepared batch that goes on token by token gives what steps of their own give, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.step import BatchArrays, PreparedStep

from elastic_moe.model.reference.transformer import ElasticTransformer
from tests.kernels.compare import assert_same_bits
from tests.kernels.step.steps import Piece, Runner, arrays_of, make_model, runner_of, subnets_of

F32 = torch.float32
PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)]
SUBNET = [0, 1, 1]


def prefilled(runner: Runner) -> None:
    """All but the last token of every prompt."""
    runner.step(
        [Piece(s, p[:-1], 0, SUBNET[s]) for s, p in enumerate(PROMPTS) if len(p) > 1],
        logits_rows=[],
    )


def prepare(runner: Runner, tables: np.ndarray | None = None, **options: object) -> PreparedStep:
    """The last token of every prompt."""
    pieces = [Piece(s, p[-1:], len(p) - 1, SUBNET[s]) for s, p in enumerate(PROMPTS)]
    token_ids, positions, sequences, subnets, rows = arrays_of(pieces, None)
    own = runner.tables if tables is None else tables
    arrays = BatchArrays(token_ids, positions, sequences, subnets, own, rows)
    return runner.model.prepare(arrays, runner.table, runner.blocks, **options)


def prefilled_runner() -> Runner:
    model = make_model(F32)
    runner = runner_of(model, subnets_of(model), sequences=3)
    prefilled(runner)
    return runner


def later_tokens(model: ElasticTransformer, steps: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(model.config.vocab_size, size=(steps, len(PROMPTS))).tolist()


def test_going_on_gives_the_bits_of_separate_steps(dtype: torch.dtype, level: str) -> None:
    """Past the end of a block, whose successor is entered into the table on the way."""
    model = make_model(dtype)
    runner = runner_of(model, subnets_of(model), level, sequences=3)
    prefilled(runner)
    tables = np.full_like(runner.tables, -1)
    tables[:, :, 0] = runner.tables[:, :, 0]
    step = prepare(runner, tables, trace=True, states_after=(0, 5))
    results = [step.run()]
    lengths = [len(p) for p in PROMPTS]
    tokens = later_tokens(model, 20)
    for row in tokens:
        for s, length in enumerate(lengths):
            tables[s, :, length // 16] = runner.tables[s, :, length // 16]
        results.append(step.advance(row))
        lengths = [length + 1 for length in lengths]

    other = runner_of(model, subnets_of(model), level, sequences=3)
    prefilled(other)
    last = [p[-1] for p in PROMPTS]
    for i, (row, got) in enumerate(zip([last, *tokens], results, strict=True)):
        pieces = [
            Piece(s, (token,), len(PROMPTS[s]) - 1 + i, SUBNET[s]) for s, token in enumerate(row)
        ]
        want = other.step(pieces, trace=True, states_after=(0, 5))
        assert_same_bits(got.logits, want.logits)
        assert_same_bits(got.states, want.states)
        assert_same_bits(got.topk_ids, want.topk_ids)
        assert got.counters == want.counters
        assert got.best_ids == want.best_ids == want.logits.argmax(-1).tolist()


def test_the_callers_arrays_are_left_alone() -> None:
    runner = prefilled_runner()
    step = prepare(runner)
    before = [array.copy() for array in step._arrays]
    step.run()
    step.advance([1, 2, 3])
    assert all(np.array_equal(a, b) for a, b in zip(before, step._arrays, strict=True))


def test_it_keeps_what_it_reads() -> None:
    """Other angles, another table and garbage where the old ones were: it reads its own."""
    runner = prefilled_runner()
    step = prepare(runner)
    step.run()
    want = step.advance([1, 2, 3]).logits

    again = prefilled_runner()
    step = prepare(again)
    step.run()
    again.model.set_angles(*(torch.full((128, 2 * 2), 9.0),) * 2)
    del again.table
    again.model._last_table = None
    rubbish = [torch.full((128, 4), 7.0) for _ in range(100)]
    assert_same_bits(step.advance([1, 2, 3]).logits, want)
    del rubbish


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 61], r"token_ids\[2\] must be in \[0, 60\], got 61"),
        ([-1, 2, 3], r"token_ids\[0\] must be in \[0, 60\], got -1"),
        ([1, 2], "must have one token for each of the 3 rows, got 2"),
        ([1, 2, 3, 4], "must have one token for each of the 3 rows, got 4"),
        ([1, 2, 2**40], r"must be a list of integers in \[0, 60\], got \[1, 2, 1099511627776\]"),
        ([1, 2, "3"], "must be a list of integers"),
        (None, "must be a list of integers"),
    ],
)
def test_bad_tokens_leave_the_batch_where_it_was(tokens: list[int], message: str) -> None:
    runner = prefilled_runner()
    step = prepare(runner)
    step.run()
    want = step.advance([7, 8, 9]).logits

    prefilled(runner)
    step = prepare(runner)
    step.run()
    kept = runner.blocks.clone()
    for _ in range(2):
        with pytest.raises(KernelError, match=message):
            step.advance(tokens)
    assert torch.equal(runner.blocks, kept), "something was computed"
    assert_same_bits(step.advance([7, 8, 9]).logits, want)


def test_a_batch_with_two_rows_of_a_sequence_cannot_go_on() -> None:
    model = make_model(F32)
    runner = runner_of(model, subnets_of(model), sequences=2)
    arrays = arrays_of([Piece(0, (1,), 0, 0), Piece(1, (1, 2), 0, 0)], None)
    batch = BatchArrays(*arrays[:4], runner.tables, arrays[4])
    step = runner.model.prepare(batch, runner.table, runner.blocks)
    step.run()
    with pytest.raises(
        KernelError, match=r"row 2: .* one row of each sequence, sequence 1 has more"
    ):
        step.advance([1, 2, 3])


def test_a_batch_that_has_not_run_cannot_go_on() -> None:
    model = make_model(F32)
    runner = runner_of(model, subnets_of(model), sequences=3)
    with pytest.raises(KernelError, match="one token for each of the 0 rows, got 3"):
        prepare(runner).advance([1, 2, 3])


def test_the_end_of_the_table_and_of_the_angles_is_refused() -> None:
    model = make_model(F32)
    runner = runner_of(model, subnets_of(model), sequences=1, positions=16)
    runner.step([Piece(0, tuple(range(15)), 0, 0)])
    arrays = arrays_of([Piece(0, (1,), 15, 0)], None)
    batch = BatchArrays(*arrays[:4], runner.tables, arrays[4])
    step = runner.model.prepare(batch, runner.table, runner.blocks)
    step.run()
    with pytest.raises(KernelError, match=r"positions\[0\] must be in \[0, 15\].* got 16"):
        step.advance([1])


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 61, 64, 103])
def test_the_most_likely_token_is_the_first_among_equals(vocab: int, level: str) -> None:
    """Rows of the head that repeat give logits that are equal to the bit."""
    model = make_model(F32, vocab_size=vocab, tied_embeddings=False)
    rng = np.random.default_rng(vocab)
    seen = set()
    for _ in range(12):
        kinds = rng.integers(0, 3, vocab)
        model.lm_head.weight.data = torch.randn(3, model.config.hidden_size)[kinds]
        runner = runner_of(model, subnets_of(model), level)
        got = runner.step([Piece(0, (0,) * 5, 0, 0)])
        assert got.best_ids == got.logits.numpy().argmax(-1).tolist()
        seen.update(got.best_ids)
    assert vocab < 15 or len(seen) > 2


def test_without_logits_the_most_likely_tokens_are_the_same(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    runner = runner_of(model, subnets_of(model), sequences=3)
    prefilled(runner)
    want = prepare(runner).run()
    assert want.logits.shape == (3, 61)
    got = prepare(runner, logits=False).run()
    assert got.logits.shape == (0, 61)
    assert got.best_ids == want.best_ids
    assert got.counters == want.counters
