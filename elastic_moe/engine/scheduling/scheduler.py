"""Which tokens of which sequences run next: continuous batching with chunked prefill, no tensors.

Sequences are served in the order of their arrival. In every step those that decode get their one
token first; the rest of the step's tokens goes to prompts, chunk by chunk, and to new sequences. A
long prompt leaves half of the remaining tokens to those behind it. When blocks run out, the
sequence that came last is preempted and computed again later, from its tokens. The one that came
first always proceeds, and no sequence is admitted that needs more blocks than there are, so all
finish.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from elastic_moe_kernels.constants import BLOCK_POSITIONS

from elastic_moe.engine.request import Sequence
from elastic_moe.engine.scheduling.block_manager import BlockManager, pages_for
from elastic_moe.errors import EngineError

_ARRIVAL = attrgetter("arrival")


@dataclass(slots=True)
class SchedulerOutput:
    """One step.

    Attributes:
        scheduled: sequences and how many of their next tokens run.
        preempted: sequences that lost their blocks and wait again.
    """

    scheduled: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Sequences that wait and that run. For one thread.

    It sets the progress of sequences (`num_computed_tokens`); the block manager owns their tables.

    Args:
        blocks: allocates their pages.
        max_num_batched_tokens: tokens of one step, at most; those that decode count too.
        max_num_seqs: sequences that run at once, at most.

    Attributes:
        waiting, running: in the order of their arrival.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_batched_tokens: int, max_num_seqs: int
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise EngineError(
                f"max_num_seqs must be in [1, max_num_batched_tokens], as each of them decodes one "
                f"token a step, got {max_num_seqs} and {max_num_batched_tokens}."
            )
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=_ARRIVAL)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence from its queue; its pages are free at once."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._reset(sequence)
        sequence.prompt_computed = True  # never will be: the other choices need not wait

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens, and allocate their pages."""
        output = SchedulerOutput()
        budget = self.max_num_batched_tokens
        prompts = []
        for sequence in list(self.running):
            if len(sequence.token_ids) - sequence.num_computed_tokens > 1:
                prompts.append(sequence)
            elif self._schedule_decode(sequence, output):
                output.scheduled.append((sequence, 1))
                budget -= 1
        if output.preempted:
            prompts = [sequence for sequence in prompts if sequence in self.running]
        out_of_blocks = False
        for i, sequence in enumerate(prompts):
            others = i + 1 < len(prompts) or bool(self.waiting)
            wanted = min(sequence.num_new_tokens, _share(budget, others))
            count = self._allocate(sequence, wanted)
            if count:
                output.scheduled.append((sequence, count))
                budget -= count
            if count < wanted:  # the next blocks are for this one, not for those behind it
                out_of_blocks = True
                break
        while self.running and not output.scheduled:
            # Prompts alone, each waiting for blocks of another: preempt the one that came last.
            self._preempt(self.running[-1], output)
            for sequence in self.running[:1]:
                count = self._allocate(sequence, min(sequence.num_new_tokens, budget))
                output.scheduled.extend([(sequence, count)] if count else [])
                budget -= count
        if not output.preempted and not out_of_blocks:
            self._admit(output, budget)
        return output

    def update(self, sequence: Sequence, count: int) -> None:
        """Record that so many of its tokens have run; full pages join the prefix cache."""
        sequence.num_computed_tokens += count
        computed = sequence.num_computed_tokens
        sequence.prompt_computed |= computed >= sequence.num_prompt_tokens
        full = computed // BLOCK_POSITIONS
        if full > sequence.num_published_pages:
            keys = sequence.tokens_keys(full)
            pages = sequence.block_table.pages
            for page in range(sequence.num_published_pages, full):
                self.blocks.publish(pages[page], keys[page], sequence.subnet.kv_keys)
            sequence.num_published_pages = full

    def check_integrity(self) -> None:
        """Raise `EngineError` unless queues, block tables and progress fit together."""
        tables = {s: s.block_table for s in self.running + self.waiting}
        self.blocks.check_integrity([table.pages for table in tables.values()])
        for broken, what in (
            (self.running != sorted(self.running, key=_ARRIVAL), "running is out of order"),
            (self.waiting != sorted(self.waiting, key=_ARRIVAL), "waiting is out of order"),
            (bool(set(self.running) & set(self.waiting)), "a sequence waits and runs"),
            (len(self.running) > self.max_num_seqs, "too many sequences run"),
            (
                any(tables[s].pages or s.num_computed_tokens for s in self.waiting),
                "a sequence that waits has pages",
            ),
            (
                any(s.num_computed_tokens > tables[s].num_positions for s in self.running),
                "a sequence has computed more than its pages hold",
            ),
            (
                any(len(p.blocks) < s.subnet.depth for s in self.running for p in tables[s].pages),
                "a page lacks layers of its sequence",
            ),
            (
                any(
                    tables[s].blocks[layer, i] != block
                    for s in self.running
                    for i, page in enumerate(tables[s].pages)
                    for layer, block in zip(s.subnet.active_layers, page.blocks, strict=False)
                ),
                "a block table names other blocks than its pages",
            ),
        ):
            if broken:
                raise EngineError(f"the scheduler is broken: {what}.")

    def _schedule_decode(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Allocate one token, at the cost of those that came later; False if it is preempted."""
        fits = len(sequence.block_table.pages) * BLOCK_POSITIONS > sequence.num_computed_tokens
        if fits and not output.preempted:
            return True
        while sequence in self.running:
            if self._allocate(sequence, 1):
                return True
            self._preempt(self.running[-1], output)
        return False

    def _allocate(self, sequence: Sequence, count: int) -> int:
        """Allocate pages for the next `count` tokens; how many of them have a place."""
        computed = sequence.num_computed_tokens
        depth = sequence.subnet.depth
        held = self.blocks.grow(sequence.block_table, computed + count, depth)
        return min(count, held - computed)

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        """Start waiting sequences, as long as there are tokens and blocks for them."""
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self.max_num_seqs:
                return
            if sequence.waits_for_prompt:
                continue
            total, kv_keys = len(sequence.token_ids), sequence.subnet.kv_keys
            # The last token is always computed, for its logits.
            keys = sequence.tokens_keys((total - 1) // BLOCK_POSITIONS)
            cached = self.blocks.find_prefix(keys if sequence.reads_cache else (), kv_keys)
            needed = (pages_for(total) - len(cached)) * len(kv_keys)
            available = self.blocks.available_blocks - self.blocks.idle_blocks_of(cached)
            if needed > available:
                if self.running:
                    return
                cached = []  # pages of a deeper network hold more blocks than it may need itself
            self.blocks.share(cached, sequence.block_table)
            sequence.num_computed_tokens = BLOCK_POSITIONS * len(cached)
            sequence.num_published_pages = len(cached)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_ARRIVAL)
            count = min(sequence.num_new_tokens, _share(budget, bool(self.waiting)))
            count = self._allocate(sequence, count)
            output.scheduled.append((sequence, count))
            budget -= count

    def _preempt(self, sequence: Sequence, output: SchedulerOutput) -> None:
        """Take a sequence's blocks: it keeps its tokens, and is computed again in its turn."""
        self.running.remove(sequence)
        self._reset(sequence)
        self.add(sequence)
        output.preempted.append(sequence)
        output.scheduled = [part for part in output.scheduled if part[0] is not sequence]

    def _reset(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.num_computed_tokens = sequence.num_published_pages = 0


def _share(budget: int, others: bool) -> int:
    """Tokens of the budget that a prompt may take, if others wait behind it or not."""
    return -(-budget // 2) if others else budget
