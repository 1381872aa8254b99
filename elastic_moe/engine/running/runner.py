"""Running a batch of tokens: the same interface over the PyTorch reference and the C++ step.

A model runner knows tokens, sub-networks and cached keys and values; nothing of text, sampling or
requests. One thread at a time may call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from elastic_moe_kernels.arrays import Array, DType
from elastic_moe_kernels.step import Counters
from numpy.typing import NDArray

from elastic_moe.engine.running.paged import BlockPool, Ints, OwnedSequence, PagedSequence
from elastic_moe.errors import EngineError
from elastic_moe.model.config import ModelConfig
from elastic_moe.routing import Subnet

LogitsMode = Literal["none", "best", "last", "all"]
Floats = NDArray[np.float32]
NO_STATES: Mapping[int, Floats] = MappingProxyType({})
Progress = Callable[[int, int], None] | None


class Chunk(NamedTuple):  # a tuple: one is made for every token that is decoded
    """The next tokens of one sequence.

    Attributes:
        token_ids: (t,) at least one.
        logits: of which of them; 'best' asks for no more than the most likely token after the last.
    """

    sequence: PagedSequence
    token_ids: Sequence[int] | Ints
    logits: LogitsMode = "last"


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the routers of a step chose.

    Attributes:
        tokens_per_expert: layer -> (E,) how many tokens chose each expert.
        rows: layer -> tokens that it routed.
    """

    tokens_per_expert: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, tokens: NDArray[np.int64], rows: int) -> None:
        """Add what one layer's router chose for some rows."""
        self.tokens_per_expert[layer] = self.tokens_per_expert.get(layer, 0) + tokens
        self.rows[layer] = self.rows.get(layer, 0) + rows

    def count(self, layer: int, topk_ids: NDArray[np.int32], num_experts: int) -> None:
        """Add the choices (n, K) of one layer's router, -1 where nothing ran."""
        ids = topk_ids[topk_ids >= 0]
        self.add(layer, np.bincount(ids, minlength=num_experts), len(topk_ids))


class StepOutput(NamedTuple):  # a tuple, as Chunk
    """What one step gave.

    Attributes:
        logits: (n, V) float32, in the order of the chunks and their tokens; (0, V) if no chunk
            asked for more than the best.
        best_ids: (n,) the most likely token after each of them, the first among equals; -1 if one
            of its logits is not a number.
        experts_run: for each chunk, (token, expert) pairs that ran in all layers.
        counters: of the native step.
        states: layers done -> (T, D) float32, the residual stream of all tokens; if asked for.
        expert_counts: what the routers chose; if asked for.
    """

    logits: Floats
    best_ids: list[int]
    experts_run: list[int]
    counters: Counters | None = None
    states: Mapping[int, Floats] = NO_STATES
    expert_counts: ExpertCounts | None = None


class ModelRunner(ABC):
    """Executes steps of one loaded model.

    Attributes:
        backend: 'reference' or 'cpu'.
        config: of the model.
        dtype: what matrix inputs, keys and values are rounded to; float32 is not rounded.
        device: where the model is.
        level: the instruction-set level of the C++ kernels; None where others run.
        threads: that a call takes, at most.
    """

    backend: Literal["reference", "cpu"]
    config: ModelConfig
    dtype: DType
    device: str
    level: str | None = None
    threads: int

    def __init__(self, new_blocks: Callable[[int], Array]) -> None:
        """`new_blocks` allocates so many blocks."""
        self._own_pool = BlockPool(new_blocks)
        self._managed_pool = BlockPool(new_blocks)

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Have the calls of this thread take so many threads, at most."""

    @property
    def block_bytes(self) -> int:
        """Bytes of keys and values of 16 positions in one layer."""
        return self._own_pool.block_bytes

    def reserve(self, blocks: int) -> None:
        """Have so many blocks for scheduled sequences, which a block manager gives out."""
        self._managed_pool.reserve(blocks)

    def add(self, sequence: PagedSequence) -> None:  # noqa: B027  (nothing to do for most)
        """Learn the sub-network of a sequence that will run."""

    def remove(self, sequence: PagedSequence) -> None:  # noqa: B027
        """Forget the sub-network of a sequence that was added."""

    def open(self, subnet: Subnet, capacity: int) -> OwnedSequence:
        """A new sequence outside any scheduler, which may grow to `capacity` tokens.

        `run` takes blocks for it and advances its `num_computed_tokens`.
        """
        return OwnedSequence(subnet, capacity, self._own_pool, None)

    def run(
        self, chunks: Sequence[Chunk], *, states_after: Iterable[int] = (), trace: bool = False
    ) -> StepOutput:
        """Run the next tokens of some sequences, each under its own sub-network.

        Args:
            chunks: at most one per sequence; all of `open`, or all scheduled: then their blocks are
                allocated already, and nothing of a sequence changes.
            states_after: layer counts after which to return the residual stream.
            trace: whether to count which experts ran.
        """
        if not chunks or not isinstance(chunks[0].sequence, OwnedSequence):
            return self.execute(chunks, self._managed_pool, states_after, trace)
        for sequence, token_ids, _ in chunks:
            if not isinstance(sequence, OwnedSequence):
                raise EngineError("a step runs scheduled sequences, or others, not both.")
            if sequence.subnet_row is None:
                self.add(sequence)
            sequence.grow(len(token_ids))
        output = self.execute(chunks, self._own_pool, states_after, trace)
        for sequence, token_ids, _ in chunks:
            sequence.num_computed_tokens += len(token_ids)
        return output

    @abstractmethod
    def execute(
        self, chunks: Sequence[Chunk], pool: BlockPool, states_after: Iterable[int], trace: bool
    ) -> StepOutput:
        """Run chunks whose blocks, of `pool`, are allocated; sequences are only read."""

    @abstractmethod
    def logits(self, states: Floats) -> Floats:
        """Final norm and head: residual stream (n, D) -> (n, V) float32."""

    @abstractmethod
    def final_states(self, states: Floats) -> Floats:
        """Final norm: residual stream (n, D) -> (n, D) float32, which the head reads."""

    @abstractmethod
    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, NDArray[np.int64]]:
        """Order every expert's channels by what they contribute on a text, in place.

        Returns:
            The order in terms of the checkpoint's channels: layer -> (E, F).
        """
