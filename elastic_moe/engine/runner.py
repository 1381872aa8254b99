"""Running a batch of tokens: the same interface over the PyTorch reference and the C++ step.

A runner knows tokens, sub-networks and cached keys and values; nothing of text, sampling or
requests. One thread at a time may call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from elastic_moe_kernels.step_result import Counters
from numpy.typing import NDArray
from torch import Tensor

from elastic_moe.model.cache import KVCache
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.ranking import rank_channels, reorder_channels
from elastic_moe.model.transformer import ElasticTransformer, Trace
from elastic_moe.routing import Subnet

Ints = NDArray[np.int32]
Wanted = Literal["none", "best", "last", "all"]
NO_STATES: Mapping[int, Tensor] = MappingProxyType({})
Progress = Callable[[int, int], None] | None


class SequenceState(ABC):
    """A sequence under one sub-network: how far it has come, and its keys and values.

    Attributes:
        length: tokens whose keys and values are stored.
    """

    def __init__(self, subnet: Subnet, capacity: int) -> None:
        self.subnet, self.capacity = subnet, capacity
        self.length = 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values that it holds."""


class Chunk(NamedTuple):  # a tuple: one is made for every token that is decoded
    """The next tokens of one sequence.

    Attributes:
        token_ids: (t,) at least one.
        logits: of which of them; 'best' asks for no more than the most likely token after the last.
    """

    sequence: SequenceState
    token_ids: Sequence[int] | Ints
    logits: Wanted = "last"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the routers of a step chose.

    Attributes:
        tokens: layer -> (E,) how many tokens chose each expert.
        rows: layer -> tokens that it routed.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, tokens: Tensor, rows: int) -> None:
        """Add what one layer's router chose for some rows."""
        self.tokens[layer] = self.tokens.get(layer, 0) + tokens
        self.rows[layer] = self.rows.get(layer, 0) + rows

    def count(self, layer: int, topk_ids: Tensor, num_experts: int) -> None:
        """Add the choices (n, K) of one layer's router, -1 where nothing ran."""
        ids = topk_ids[topk_ids >= 0].long()
        self.add(layer, torch.bincount(ids, minlength=num_experts).cpu(), len(topk_ids))


class StepOutput(NamedTuple):  # a tuple, as Chunk
    """What one step gave.

    Attributes:
        logits: (n, V) float32, in the order of the chunks and their tokens; (0, V) if no chunk
            asked for more than the best.
        best_ids: (n,) the most likely token after each of them, the first among equals.
        experts_run, rows_routed: sums over all layers.
        finite: whether every logit is a number.
        counters: of the native step.
        states: layers done -> (T, D) float32, the residual stream of all tokens; if asked for.
        choices: if asked for.
    """

    logits: Tensor
    best_ids: list[int]
    experts_run: int = 0
    rows_routed: int = 0
    finite: bool = True
    counters: Counters | None = None
    states: Mapping[int, Tensor] = NO_STATES
    choices: Choices | None = None


class Runner(ABC):
    """Executes steps of one loaded model.

    Attributes:
        backend: 'reference' or 'cpu'.
        config: of the model.
        dtype: what matrix inputs, keys and values are rounded to; float32 is not rounded.
        device: where logits come out.
    """

    backend: Literal["reference", "cpu"]
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def open(self, subnet: Subnet, capacity: int) -> SequenceState:
        """A new sequence that may grow to `capacity` tokens."""

    @abstractmethod
    def run(
        self, chunks: Sequence[Chunk], *, states_after: Iterable[int] = (), trace: bool = False
    ) -> StepOutput:
        """Run the next tokens of some sequences, each under its own sub-network.

        Args:
            chunks: at most one per sequence.
            states_after: layer counts after which to return the residual stream.
            trace: whether to count which experts ran.
        """

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Final norm and head: residual stream (n, D) -> (n, V) float32."""

    @abstractmethod
    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, Tensor]:
        """Order every expert's channels by what they contribute on a text, in place.

        Returns:
            The order in terms of the checkpoint's channels: layer -> (E, F).
        """


class ReferenceRunner(Runner):
    """The PyTorch model, one sequence at a time."""

    backend = "reference"

    def __init__(self, model: ElasticTransformer) -> None:
        self.model = model
        self.config = model.config
        self.dtype = model.input_dtype or torch.float32
        self.device = model.embed_tokens.weight.device

    def open(self, subnet: Subnet, capacity: int) -> SequenceState:
        return _Cached(
            subnet, capacity, KVCache(self.config.num_layers, capacity, self.model.input_dtype)
        )

    def run(
        self, chunks: Sequence[Chunk], *, states_after: Iterable[int] = (), trace: bool = False
    ) -> StepOutput:
        states: dict[int, list[Tensor]] = {layers: [] for layers in sorted(set(states_after))}
        logits = [torch.empty(0, self.config.vocab_size, device=self.device)]
        choices = Choices() if trace else None
        experts_run = rows_routed = 0
        with torch.inference_mode():
            for chunk in chunks:
                sequence = chunk.sequence
                assert isinstance(sequence, _Cached)
                seen = Trace()
                ids = torch.tensor(list(map(int, chunk.token_ids)), device=self.device)
                passes = self.model.states(
                    ids.unsqueeze(0), sequence.subnet, cache=sequence.cache, trace=seen
                )
                x = torch.empty(0)
                for layers, state in passes:
                    x = state[0]
                    if layers in states:
                        states[layers].append(x)
                sequence.length += len(ids)
                if chunk.logits != "none":
                    logits.append(self.model.logits(x if chunk.logits == "all" else x[-1:]))
                for layer in seen.layers:
                    experts_run += int((layer.topk_ids >= 0).sum())
                    rows_routed += len(layer.topk_ids)
                    if choices is not None:
                        choices.count(layer.layer, layer.topk_ids, self.config.num_experts)
            every = torch.cat(logits)
            return StepOutput(
                every if any(chunk.logits in ("last", "all") for chunk in chunks) else every[:0],
                every.numpy(force=True).argmax(-1).tolist(),
                experts_run,
                rows_routed,
                finite=bool(every.isfinite().all()),
                states={layers: torch.cat(parts) for layers, parts in states.items()},
                choices=choices,
            )

    def logits(self, states: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.logits(states)

    def rank_channels(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> dict[int, Tensor]:
        order = rank_channels(self.model, windows, progress)
        reorder_channels(self.model, order)
        return order


class _Cached(SequenceState):
    def __init__(self, subnet: Subnet, capacity: int, cache: KVCache) -> None:
        super().__init__(subnet, capacity)
        self.cache = cache

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes
