"""The same two calls on every way to run a model: read prompts, then one more token for each.

What times or compares ways to run a model uses these, so that all of them are asked for the same
work: the logits of the last row of every sequence, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from elastic_moe_kernels.step import BLOCK_POSITIONS, CpuModel, StepResult
from torch import Tensor

from elastic_moe.errors import EngineError
from elastic_moe.model.cache import KVCache
from elastic_moe.model.native import pack_model
from elastic_moe.model.transformer import ElasticTransformer, build_table
from elastic_moe.routing import Subnet

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Work:
    """What the last call did, counted while it ran.

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


class Runner(Protocol):
    """One way to run one model.

    Attributes:
        backend: "cpu" or "reference".
        level: the instruction-set level that runs; None on the reference.
    """

    backend: str
    level: str | None

    def start(self, contexts: Ids, subnet: Subnet) -> Tensor:
        """Forget all sequences and read these, all of one length; last rows' logits (S, V)."""
        ...

    def decode(self, ids: Sequence[int]) -> Tensor:
        """One more token for every sequence; logits (S, V)."""
        ...

    def work(self) -> Work | None:
        """What the last call did; None where nothing counts."""
        ...


class NativeRunner:
    """The C++ step on blocks of keys and values of its own.

    Args:
        model: is packed; may be dropped afterwards.
        sequences: most that run together.
        positions: most that a sequence has.
        level: instruction-set level; None for the strongest.

    Raises:
        KernelError: the C++ kernels are missing or do not take the model's sizes.
    """

    backend = "cpu"

    def __init__(
        self,
        model: ElasticTransformer,
        *,
        sequences: int = 16,
        positions: int = 640,
        level: str | None = None,
    ) -> None:
        self.packed: CpuModel = pack_model(model, level)
        self.level: str | None = self.packed.level
        layers = self.packed.dims.num_layers
        each = -(-positions // BLOCK_POSITIONS)
        self._blocks = self.packed.new_blocks(sequences * layers * each)
        self._block_tables = np.arange(sequences * layers * each, dtype=np.int32).reshape(
            sequences, layers, each
        )
        self._sequences = self._length = 0
        self._subnet: Subnet | None = None
        self._table = build_table([Subnet.full(model.shape)])
        self.last: StepResult | None = None

    def start(self, contexts: Ids, subnet: Subnet, *, trace: bool = False) -> Tensor:
        """As `Runner.start`; with `trace`, `last.topk_ids` tells which experts ran."""
        if subnet is not self._subnet:
            self._subnet, self._table = subnet, build_table([subnet])
        ids = np.array(contexts, dtype=np.int32)  # (S, T)
        self._sequences, self._length = ids.shape
        if self._sequences > len(self._block_tables):
            raise EngineError(
                f"this runner has room for {len(self._block_tables)} sequences, got "
                f"{self._sequences}. Make one with more."
            )
        positions = np.tile(np.arange(self._length, dtype=np.int32), self._sequences)
        sequences = np.repeat(np.arange(self._sequences, dtype=np.int32), self._length)
        last_rows = np.arange(1, self._sequences + 1, dtype=np.int32) * np.int32(self._length) - 1
        return self._step(ids.reshape(-1), positions, sequences, last_rows.astype(np.int32), trace)

    def decode(self, ids: Sequence[int], *, trace: bool = False) -> Tensor:
        """As `Runner.decode`."""
        rows = np.arange(self._sequences, dtype=np.int32)
        positions = np.full(self._sequences, self._length, dtype=np.int32)
        self._length += 1
        return self._step(np.array(ids, dtype=np.int32), positions, rows, rows, trace)

    def work(self) -> Work | None:
        """As `Runner.work`."""
        if self.last is None:
            return None
        c = self.last.counters
        return Work(c.weight_bytes, c.kv_bytes, c.flops, c.mean_experts)

    def _step(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        sequences: np.ndarray,
        logits_rows: np.ndarray,
        trace: bool,
    ) -> Tensor:
        subnets = np.zeros(len(ids), dtype=np.int32)
        self.last = self.packed.step(
            ids,
            positions,
            sequences,
            subnets,
            self._table,
            self._blocks,
            self._block_tables,
            logits_rows,
            trace=trace,
        )
        return self.last.logits


class ReferenceRunner:
    """The PyTorch model, as the oracle runs it.

    Args:
        model: runs as it is; its routing implementation is left alone.
        positions: most that a sequence has.
    """

    backend = "reference"
    level: str | None = None

    def __init__(self, model: ElasticTransformer, *, positions: int = 640) -> None:
        self.model, self._positions = model, positions
        self._cache: KVCache | None = None
        self._subnet: Subnet | None = None

    def start(self, contexts: Ids, subnet: Subnet) -> Tensor:
        """As `Runner.start`."""
        self._subnet = subnet
        self._cache = KVCache(self.model.config.num_layers, self._positions, self.model.input_dtype)
        return self._run(torch.tensor([list(ids) for ids in contexts]))

    def decode(self, ids: Sequence[int]) -> Tensor:
        """As `Runner.decode`."""
        return self._run(torch.tensor(list(ids)).unsqueeze(1))

    def work(self) -> Work | None:
        """Nothing is counted here."""
        return None

    def _run(self, ids: Tensor) -> Tensor:
        if self._subnet is None:
            raise EngineError("no sequences have been read. Call start first.")
        with torch.inference_mode():
            x = self.model.last_state(ids, self._subnet, cache=self._cache)  # (S, T, D)
            return self.model.logits(x[:, -1])  # (S, V)
