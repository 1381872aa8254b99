"""Decoding with the C++ step: what the runner reuses from step to step changes no bit."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.errors import KernelError
from numpy.typing import NDArray

from elastic_moe.engine.running import native as native_runner
from elastic_moe.engine.running import paged
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.engine.running.paged import PagedSequence
from elastic_moe.engine.running.runner import Chunk, LogitsMode, StepOutput
from elastic_moe.errors import EngineError
from elastic_moe.routing import Subnet, resolve

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")

LENGTH = 60
RNG = np.random.default_rng(0)
TEXTS = RNG.integers(0, 4096, (4, LENGTH)).tolist()


@pytest.fixture
def runner(tiny_folder: Path) -> NativeRunner:
    return NativeRunner(tiny_folder, "bfloat16")


def subnets(runner: NativeRunner) -> list[Subnet]:
    shape = runner.config.shape
    return [
        resolve(shape),
        resolve(shape, top_k=1),
        resolve(shape, depth=3, expert_width=2),
        resolve(shape, sparsity_threshold=0.6),
    ]


def whole(runner: NativeRunner, number: int) -> NDArray[np.float32]:
    """Logits of one text in one chunk."""
    sequence = runner.open(subnets(runner)[number], LENGTH)
    return runner.run([Chunk(sequence, TEXTS[number], "all")]).logits


class Texts:
    """The texts, each under its own sub-network, fed token by token."""

    def __init__(self, runner: NativeRunner) -> None:
        self.runner = runner
        self.want = [whole(runner, i) for i in range(len(TEXTS))]
        self.sequences: list[PagedSequence] = [runner.open(s, LENGTH) for s in subnets(runner)]

    def feed(self, *numbers: int, wanted: LogitsMode = "last") -> StepOutput:
        """One more token of each of these, and compare."""
        places = [self.sequences[i].num_computed_tokens for i in numbers]
        chunks = [
            Chunk(self.sequences[i], TEXTS[i][at : at + 1], wanted)
            for i, at in zip(numbers, places, strict=True)
        ]
        out = self.runner.run(chunks)
        want = [self.want[i][at] for i, at in zip(numbers, places, strict=True)]
        if wanted == "last":
            assert np.array_equal(out.logits, np.stack(want))
        if wanted != "none":
            assert out.best_ids == [int(row.argmax()) for row in want]
        return out


def prepared(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that are built from now on, by their number of tokens."""
    built: list[int] = []
    prepare = runner.model.prepare

    def spy(arrays, *args, **options):
        built.append(len(arrays.token_ids))
        return prepare(arrays, *args, **options)

    monkeypatch.setattr(runner.model, "prepare", spy)
    return built


@pytest.mark.parametrize("wanted", ["best", "last"])
def test_decoding_builds_one_batch(
    runner: NativeRunner, monkeypatch: pytest.MonkeyPatch, wanted: LogitsMode
) -> None:
    texts = Texts(runner)
    built = prepared(runner, monkeypatch)
    for _ in range(LENGTH):
        out = texts.feed(0, 1, 2, 3, wanted=wanted)
        assert out.logits.shape[0] == (4 if wanted == "last" else 0)
    assert built == [4]


def test_a_batch_that_changes_is_built_anew(runner: NativeRunner) -> None:
    """Others come, go and change places; every token is compared."""
    texts = Texts(runner)
    for numbers in [
        (0, 1),
        (0, 1),
        (1, 0),
        (1, 0),
        (1,),
        (1,),
        (1, 2, 0),
        (1, 2, 0),
        (1, 2, 3),
        (1, 2, 3),
        (0, 2, 3),
    ] * 4:
        texts.feed(*numbers)


def test_other_logits_are_another_batch(runner: NativeRunner) -> None:
    texts = Texts(runner)
    for wanted in ("best", "last", "none", "none", "last", "best", "best", "last"):
        texts.feed(0, 2, wanted=wanted)


def test_what_runs_between_is_seen(runner: NativeRunner) -> None:
    """A chunk of one of them, a trace, states: the batch before is not gone on with."""
    texts = Texts(runner)
    texts.feed(0, 1)
    texts.feed(0, 1)
    at = texts.sequences[0].num_computed_tokens
    out = runner.run([Chunk(texts.sequences[0], TEXTS[0][at : at + 5], "all")])
    assert np.array_equal(out.logits, texts.want[0][at : at + 5])
    texts.feed(0, 1)
    out = texts.feed(0, 1)
    assert out.expert_counts is None
    chunks = [
        Chunk(texts.sequences[0], TEXTS[0][texts.sequences[0].num_computed_tokens :][:1], "none")
    ]
    traced = runner.run(chunks, states_after=[2], trace=True)
    assert traced.expert_counts is not None
    assert list(traced.states) == [2]
    texts.feed(0, 1)


def test_a_sequence_set_back_is_run_where_it_says(runner: NativeRunner) -> None:
    texts = Texts(runner)
    for _ in range(20):
        texts.feed(0, 1)
    texts.sequences[0].num_computed_tokens -= 7
    texts.feed(0, 1)
    texts.feed(0, 1)


def test_a_cache_that_moves_while_decoding(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows when the last of its blocks is taken, in the middle of a batch."""
    monkeypatch.setattr(paged, "FIRST_BLOCKS", 1)
    runner = NativeRunner(tiny_folder, "bfloat16")
    texts = Texts(runner)
    kept = []  # so that there are no free blocks
    moved = 0
    for _ in range(LENGTH):
        while runner._own_pool.free:
            kept.append(runner._own_pool.take(1))
        before = runner._own_pool.blocks
        texts.feed(0, 1, 2, 3)
        moved += before is not runner._own_pool.blocks
    assert moved >= 4


def test_angles_that_are_too_few_while_decoding(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_runner, "FIRST_ANGLES", 5)
    want = [whole(NativeRunner(tiny_folder, "bfloat16"), i) for i in range(4)]
    texts = Texts(NativeRunner(tiny_folder, "bfloat16"))
    texts.runner._angles = 0  # as if nothing had run before
    texts.runner._decoding = None
    texts.want = want
    for _ in range(LENGTH):
        texts.feed(0, 3)


def test_blocks_of_a_sequence_that_is_dropped_are_free_at_once(runner: NativeRunner) -> None:
    texts = Texts(runner)
    gc.collect()
    free = len(runner._own_pool.free)
    for _ in range(3):
        texts.feed(0, 1, 2, 3)
    assert len(runner._own_pool.free) < free
    texts.sequences.clear()
    assert len(runner._own_pool.free) == free


def test_a_sequence_that_is_full_stops_the_step(runner: NativeRunner) -> None:
    texts = Texts(runner)
    short = runner.open(subnets(runner)[0], 20)
    for i in range(20):
        runner.run([Chunk(short, TEXTS[0][i : i + 1], "best")])
    with pytest.raises(EngineError, match="the sequence holds 20 positions, 21 are needed"):
        runner.run([Chunk(short, TEXTS[0][20:21], "best")])
    texts.feed(0)


def test_a_token_that_is_no_token_leaves_the_sequences_where_they_were(
    runner: NativeRunner,
) -> None:
    texts = Texts(runner)
    texts.feed(0, 1)
    texts.feed(0, 1)
    with pytest.raises(KernelError, match=r"token_ids\[1\] must be in"):
        runner.run(
            [Chunk(texts.sequences[0], [5], "last"), Chunk(texts.sequences[1], [-1], "last")]
        )
    assert [s.num_computed_tokens for s in texts.sequences[:2]] == [2, 2]
    texts.feed(0, 1)
