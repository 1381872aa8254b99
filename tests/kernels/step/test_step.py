"""The C++ step against the PyTorch model in float64, for every architecture, level and dtype."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import KVBlocks
from torch import Tensor

from elastic_moe.routing import resolve
from tests.kernels.compare import assert_as_good, assert_same_bits
from tests.kernels.ops.expert_cases import union_bytes
from tests.kernels.step.steps import (
    ARCHITECTURES,
    Piece,
    Runner,
    make_model,
    run_reference,
    runner_of,
    subnets_of,
)

BF16 = torch.bfloat16


def prompt(length: int, vocab_size: int = 61, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(vocab_size, size=length).tolist())


def comparable(ours: Tensor, *theirs: list[list[list[int]]]) -> Tensor:
    """Rows (T,) up to the first whose experts differ: where scores nearly tie, either is right.

    A row attends to all before it, so those after it differ, too.
    """
    same = torch.ones(ours.shape[1], dtype=torch.bool)
    routed = [layer for layer in ours.tolist() if any(e >= 0 for row in layer for e in row)]
    for other in theirs:
        assert len(other) == len(routed)
        for mine, layer in zip(routed, other, strict=True):
            for t, (a, b) in enumerate(zip(mine, layer, strict=True)):
                same[t] &= {e for e in a if e >= 0} == {e for e in b if e >= 0}
    return same.int().cummin(0).values.bool()


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_agrees_with_the_model_in_float64(
    changes: dict[str, Any], dtype: torch.dtype, level: str
) -> None:
    """Two sequences with sub-networks of their own, cut into a prefill and single tokens."""
    model = make_model(dtype, **changes)
    subnets = subnets_of(model)
    runner = runner_of(model, subnets, level, sequences=2)
    prompts = [prompt(23, model.config.vocab_size, seed) for seed in (1, 2)]
    steps = [
        runner.step([Piece(s, p[a:b], a, s) for s, p in enumerate(prompts)], trace=True)
        for a, b in ((0, 17), (17, 18), (18, 23))
    ]
    for s, tokens in enumerate(prompts):
        parts = [
            [t[..., n * s : n * (s + 1), :] for t in (step.logits, step.topk_ids)]
            for step, n in zip(steps, (17, 1, 5), strict=True)
        ]
        logits = torch.cat([part[0] for part in parts])
        ids = torch.cat([part[1] for part in parts], dim=1)
        want, want_ids = run_reference(model, subnets[s], tokens, torch.float64)
        same_dtype, same_ids = run_reference(model, subnets[s], tokens, torch.float32)
        rows = comparable(ids, want_ids, same_ids)
        assert rows.sum() >= 10, "too few rows to compare"
        # In bfloat16 a last bit of float32 may tip the rounding of an input.
        little = 2e-6 if dtype == torch.float32 else 4e-3
        assert_as_good(logits[rows], same_dtype[rows], want[rows], little)


def test_cache_holds_what_attention_reads(dtype: torch.dtype, level: str) -> None:
    """Keys and values of layer 0, worked out by hand from the embeddings."""
    model = make_model(dtype, qk_norm="none")
    runner = runner_of(model, [resolve(model.shape)], level)
    tokens = prompt(21)
    runner.step([Piece(0, tokens, 0, 0)])
    layer = model.layers[0]
    x = layer.input_layernorm(model.embed_tokens(torch.tensor(tokens)))
    values = layer.self_attn.v_proj(x).view(21, 2, 8)
    blocks = KVBlocks(runner.blocks, 2, 8, dtype)
    keys, got = map(tensor, blocks.read(runner.tables[0, 0], 21))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.float(), values, rtol=tolerance, atol=tolerance)
    first = layer.self_attn.k_proj(x[:1]).view(1, 2, 8)  # position 0 is not rotated
    torch.testing.assert_close(keys[:1].float(), first, rtol=tolerance, atol=tolerance)
    beyond = tensor(blocks.data).view(dtype)[runner.tables[0, 0, 2:]]
    assert beyond.isnan().all()


def test_states_are_those_of_shallower_networks(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    subnets = [resolve(model.shape, depth=d) for d in (5, 3)]
    runner = runner_of(model, subnets, sequences=2)
    tokens = prompt(9)
    deep = runner.step([Piece(0, tokens, 0, 0)], states_after=(0, 3, 5))
    shallow = runner.step([Piece(1, tokens, 0, 1)], states_after=(3, 4, 5))
    assert deep.states is not None
    assert shallow.states is not None
    embedded = model.embed_tokens(torch.tensor(tokens)).float()
    assert_same_bits(deep.states[0], embedded)
    for i in range(3):
        assert_same_bits(shallow.states[i], deep.states[1])
    assert not torch.equal(deep.states[1], deep.states[2])


def test_counters_are_the_union_of_what_ran(dtype: torch.dtype) -> None:
    model = make_model(dtype, **ARCHITECTURES["ernie"])
    subnets = subnets_of(model)
    runner = runner_of(model, subnets, sequences=2)
    pieces = [Piece(0, prompt(5, seed=3), 0, 0), Piece(1, prompt(3, seed=4), 0, 1)]
    result = runner.step(pieces, logits_rows=[7], trace=True)
    c, depth = model.config, 4 // dtype.itemsize

    def packed(outputs: int, inputs: int, per_step: int = depth) -> int:
        return -(-outputs // 16) * -(-inputs // per_step) * 64

    def always_on(channels: int) -> int:
        return 2 * packed(channels, c.hidden_size) + packed(c.hidden_size, channels)

    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    attended = c.num_heads * c.head_dim
    weight_bytes = packed(c.vocab_size, c.hidden_size) + 4 * c.hidden_size
    flops = 2 * c.vocab_size * c.hidden_size + 4 * c.hidden_size
    kv_bytes = experts_run = rows_routed = 0
    assert result.topk_ids is not None
    for i in range(c.num_layers):
        active = [p for p in pieces if subnets[p.subnet].layers[i].active]
        rows = sum(len(p.tokens) for p in active)
        if not rows:
            continue
        weight_bytes += packed(qkv, c.hidden_size) + packed(c.hidden_size, attended)
        weight_bytes += 2 * 4 * c.hidden_size
        flops += rows * (2 * (qkv + attended) * c.hidden_size + 4 * 2 * c.hidden_size)
        for p in active:
            seen = sum(range(1, len(p.tokens) + 1))
            flops += 4 * seen * attended
            kv_bytes += 2 * len(p.tokens) * c.num_kv_heads * c.head_dim * dtype.itemsize
        if i in c.dense_layers:
            weight_bytes += always_on(c.dense_hidden)
            flops += rows * 6 * c.dense_hidden * c.hidden_size
            continue
        weight_bytes += always_on(c.shared_hidden) + packed(c.num_experts, c.hidden_size, 1)
        flops += rows * (6 * c.shared_hidden + 2 * c.num_experts) * c.hidden_size
        widths = torch.tensor(
            [
                subnets[p.subnet].layers[i].expert_width * model.shape.channels_per_granule
                for p in pieces
                for _ in p.tokens
            ]
        )
        ids = result.topk_ids[i]
        routed_bytes, routed_flops, _ = union_bytes(ids, widths, c.hidden_size, dtype)
        weight_bytes += routed_bytes
        flops += routed_flops
        experts_run += int((ids >= 0).sum())
        rows_routed += rows
    counters = result.counters
    assert counters.experts_run == experts_run
    assert counters.rows_routed == rows_routed
    assert counters.mean_experts == experts_run / rows_routed
    assert counters.kv_bytes == kv_bytes
    assert counters.weight_bytes == weight_bytes
    assert counters.flops == flops


def test_no_rows_give_nothing(dtype: torch.dtype, level: str) -> None:
    model = make_model(dtype)
    runner = runner_of(model, [resolve(model.shape)], level)
    result = runner.step([], trace=True, states_after=(0, 5))
    assert result.logits.shape == (0, 61)
    assert result.states is not None
    assert result.states.shape == (2, 0, 32)
    assert result.counters.weight_bytes == result.counters.flops == 0
    assert result.counters.mean_experts == 0.0
    assert runner.blocks.eq(255).all()


def test_rows_without_logits_fill_the_cache_alone(level: str) -> None:
    model = make_model(torch.float32)
    runner = runner_of(model, [resolve(model.shape)], level, sequences=2)
    tokens = prompt(20)
    none = runner.step([Piece(0, tokens[:19], 0, 0)], logits_rows=[])
    assert none.logits.shape == (0, 61)
    last = runner.step([Piece(0, tokens[19:], 19, 0)]).logits
    whole = runner.step([Piece(1, tokens, 0, 0)], logits_rows=[19, 0, 19]).logits
    assert_same_bits(last, whole[:1])
    assert_same_bits(whole[0], whole[2])


@pytest.mark.parametrize("name", ["ernie", "prime-sizes"])
def test_thread_count_changes_nothing(name: str, dtype: torch.dtype, level: str) -> None:
    """Enough rows that every phase is shared out."""
    model = make_model(dtype, max_positions=512, **ARCHITECTURES[name])
    subnets = subnets_of(model)
    results = []
    for count in (1, 2, 3):
        runner = runner_of(model, subnets, level, sequences=2, positions=420)
        pieces = [Piece(0, prompt(400), 0, 0), Piece(1, prompt(30), 0, 1)]
        results.append(runner.step(pieces, threads=count, states_after=(1, 5), trace=True))
    for other in results[1:]:
        assert_same_bits(other.logits, results[0].logits)
        assert torch.equal(other.topk_ids, results[0].topk_ids)
        assert_same_bits(other.states, results[0].states)
        assert other.counters == results[0].counters


@pytest.mark.usefixtures("threads")
def test_decoding_a_long_context_on_any_thread_count(dtype: torch.dtype, level: str) -> None:
    """One head of keys: threads share its tiles, with the bits that a prefill has on one thread."""
    model = make_model(dtype, max_positions=1024, **ARCHITECTURES["one-head-for-all"])
    subnets = subnets_of(model)
    tokens, ends = prompt(800), (509, 515)
    alone = runner_of(model, subnets, level, positions=800)
    whole = alone.step([Piece(0, tokens, 0, 0)], range(*ends), threads=1).logits
    for count in (1, 2, 5):
        runner = runner_of(model, subnets, level, sequences=2, positions=800)
        pieces = [Piece(0, tokens[: ends[0]], 0, 0), Piece(1, tokens[:300], 0, 1)]
        runner.step(pieces, [], threads=count)
        for at in range(*ends):
            pieces = [Piece(0, tokens[at : at + 1], at, 0)]
            if at % 2:
                pieces.append(Piece(1, tokens[300:301], 300, 1))
            got = runner.step(pieces, [0], threads=count).logits
            assert_same_bits(got[0], whole[at - ends[0]])


def test_calls_that_overlap_are_refused() -> None:
    model = make_model(torch.float32, max_positions=704)
    runner: Runner = runner_of(model, [resolve(model.shape)], positions=704)
    piece = Piece(0, prompt(700), 0, 0)
    alone = runner.step([piece], [0, 699], threads=1).logits
    for _ in range(20):  # a step takes long enough for one of these, on any machine
        answers: list[Tensor | str] = []

        def call(answers: list[Tensor | str] = answers) -> None:
            try:
                answers.append(runner.step([piece], [0, 699], threads=1).logits)
            except KernelError as error:
                answers.append(str(error))

        threads = [threading.Thread(target=call) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if isinstance(answer, str)]
        if refused:
            assert refused == [
                "a step of this model is already running. Make all calls from one thread."
            ]
            (got,) = (answer for answer in answers if isinstance(answer, Tensor))
            assert_same_bits(got, alone)
            return
    pytest.fail("two steps never met")
