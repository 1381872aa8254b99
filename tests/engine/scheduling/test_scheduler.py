"""Paging and scheduling without a model: whoever reads a block finds what belongs there."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from elastic_moe_kernels.constants import BLOCK_POSITIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.engine.generation.sampler import Sampler
from elastic_moe.engine.request import Request, Sequence
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.engine.scheduling.block_manager import BlockManager, Page, pages_for
from elastic_moe.engine.scheduling.scheduler import Scheduler, SchedulerOutput
from elastic_moe.engine.streams import BlockingOutputs
from elastic_moe.errors import EngineError
from elastic_moe.routing import Subnet, resolve
from tests.routing.shapes import MINI

FULL = resolve(MINI)


def sequence_of(number: int, prompt: list[int], subnet: Subnet, new_tokens: int) -> Sequence:
    """The first choice of a request; one more token is appended at its end."""
    params = SamplingParams(max_tokens=new_tokens + 1)
    request = Request(prompt, subnet, params, BlockingOutputs())
    request.number = number
    return choice_of(request)


def choice_of(request: Request) -> Sequence:
    detokenizer: Any = None  # no text is made here
    return request.add_sequence(Sampler(request.params, (), 0, (), 1), detokenizer)


class World:
    """Sequences that write into blocks, and a look at what they read.

    A block's position holds the tokens up to there and the layer's key: what a model's keys and
    values there are a function of.
    """

    def __init__(self, blocks: int, step_tokens: int, sequences: int, **options: bool) -> None:
        self.blocks = BlockManager(blocks, **options)
        self.scheduler = Scheduler(
            self.blocks, max_num_batched_tokens=step_tokens, max_num_seqs=sequences
        )
        self.stored: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self.goals: dict[Sequence, int] = {}
        self.steps = 0
        self.preempted = 0

    def add(self, number: int, prompt: list[int], subnet: Subnet, new_tokens: int) -> Sequence:
        sequence = sequence_of(number, prompt, subnet, new_tokens)
        assert pages_for(len(prompt) + new_tokens) * subnet.depth <= self.blocks.num_blocks
        self.goals[sequence] = len(prompt) + new_tokens
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> SchedulerOutput:
        scheduler = self.scheduler
        decoding = [s for s in scheduler.running if s.num_new_tokens == 1]
        output = scheduler.schedule()
        scheduler.check_integrity()
        self.steps += 1
        self.preempted += len(output.preempted)
        assert output.scheduled or output.preempted, "nothing ran"
        assert sum(count for _, count in output.scheduled) <= scheduler.max_num_batched_tokens
        assert len({s for s, _ in output.scheduled}) == len(output.scheduled)
        counts = dict(output.scheduled)
        for sequence in decoding:
            assert counts.get(sequence) == 1 or sequence in output.preempted
        for sequence, count in output.scheduled:
            assert 1 <= count <= sequence.num_new_tokens
            self.write(sequence, count)
        for sequence, count in output.scheduled:
            scheduler.update(sequence, count)
            self.read(sequence)
            if not sequence.num_new_tokens:
                self.end_or_go_on(sequence)
        scheduler.check_integrity()
        return output

    def end_or_go_on(self, sequence: Sequence) -> None:
        """The next token: a function of those before, as greedy decoding's."""
        sequence.token_ids.append(sum(sequence.token_ids) % 7)
        if len(sequence.token_ids) > self.goals[sequence]:
            self.scheduler.remove(sequence)
            del self.goals[sequence]

    def write(self, sequence: Sequence, count: int) -> None:
        for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + count):
            page = sequence.block_table.pages[position // BLOCK_POSITIONS]
            assert page.tokens_key is None, "what others may read is written to"
            for layer, key in enumerate(sequence.subnet.kv_keys):
                place = (page.blocks[layer], position % BLOCK_POSITIONS)
                self.stored[place] = (key, tuple(sequence.token_ids[: position + 1]))

    def read(self, sequence: Sequence) -> None:
        for position in range(sequence.num_computed_tokens):
            page = sequence.block_table.pages[position // BLOCK_POSITIONS]
            for layer, key in enumerate(sequence.subnet.kv_keys):
                found = self.stored[page.blocks[layer], position % BLOCK_POSITIONS]
                assert found == (key, tuple(sequence.token_ids[: position + 1]))

    def run_all(self, limit: int = 5000) -> None:
        while self.scheduler.busy:
            self.step()
            assert self.steps < limit, "it does not end"
        assert self.blocks.used_blocks == 0


SUBNETS = [
    resolve(MINI, depth=2),
    resolve(MINI, depth=3),
    resolve(MINI, depth=3, top_k=1),
    resolve(MINI, depth=5),
    resolve(MINI, active_layers=[0, 1, 4]),
    resolve(MINI, depth=3, expert_width=[8, 8, 4] + [8] * 45),
]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    blocks=st.integers(30, 120),
    step_tokens=st.integers(4, 70),
    caching=st.booleans(),
)
def test_random_traffic_ends_and_reads_what_it_wrote(
    seed: int, blocks: int, step_tokens: int, caching: bool
) -> None:
    """Prompts that share beginnings, six sub-networks, cancels, a cache that is too small."""
    rng = random.Random(seed)
    world = World(blocks, step_tokens, rng.randint(1, min(step_tokens, 8)), prefix_caching=caching)
    base = [rng.randrange(3) for _ in range(80)]
    live: list[Sequence] = []
    for number in range(25):
        subnet = rng.choice(SUBNETS)
        room = blocks // subnet.depth * BLOCK_POSITIONS
        prompt = base[: rng.randint(1, 60)] + [rng.randrange(3) for _ in range(rng.randint(0, 9))]
        prompt = prompt[: max(1, room - 1)]
        new = rng.randint(1, max(1, min(40, room - len(prompt))))
        if pages_for(len(prompt) + new) * subnet.depth > blocks:
            continue
        live.append(world.add(number, prompt, subnet, new))
        for _ in range(rng.randint(0, 4)):
            if world.scheduler.busy:
                world.step()
        if rng.random() < 0.2:
            victim = rng.choice(live)
            if world.goals.pop(victim, None) is not None:
                world.scheduler.remove(victim)
    world.run_all()


def test_the_traffic_above_preempts_and_shares() -> None:
    """What the property rests on: a small cache makes both happen."""
    world = World(24, 32, 6)
    for number in range(6):
        world.add(number, [1, 2, 3] * 5, SUBNETS[1], 40)
    world.run_all()
    assert world.preempted > 2
    assert world.blocks.evicted_pages > 0


def prefill(world: World, tokens: list[int], subnet: Subnet) -> Sequence:
    """Run a text to its end; its pages stay."""
    sequence = world.add(len(world.goals) + world.steps, tokens, subnet, 1)
    world.run_all()
    return sequence


TEXT = [i % 5 for i in range(100)]


@pytest.mark.parametrize(
    ("first", "then", "cached"),
    [
        (FULL, FULL, 96),
        (FULL, resolve(MINI, depth=12), 96),
        (resolve(MINI, depth=12), FULL, 0),
        (FULL, resolve(MINI, top_k=2), 0),
        (FULL, resolve(MINI, expert_width=4), 0),
        (FULL, resolve(MINI, sparsity_threshold=0.5), 0),
        (FULL, resolve(MINI, expert_pool=8), 0),
        (FULL, resolve(MINI, top_k=2, min_experts=2), 0),
        (FULL, resolve(MINI, active_layers=[0, 2]), 0),
        (resolve(MINI, top_k=2), resolve(MINI, top_k=2, depth=7), 96),
        # One layer: nothing that turns experts has touched its keys yet.
        (FULL, resolve(MINI, depth=1, top_k=1), 96),
        (FULL, resolve(MINI, depth=2, top_k=[4] + [1] * 47), 96),
        (FULL, resolve(MINI, depth=3, top_k=[4] + [1] * 47), 0),
    ],
)
def test_a_prefix_serves_who_would_have_left_the_same(
    first: Subnet, then: Subnet, cached: int
) -> None:
    world = World(2000, 512, 4)
    prefill(world, TEXT, first)
    assert prefill(world, TEXT, then).num_cached_tokens == cached
    assert prefill(world, [9, *TEXT], then).num_cached_tokens == 0


def test_the_last_token_is_computed_even_if_all_pages_are_there() -> None:
    world = World(2000, 512, 4)
    prefill(world, TEXT[:64], FULL)
    assert prefill(world, TEXT[:64], FULL).num_cached_tokens == 48
    assert prefill(world, TEXT[:65], FULL).num_cached_tokens == 64


def test_without_prefix_caching_nothing_stays() -> None:
    world = World(2000, 512, 4, prefix_caching=False)
    prefill(world, TEXT, FULL)
    assert prefill(world, TEXT, FULL).num_cached_tokens == 0
    assert world.blocks.available_blocks == 2000


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    subnet = SUBNETS[0]
    world = World(7 * subnet.depth, 512, 4)
    prefill(world, TEXT[:95], subnet)  # 6 pages, and one is free
    prefill(world, [9] * 30, subnet)  # takes 2
    assert world.blocks.evicted_pages == 1
    assert prefill(world, TEXT[:95], subnet).num_cached_tokens == 80


def test_a_text_of_fewer_layers_takes_fewer_blocks() -> None:
    used = []
    for subnet in (FULL, resolve(MINI, depth=12)):
        world = World(2000, 512, 4)
        world.add(0, TEXT, subnet, 5)
        world.step()
        used.append(world.blocks.used_blocks)
    assert used == [7 * 48, 7 * 12]


def test_pages_of_a_deeper_network_do_not_lock_a_small_cache() -> None:
    """They hold more blocks than the shallower one would need for itself."""
    world = World(2 * 48 + 12, 64, 2)
    prefill(world, TEXT[:31], FULL)
    shallow = resolve(MINI, depth=12)
    sequence = world.add(1000, TEXT[:33], shallow, 90)
    world.run_all()
    assert len(sequence.token_ids) > 120


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World(5000, 64, 4)
    long = world.add(0, [i % 3 for i in range(1000)], SUBNETS[0], 1)
    short = world.add(1, [1, 2, 3], SUBNETS[0], 1)
    world.step()
    assert short.num_computed_tokens == 3
    assert 0 < long.num_computed_tokens < 64


def test_a_long_prompt_comes_to_its_end_though_smaller_ones_keep_coming() -> None:
    """The blocks that are freed are for the one that came first."""
    world = World(960, 64, 16)
    rng = random.Random(0)
    first = world.add(0, [rng.randrange(5) for _ in range(300)], FULL, 1)
    shallow = resolve(MINI, depth=4)
    number = 0
    while first in world.goals:
        assert world.steps < 300, "it starves"
        while len(world.scheduler.waiting) < 20:
            number += 1
            prompt = [rng.randrange(5) for _ in range(20)]
            world.add(number, prompt, shallow, rng.randint(1, 22))
        world.step()


def test_those_that_write_go_on_while_prompts_are_read() -> None:
    world = World(5000, 16, 4)
    writer = world.add(0, [1, 2, 3], SUBNETS[0], 50)
    world.step()
    world.add(1, [i % 3 for i in range(200)], SUBNETS[0], 1)
    for _ in range(10):
        before = len(writer.token_ids)
        world.step()
        assert len(writer.token_ids) == before + 1


def test_who_came_last_is_put_back() -> None:
    world = World(8, 64, 4)
    order = [world.add(number, [number] * 15, SUBNETS[0], 20) for number in range(3)]
    seen: Counter[int] = Counter()
    while world.scheduler.busy:
        output = world.step()
        for sequence in output.preempted:
            seen[order.index(sequence)] += 1
    assert seen[0] == 0
    assert seen[2] > 0


def test_choices_begin_when_the_prompt_is_there() -> None:
    world = World(2000, 32, 8)
    first = world.add(0, TEXT[:50], SUBNETS[0], 3)
    others = []
    for _ in range(2):
        other = choice_of(first.request)
        world.goals[other] = 53
        world.scheduler.add(other)
        others.append(other)
    world.step()
    assert [other.num_computed_tokens for other in others] == [0, 0]
    world.run_all()
    assert [other.num_cached_tokens for other in others] == [48, 48]


def test_choices_begin_when_the_first_one_is_cancelled() -> None:
    world = World(2000, 32, 8)
    first = world.add(0, TEXT[:50], SUBNETS[0], 3)
    other = choice_of(first.request)
    world.goals[other] = 53
    world.scheduler.add(other)
    world.step()
    world.scheduler.remove(first)
    world.run_all()
    assert len(other.token_ids) == 54


def test_more_sequences_than_tokens_is_refused() -> None:
    with pytest.raises(EngineError, match="max_num_seqs must be in"):
        Scheduler(BlockManager(10), max_num_batched_tokens=4, max_num_seqs=5)


BREAK = {
    "lost": lambda m, _: m._free.pop(),
    "twice": lambda m, _: m._free.append(m._free[-1]),
    "users": lambda _, p: setattr(p, "users", p.users + 1),
    "idle-count": lambda m, _: setattr(m, "_idle_blocks", m._idle_blocks + 1),
    "key": lambda _, p: setattr(p, "tokens_key", b"other"),
    "idle": lambda m, _: m._idle.clear(),
}


@pytest.mark.parametrize("how", BREAK.values(), ids=BREAK.keys())
def test_broken_books_are_noticed(how) -> None:
    manager = BlockManager(20)
    pages = [manager.allocate(3), manager.allocate(3)]
    assert all(isinstance(page, Page) for page in pages)
    manager.publish(pages[0], b"first", (b"a", b"b", b"c"))
    manager.release(pages[:1])
    manager.check_integrity([pages[1:]])
    how(manager, pages[0])
    with pytest.raises(EngineError, match="the block manager is broken"):
        manager.check_integrity([pages[1:]])
