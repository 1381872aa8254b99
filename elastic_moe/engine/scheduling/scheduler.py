"""Which tokens of which sequences run next: continuous batching with chunked prefill, no tensors.

Sequences are served in the order of their arrival. In every step those that write get their one
token first; what is left of the step's tokens goes to prompts, chunk by chunk, and to newcomers. A
long prompt leaves half of what is left to those behind it. When blocks run out, the sequence that
came last is put back and computed again later, from its tokens: the one that came first always
gets on, and as no sequence is let in that needs more blocks than there are, all come to their end.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from elastic_moe.engine.scheduling.block_manager import PAGE_TOKENS, BlockManager
from elastic_moe.engine.sequence import Sequence, pages_for
from elastic_moe.errors import EngineError

_ARRIVAL = attrgetter("arrival")


@dataclass(slots=True)
class Plan:
    """One step.

    Attributes:
        parts: sequences and how many of their next tokens run.
        preempted: sequences that were put back.
    """

    parts: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Sequences that wait and that run. Not safe for use from several threads.

    Args:
        blocks: where their pages come from.
        max_step_tokens: tokens of one step, at most; those that decode count too.
        max_sequences: sequences that run at once, at most.

    Attributes:
        waiting, running: in the order of their arrival.
    """

    def __init__(self, blocks: BlockManager, *, max_step_tokens: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= max_step_tokens:
            raise EngineError(
                f"max_num_seqs must be in [1, max_num_batched_tokens], as each of them decodes one "
                f"token a step, got {max_sequences} and {max_step_tokens}."
            )
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=_ARRIVAL)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its pages are free at once."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._give_back(sequence)
        sequence.prompt_done = True

    def plan(self) -> Plan:
        """Choose the next step's tokens; their pages are there then."""
        plan = Plan()
        budget = self.max_step_tokens
        prompts = []
        for sequence in list(self.running):
            if len(sequence.token_ids) - sequence.computed > 1:
                prompts.append(sequence)
            elif self._in_turn(sequence, plan):
                plan.parts.append((sequence, 1))
                budget -= 1
        if plan.preempted:
            prompts = [sequence for sequence in prompts if sequence in self.running]
        short = False
        for i, sequence in enumerate(prompts):
            others = i + 1 < len(prompts) or bool(self.waiting)
            wanted = min(sequence.remaining, _share(budget, others))
            count = self._make_room(sequence, wanted)
            if count:
                plan.parts.append((sequence, count))
                budget -= count
            if count < wanted:  # the next blocks are for this one, not for those behind it
                short = True
                break
        while self.running and not plan.parts:
            # Prompts alone, and each waits for blocks of another: the last one gives its own.
            self._preempt(self.running[-1], plan)
            for sequence in self.running[:1]:
                count = self._make_room(sequence, min(sequence.remaining, budget))
                plan.parts.extend([(sequence, count)] if count else [])
                budget -= count
        if not plan.preempted and not short:
            self._admit(plan, budget)
        return plan

    def computed(self, sequence: Sequence, count: int) -> None:
        """Say that so many of its tokens have run; pages that are full now may be shared."""
        sequence.computed += count
        sequence.prompt_done |= sequence.computed >= sequence.prompt_tokens
        full = sequence.computed // PAGE_TOKENS
        if full > sequence.published:
            keys = sequence.tokens_keys(full)
            for page in range(sequence.published, full):
                self.blocks.publish(sequence.pages[page], keys[page], sequence.kv_keys)
            sequence.published = full

    def check_integrity(self) -> None:
        """Raise `EngineError` unless queues, pages and progress fit together."""
        self.blocks.check_integrity([s.pages for s in self.running + self.waiting])
        for broken, what in (
            (self.running != sorted(self.running, key=_ARRIVAL), "who runs is out of order"),
            (self.waiting != sorted(self.waiting, key=_ARRIVAL), "who waits is out of order"),
            (bool(set(self.running) & set(self.waiting)), "a sequence waits and runs"),
            (len(self.running) > self.max_sequences, "too many sequences run"),
            (any(s.pages or s.computed for s in self.waiting), "a sequence that waits has pages"),
            (
                any(s.computed > PAGE_TOKENS * len(s.pages) for s in self.running),
                "a sequence has computed more than its pages hold",
            ),
            (
                any(len(page.blocks) < s.depth for s in self.running for page in s.pages),
                "a page lacks layers of its sequence",
            ),
        ):
            if broken:
                raise EngineError(f"the scheduler is broken: {what}.")

    def _in_turn(self, sequence: Sequence, plan: Plan) -> bool:
        """Have room for one token, at the cost of those that came later; False if none is left."""
        if len(sequence.pages) * PAGE_TOKENS > sequence.computed and not plan.preempted:
            return True
        while sequence in self.running:
            if self._make_room(sequence, 1):
                return True
            self._preempt(self.running[-1], plan)
        return False

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Add pages for the next `count` tokens; how many of them have room."""
        while (room := len(sequence.pages) * PAGE_TOKENS - sequence.computed) < count:
            page = self.blocks.allocate(sequence.depth)
            if page is None:
                return room
            sequence.pages.append(page)
        return count

    def _admit(self, plan: Plan, budget: int) -> None:
        """Let sequences in that wait, as long as there are tokens and blocks for them."""
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self.max_sequences:
                return
            if sequence.waits:
                continue
            total = len(sequence.token_ids)
            # The last token is always computed, for its logits.
            keys = sequence.tokens_keys((total - 1) // PAGE_TOKENS)
            found = self.blocks.match(keys if sequence.reads_cache else (), sequence.kv_keys)
            needed = (pages_for(total) - len(found)) * sequence.depth
            left = self.blocks.available_blocks - self.blocks.idle_blocks_of(found)
            if needed > left:
                if self.running:
                    return
                found = []  # pages of a deeper network hold more blocks than it may need itself
            for page in found:
                self.blocks.share(page)
            sequence.pages = found
            sequence.computed = PAGE_TOKENS * len(found)
            sequence.published = len(found)
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.computed
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_ARRIVAL)
            count = min(sequence.remaining, _share(budget, bool(self.waiting)))
            count = self._make_room(sequence, count)
            plan.parts.append((sequence, count))
            budget -= count

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Put a sequence back: it keeps its tokens, and begins anew when its turn comes."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self.add(sequence)
        plan.preempted.append(sequence)
        plan.parts = [part for part in plan.parts if part[0] is not sequence]

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.published = 0


def _share(budget: int, others: bool) -> int:
    """What a prompt may take of the tokens that are left, if others wait behind it or not."""
    return -(-budget // 2) if others else budget
