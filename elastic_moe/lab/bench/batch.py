"""Prefill and decode of a batch on any runner, for timing and comparing runners.

All of them do the same work: the logits of the last row of every sequence, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from elastic_moe_kernels.step import Counters
from numpy.typing import NDArray

from elastic_moe.engine.running.paged import PagedSequence
from elastic_moe.engine.running.runner import Chunk, ModelRunner
from elastic_moe.errors import EngineError
from elastic_moe.routing import Subnet

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Work:
    """What a call did, counted while it ran.

    Attributes:
        weight_bytes, kv_bytes: read; weights each once.
        flops: 2 per multiply-add.
        mean_experts: per token and MoE layer.
    """

    weight_bytes: int
    kv_bytes: int
    flops: int
    mean_experts: float

    @property
    def touched_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


class Batch:
    """Sequences that advance together on one runner.

    Attributes:
        backend: "cpu" or "reference".
        level: the instruction-set level that runs; None on the reference.
    """

    def __init__(self, runner: ModelRunner, *, max_new_tokens: int = 64) -> None:
        """`max_new_tokens`: decoded per sequence after its prompt, at most."""
        self.runner, self._max_new_tokens = runner, max_new_tokens
        self.backend = runner.backend
        self.level = runner.level
        self._sequences: list[PagedSequence] = []
        self._counters: Counters | None = None

    def start(self, contexts: Ids, subnet: Subnet) -> NDArray[np.float32]:
        """Forget all sequences and read these; last rows' logits (S, V)."""
        self._sequences.clear()  # their blocks are free again
        self._sequences = [
            self.runner.open(subnet, len(ids) + self._max_new_tokens) for ids in contexts
        ]
        return self._run(contexts)

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """One more token for every sequence; logits (S, V).

        Raises:
            EngineError: nothing was started, or there are not as many ids as sequences.
        """
        if len(ids) != len(self._sequences) or not ids:
            raise EngineError(
                f"{len(ids)} tokens for {len(self._sequences)} sequences. Give one for each that "
                f"start has read."
            )
        return self._run([[token] for token in ids])

    def work(self) -> Work | None:
        """What the last call did; None where nothing counts."""
        c = self._counters
        return None if c is None else Work(c.weight_bytes, c.kv_bytes, c.flops, c.mean_experts)

    def _run(self, ids: Ids) -> NDArray[np.float32]:
        chunks = [Chunk(s, part) for s, part in zip(self._sequences, ids, strict=True)]
        out = self.runner.run(chunks)
        self._counters = out.counters
        return out.logits
