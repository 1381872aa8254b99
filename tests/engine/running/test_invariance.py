"""Batch invariance of the C++ step, bit for bit: alone, among strangers, in chunks, on any threads.

The oracle is the same sequence run alone, in one chunk, on one thread; that it is right is shown by
tests/model/test_pack.py. Strangers are other sequences under random sub-networks of their own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import BITS
from elastic_moe_kernels.step import PreparedStep, StepResult
from numpy.typing import NDArray

from elastic_moe.config import resolve_routing
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.engine.running.runner import Chunk
from elastic_moe.routing import ModelShape, Subnet, resolve

pytestmark = [
    pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed"),
    pytest.mark.usefixtures("threads"),
]

TOKENS = 300  # more than one tile of 256 positions
DTYPES = ["float32", "bfloat16"]


@cache
def runner_of(folder: Path, dtype: str, level: str) -> NativeRunner:
    return NativeRunner(folder, dtype, level)


@pytest.fixture(params=[(d, level) for d in DTYPES for level in native.levels()], ids="-".join)
def runner(tiny_folder: Path, request: pytest.FixtureRequest) -> NativeRunner:
    return runner_of(tiny_folder, *request.param)


def random_subnet(shape: ModelShape, rng: np.random.Generator) -> Subnet:
    """Any layers, and k, min_experts, width, threshold and pool of each."""
    L, E = shape.num_layers, shape.num_experts
    pools = [
        sorted(rng.choice(E, size=rng.integers(1, E + 1), replace=False).tolist()) for _ in range(L)
    ]
    ks = [int(rng.integers(1, min(shape.max_top_k, len(pool)) + 1)) for pool in pools]
    active = rng.random(L) < 0.7
    active[rng.integers(L)] = True
    return resolve(
        shape,
        active_layers=np.flatnonzero(active).tolist(),
        top_k=ks,
        min_experts=[int(rng.integers(1, k + 1)) for k in ks],
        expert_width=[int(rng.integers(1, shape.width_granules + 1)) for _ in range(L)],
        sparsity_threshold=[float(rng.choice([0.0, 0.3, 0.7, 1.0])) for _ in range(L)],
        expert_pool=pools,
    )


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, 4096, count).tolist()


def alone(
    runner: NativeRunner, subnet: Subnet, ids: list[int], threads: int = 1
) -> NDArray[np.float32]:
    """Logits (T, V) of one sequence in one chunk."""
    runner.set_threads(threads)
    return runner.run([Chunk(runner.open(subnet, len(ids)), ids, "all")]).logits


SUBNETS = ["full", "L4-k2", "Lx29-k1", "w1", "t0.7-p5", "L5-k2-w3-t0.5-p6"]


@pytest.mark.parametrize("name", SUBNETS)
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_of_any_size_give_the_bits_of_the_whole(
    runner: NativeRunner, name: str, threads: int
) -> None:
    subnet = resolve_routing(runner.config.shape, name)
    ids = random_ids(np.random.default_rng(1), TOKENS)
    want = alone(runner, subnet, ids)
    runner.set_threads(threads)
    for size in (1, 7, 64, TOKENS):
        sequence = runner.open(subnet, len(ids))
        parts = [
            runner.run([Chunk(sequence, ids[start : start + size], "all")]).logits
            for start in range(0, len(ids), size)
        ]
        assert np.array_equal(np.concatenate(parts), want), f"chunks of {size}"


@pytest.mark.parametrize("threads", [1, 2])
def test_every_one_of_33_sequences_gets_the_bits_that_it_gets_alone(
    runner: NativeRunner, threads: int
) -> None:
    """Prefill chunks and single tokens mixed, steps of other make-up each time."""
    rng = np.random.default_rng(2)
    shape = runner.config.shape
    subnets = [resolve(shape)] + [random_subnet(shape, rng) for _ in range(32)]
    texts = [random_ids(rng, int(rng.integers(20, 60))) for _ in subnets]
    want = [alone(runner, s, ids) for s, ids in zip(subnets, texts, strict=True)]
    assert len({s.fingerprint for s in subnets}) == 33

    runner.set_threads(threads)
    sequences = [runner.open(s, len(ids)) for s, ids in zip(subnets, texts, strict=True)]
    got: list[list[NDArray[np.float32]]] = [[] for _ in subnets]
    shared = 0
    while any(s.num_computed_tokens < len(ids) for s, ids in zip(sequences, texts, strict=True)):
        who = [
            i
            for i in rng.permutation(len(subnets)).tolist()
            if sequences[i].num_computed_tokens < len(texts[i]) and rng.random() < 0.9
        ]
        if not who:
            continue
        chunks = []
        for i in who:
            start = sequences[i].num_computed_tokens
            size = int(rng.choice([1, 1, 1, 2, 5, 13]))
            chunks.append(Chunk(sequences[i], texts[i][start : start + size], "all"))
        out = runner.run(chunks)
        shared += len(chunks) > 16
        parts = np.split(out.logits, np.cumsum([len(chunk.token_ids) for chunk in chunks])[:-1])
        for i, part in zip(who, parts, strict=True):
            got[i].append(part)
    assert shared > 3, "most of them must have shared steps"
    for i, parts in enumerate(got):
        assert np.array_equal(np.concatenate(parts), want[i]), subnets[i]


def test_two_sequences_with_exchanged_subnetworks_are_told_apart(runner: NativeRunner) -> None:
    """What the comparison above rests on: these tokens under another k give other bits."""
    shape = runner.config.shape
    ids = random_ids(np.random.default_rng(3), 24)
    one, two = resolve(shape, top_k=1), resolve(shape, top_k=2)
    out = runner.run(
        [Chunk(runner.open(one, 24), ids, "all"), Chunk(runner.open(two, 24), ids, "all")]
    ).logits
    assert np.array_equal(out[:24], alone(runner, one, ids))
    assert np.array_equal(out[24:], alone(runner, two, ids))
    assert not np.array_equal(out[:24], out[24:])


def test_a_shallower_network_may_go_on_from_the_cache_of_a_deeper_one(
    runner: NativeRunner,
) -> None:
    """Layers 0..d-1 of a prefix are the same network, so their keys and values are too."""
    shape = runner.config.shape
    ids = random_ids(np.random.default_rng(4), 40)
    deep, shallow = resolve(shape, top_k=2), resolve(shape, depth=3, top_k=2)
    ahead = runner.open(deep, 40)
    runner.run([Chunk(ahead, ids[:30], "none")])
    sequence = runner.open(shallow, 40)
    sequence.grow(30)
    tables = ahead.block_table.blocks[:3, :2]
    blocks = runner._own_pool.blocks
    blocks[sequence.block_table.blocks[:3, :2].flatten()] = blocks[tables.flatten()]
    sequence.num_computed_tokens = 30
    got = runner.run([Chunk(sequence, ids[30:], "all")]).logits
    assert np.array_equal(got, alone(runner, shallow, ids)[30:])


def test_what_no_row_uses_is_not_read(runner: NativeRunner) -> None:
    """Poison in idle layers, idle experts, channels beyond the width: nothing changes."""
    shape = runner.config.shape
    subnet = resolve(shape, active_layers=[0, 2, 3], expert_pool=[1, 4, 6], top_k=2, expert_width=3)
    ids = random_ids(np.random.default_rng(5), 30)
    want = alone(runner, subnet, ids, threads=2)
    model = runner.model
    saved = {
        i: (model._packed[i][0].data.copy(), model._packed[i][3].data.copy()) for i in range(6)
    }
    try:
        for i in range(6):
            qkv, experts = model._packed[i][0], model._packed[i][3]
            if not subnet.layers[i].active:
                qkv.data.fill(0xFF)  # NaN in either dtype
                experts.data.fill(0xFF)
                continue
            each = experts.data.reshape(shape.num_experts, -1)
            for e in set(range(shape.num_experts)) - {1, 4, 6}:
                each[e].fill(0xFF)
            # Twelve of sixteen channels run. They are one panel, so gate and up are read whole
            # and what is beyond is set to 0; of down, the steps behind the twelfth are not read.
            steps = 16 * BITS[model.dtype].itemsize // 4
            down = each[:, -2 * steps * 64 :].reshape(shape.num_experts, 2, steps, 64)
            down[:, :, 12 * BITS[model.dtype].itemsize // 4 :].fill(0xFF)
            assert np.shares_memory(down, experts.data)
        assert np.array_equal(alone(runner, subnet, ids, threads=2), want)
        with_them = alone(runner, resolve(shape, active_layers=[0, 2, 3]), ids)
        assert np.isnan(with_them).any(), "the poison must be where a full layer reads it"
    finally:
        for i, (qkv, experts) in saved.items():
            model._packed[i][0].data[:] = qkv
            model._packed[i][3].data[:] = experts


def test_blocks_hold_nothing_of_whom_they_belonged_to(runner: NativeRunner) -> None:
    """NaN and infinity in every block that is free."""
    shape = runner.config.shape
    ids = random_ids(np.random.default_rng(6), 70)
    want = alone(runner, resolve(shape), ids)
    runner._own_pool.blocks.fill(0xFF)
    assert np.array_equal(alone(runner, resolve(shape), ids), want)


def test_counters_are_the_union_that_the_routing_ids_tell(runner: NativeRunner) -> None:
    """Weight bytes of a mixed step, computed again from the experts that ran."""
    rng = np.random.default_rng(7)
    config, shape = runner.config, runner.config.shape
    size = BITS[runner.dtype].itemsize
    for _ in range(10):
        # One of them runs every layer, so that idle layers are those of the first alone.
        subnets = [random_subnet(shape, rng) for _ in range(5)]
        chunks = [Chunk(runner.open(s, 9), random_ids(rng, 9), "last") for s in subnets]
        out = runner.run(chunks, trace=True)
        assert out.counters is not None
        D, V = config.hidden_size, config.vocab_size
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        want = V * D * size + 4 * D
        experts_run = rows = 0
        result = _trace(runner, subnets, chunks)
        for layer in range(shape.num_layers):
            active = [s for s in range(5) if subnets[s].layers[layer].active]
            if not active:
                continue
            want += (heads + config.num_heads * config.head_dim) * D * size
            router = -(-shape.num_experts // 16) * 16  # whole panels
            want += router * D * 4 + 4 * (2 * D + 2 * config.head_dim)
            widest: dict[int, int] = {}
            for s in active:
                ids = result[layer, 9 * s : 9 * s + 9]
                channels = subnets[s].layers[layer].expert_width * shape.channels_per_granule
                rows += 9
                for e in ids[ids >= 0].tolist():
                    experts_run += 1
                    widest[e] = max(widest.get(e, 0), channels)
            for c in widest.values():
                panels = -(-c // 16) * 16
                want += (2 * panels * D + D * c) * size
        assert out.counters.weight_bytes == want
        assert out.counters.experts_run == experts_run
        assert out.counters.rows_routed == rows


def _trace(runner: NativeRunner, subnets: list[Subnet], chunks: list[Chunk]) -> np.ndarray:
    """(L, T, K) routing ids of the same step, as the kernels report them."""
    seen = []
    run = PreparedStep.run

    def watched(step: PreparedStep) -> StepResult:
        seen.append(run(step))
        return seen[-1]

    again = [
        chunk._replace(sequence=runner.open(subnet, 9))
        for subnet, chunk in zip(subnets, chunks, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedStep, "run", watched)
        runner.run(again, trace=True)
    return seen[0].topk_ids


@pytest.mark.parametrize("name", ["full", "L3", "k1", "w2", "L4-k2-w3-t0.7-p5"])
def test_flops_are_those_of_the_cost_formula(runner: NativeRunner, name: str) -> None:
    subnet = resolve_routing(runner.config.shape, name)
    ids = random_ids(np.random.default_rng(8), 40)
    out = runner.run([Chunk(runner.open(subnet, 40), ids, "all")])
    assert out.counters is not None
    mean = out.experts_run[0] / out.counters.rows_routed
    want = sum(subnet.flops_per_token(context, mean) for context in range(1, 41))
    # The step computes the router's logits of all experts, whatever the pool.
    idle = runner.config.num_experts - len(subnet.uniform("expert_pool"))
    want += 2 * 40 * subnet.depth * idle * runner.config.hidden_size
    assert out.counters.flops == pytest.approx(want, rel=1e-12)
