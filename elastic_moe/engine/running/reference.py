"""The PyTorch model behind the interface of `runner`: one sequence at a time, slow and readable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.constants import BLOCK_POSITIONS
from numpy.typing import NDArray
from torch import Tensor

from elastic_moe.engine.running.paged import BlockPool, PagedSequence
from elastic_moe.engine.running.runner import (
    Chunk,
    ExpertCounts,
    Floats,
    ModelRunner,
    Progress,
    StepOutput,
)
from elastic_moe.model.reference.expert_ranking import rank_channels, reorder_channels
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace


class ReferenceRunner(ModelRunner):
    """The model that everything faster is compared with."""

    backend = "reference"

    def __init__(self, model: ElasticTransformer) -> None:
        self.model = model
        self.config = model.config
        self.dtype = "float32" if model.input_dtype is None else "bfloat16"
        self._device = model.embed_tokens.weight.device
        self.device = str(self._device)
        self.threads = torch.get_num_threads()
        # A block: keys or values, 16 positions, key/value heads, channels.
        shape = (2, BLOCK_POSITIONS, self.config.num_kv_heads, self.config.head_dim)
        dtype, device = model.input_dtype or torch.float32, self._device
        super().__init__(lambda count: torch.empty((count, *shape), dtype=dtype, device=device))

    def set_threads(self, count: int) -> None:
        self.threads = count
        torch.set_num_threads(count)

    def execute(
        self, chunks: Sequence[Chunk], pool: BlockPool, states_after: Iterable[int], trace: bool
    ) -> StepOutput:
        states: dict[int, list[Tensor]] = {layers: [] for layers in sorted(set(states_after))}
        logits = [torch.empty(0, self.config.vocab_size, device=self._device)]
        expert_counts = ExpertCounts() if trace else None
        experts_run = [0] * len(chunks)
        with torch.inference_mode():
            for number, chunk in enumerate(chunks):
                seen = Trace()
                x = self._run_chunk(chunk, pool, states, seen)
                if chunk.logits != "none":
                    logits.append(self.model.logits(x if chunk.logits == "all" else x[-1:]))
                for layer in seen.layers:
                    experts_run[number] += int((layer.topk_ids >= 0).sum())
                    if expert_counts is not None:
                        ids = layer.topk_ids.numpy(force=True)
                        expert_counts.count(layer.layer, ids, self.config.num_experts)
            every = torch.cat(logits)
            best = every.argmax(-1).where(every.isfinite().all(-1), -1)
            wanted = any(chunk.logits in ("last", "all") for chunk in chunks)
            return StepOutput(
                (every if wanted else every[:0]).numpy(force=True),
                best.tolist(),
                experts_run,
                states={n: torch.cat(parts).numpy(force=True) for n, parts in states.items()},
                expert_counts=expert_counts,
            )

    def logits(self, states: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = self.model.logits(tensor(states, self._device)).numpy(force=True)
            return logits

    def final_states(self, states: Floats) -> Floats:
        with torch.inference_mode():
            normed: Floats = self.model.norm(tensor(states, self._device)).numpy(force=True)
            return normed

    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, NDArray[np.int64]]:
        order = rank_channels(self.model, windows, progress)
        reorder_channels(self.model, order)
        return {layer: channels.numpy(force=True) for layer, channels in order.items()}

    def _run_chunk(
        self, chunk: Chunk, pool: BlockPool, states: dict[int, list[Tensor]], trace: Trace
    ) -> Tensor:
        """The stream (t, D) after the last layer; also kept after the layer counts of `states`."""
        sequence = chunk.sequence
        ids = torch.tensor(list(map(int, chunk.token_ids)), device=self._device)
        cache = _BlockCache(sequence, pool)
        x = torch.empty(0)
        for layers, state in self.model.states(
            ids.unsqueeze(0), sequence.subnet, cache=cache, trace=trace
        ):
            x = state[0]
            if layers in states:
                states[layers].append(x)
        return x


class _BlockCache:
    """A sequence's blocks as the model's `Cache`."""

    def __init__(self, sequence: PagedSequence, pool: BlockPool) -> None:
        self.length = sequence.num_computed_tokens
        self._tables = torch.from_numpy(sequence.block_table.blocks).long()  # (L, B)
        self._blocks = pool.blocks

    def layer(self, index: int) -> _LayerBlocks:
        return _LayerBlocks(self._blocks, self._tables[index].to(self._blocks.device), self.length)


class _LayerBlocks:
    def __init__(self, blocks: Tensor, table: Tensor, length: int) -> None:
        self._blocks, self._table, self._length = blocks, table, length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self._length + keys.shape[2]
        at = torch.arange(self._length, end, device=self._table.device)
        block, lane = self._table[at // BLOCK_POSITIONS], at % BLOCK_POSITIONS  # (T,)
        used = self._table[: -(-end // BLOCK_POSITIONS)]
        every = []
        for side, new in enumerate((keys, values)):
            self._blocks[block, side, lane] = new[0].transpose(0, 1).to(self._blocks.dtype)
            stored = self._blocks[used, side].flatten(0, 1)[:end]  # (S, G, d)
            every.append(stored.transpose(0, 1).unsqueeze(0).to(new.dtype))  # (1, G, S, d)
        return every[0], every[1]
