"""The C++ step behind the interface of `runner`: block tables, a table of sub-networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from elastic_moe_kernels.arrays import empty
from elastic_moe_kernels.step import CpuModel, StepResult
from numpy.typing import NDArray

from elastic_moe.engine.running.batch import Decoding, flatten
from elastic_moe.engine.running.paged import BlockPool, OwnedSequence, PagedSequence
from elastic_moe.engine.running.runner import (
    NO_STATES,
    Chunk,
    ExpertCounts,
    Floats,
    ModelRunner,
    Progress,
    StepOutput,
)
from elastic_moe.errors import require_torch
from elastic_moe.model.checkpoints.checkpoint import DTypeName, load_config
from elastic_moe.model.pack import load_packed, pack_model
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import Subnet

FIRST_ANGLES = 1024


class NativeRunner(ModelRunner):
    """A packed model; steps mix sequences, chunk lengths and sub-networks freely."""

    backend = "cpu"

    def __init__(self, folder: Path, dtype: DTypeName = "auto", level: str | None = None) -> None:
        self.folder = folder
        self.config = load_config(folder)
        self.model: CpuModel = load_packed(folder, dtype=dtype, level=level)
        self.dtype = self.model.dtype
        self.level, self.threads = self.model.level, self.model.threads
        self.device = "cpu"
        # Not a method of the model: channels that are ranked make it another one.
        size = self.model.block_bytes
        super().__init__(lambda count: empty((count, size), np.uint8))
        self._angles = 0  # positions whose rotary angles the model has
        self._subnets = self.model.new_table(self.config.shape.channels_per_granule)
        self._decoding: Decoding | None = None

    def set_threads(self, count: int) -> None:
        self.threads = self.model.threads = count

    def open(self, subnet: Subnet, capacity: int) -> OwnedSequence:
        return OwnedSequence(subnet, capacity, self._own_pool, self._subnets)

    def add(self, sequence: PagedSequence) -> None:
        subnet = sequence.subnet
        sequence.subnet_row = self._subnets.add(subnet.fingerprint, subnet.layers)

    def remove(self, sequence: PagedSequence) -> None:
        if sequence.subnet_row is not None:
            self._subnets.remove(sequence.subnet_row)
            sequence.subnet_row = None

    def execute(
        self, chunks: Sequence[Chunk], pool: BlockPool, states_after: Iterable[int], trace: bool
    ) -> StepOutput:
        """As `ModelRunner.execute`; all chunks in one native step."""
        if not chunks:
            return StepOutput(np.empty((0, self.config.vocab_size), np.float32), [], [])
        wanted = sorted(set(states_after))
        result = None
        if self._decoding is not None and not wanted and not trace:
            result = self._decoding.advance(chunks, pool.blocks)
        if result is None:
            result = self._start(chunks, pool, wanted, trace)
        if not wanted and not trace:
            return StepOutput(
                result.logits, result.best_ids, result.sequence_experts, result.counters
            )
        return StepOutput(
            result.logits,
            result.best_ids,
            result.sequence_experts,
            result.counters,
            NO_STATES if result.states is None else dict(zip(wanted, result.states, strict=True)),
            None if result.topk_ids is None else self._expert_counts(chunks, result.topk_ids),
        )

    def _start(
        self, chunks: Sequence[Chunk], pool: BlockPool, wanted: list[int], trace: bool
    ) -> StepResult:
        """Run a batch that is not the one before, a token further."""
        self._decoding = None
        sizes = [len(chunk.token_ids) for chunk in chunks]
        for (sequence, _, _), size in zip(chunks, sizes, strict=True):
            self._extend_angles(sequence.num_computed_tokens + size)
        arrays = flatten(chunks, sizes)
        step = self.model.prepare(
            arrays,
            self._subnets.columns,
            pool.blocks,
            logits=any(chunk.logits in ("last", "all") for chunk in chunks),
            states_after=wanted,
            trace=trace,
        )
        result = step.run()
        if not wanted and not trace and set(sizes) == {1}:
            self._decoding = Decoding(step, chunks, arrays.block_tables, pool.blocks, self._angles)
        return result

    def _expert_counts(self, chunks: Sequence[Chunk], topk_ids: NDArray[np.int32]) -> ExpertCounts:
        """Which experts ran, from the ids (L, T, K)."""
        expert_counts = ExpertCounts()
        sizes = [len(chunk.token_ids) for chunk in chunks]
        for layer in sorted(self.config.moe_layers):
            ran = [chunk.sequence.subnet.layers[layer].active for chunk in chunks]
            if any(ran):
                rows = np.repeat(np.array(ran), sizes)
                expert_counts.count(layer, topk_ids[layer][rows], self.config.num_experts)
        return expert_counts

    def logits(self, states: Floats) -> Floats:
        return self.model.logits(states)

    def final_states(self, states: Floats) -> Floats:
        return self.model.final_states(states)

    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, NDArray[np.int64]]:
        # The reference ranks: this runs once, and packed weights are not for looking at.
        require_torch("ranking channels")
        from elastic_moe.engine.running.reference import ReferenceRunner
        from elastic_moe.model.reference.loading import load_model

        reference = ReferenceRunner(load_model(self.folder, dtype=self.dtype))
        reference.set_threads(self.threads)
        order, model = reference.rank_channels(windows, progress), reference.model
        self.model = pack_model(model, self.level)
        self.model.threads = self.threads
        self._angles = 0
        self._decoding = None
        return order

    def _extend_angles(self, positions: int) -> None:
        """Have rotary angles for so many positions; long contexts need many and are rare."""
        if positions > self._angles:
            self._angles = max(positions, 2 * self._angles, FIRST_ANGLES)
            angles = rotary_angles(self._angles, self.config.head_dim, self.config.rope_theta)
            self.model.set_angles(*angles)
