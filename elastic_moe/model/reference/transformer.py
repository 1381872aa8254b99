"""A decoder-only mixture-of-experts transformer in which every sequence runs its own sub-network.

This file and its neighbours `layers` and `moe` define what is right: everything faster is tested
against them. Shapes: B sequences, T tokens of each, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from elastic_moe_kernels.table import LayerTable, build_table
from torch import Tensor, nn

from elastic_moe.errors import EngineError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.layers import (
    MLP,
    Attention,
    LayerStore,
    Linear,
    RMSNorm,
    round_to,
)
from elastic_moe.model.reference.moe import Implementation, MoE
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import Subnet

Subnets = Subnet | Sequence[Subnet]


class Cache(Protocol):
    """Keys and values of the layers that run; the model moves `length` on."""

    length: int

    def layer(self, index: int) -> LayerStore:
        """The keys and values of a layer, by its index in the model."""


@dataclass(slots=True)
class LayerTrace:
    """What the router of one layer did; N tokens of the sequences that ran the layer."""

    layer: int
    router_logits: Tensor  # (N, E)
    topk_ids: Tensor  # (N, K), -1 where nothing ran


@dataclass(slots=True)
class Trace:
    """Collects a `LayerTrace` per MoE layer when it is passed to a forward call."""

    layers: list[LayerTrace] = field(default_factory=list)

    def mean_experts(self) -> float:
        """Experts that really ran, per token and MoE layer."""
        ran = sum(int((layer.topk_ids >= 0).sum()) for layer in self.layers)
        rows = sum(layer.topk_ids.shape[0] for layer in self.layers)
        return ran / rows if rows else 0.0


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP; each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.dense_hidden) if dense else MoE(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        table: LayerTable,
        subnet_of_row: Tensor,
        cache: LayerStore | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (B, T, D) -> x (B, T, D), and router_logits (B*T, E), topk_ids (B*T, K) of experts.

        subnet_of_row (B*T,) indexes the table; cos and sin are (T, d/2).
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        normed = self.post_attention_layernorm(x).flatten(0, 1)  # (B*T, D)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed).view_as(x), None
        out, router_logits, topk_ids = self.mlp(normed, table, subnet_of_row)
        return x + out.view_as(x), (router_logits, topk_ids)


class ElasticTransformer(nn.Module):
    """The super-network. Parameters are named as in transformers, experts are stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shape = config.shape
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, dense=i in config.dense_layers) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.input_dtype: torch.dtype | None = None

    def set_input_dtype(self, dtype: torch.dtype | None) -> None:
        """What matrix inputs, keys and values are rounded to: bfloat16, or None for no rounding."""
        for module in self.modules():
            if isinstance(module, (Linear, Attention, MoE, ElasticTransformer)):
                module.input_dtype = dtype

    def set_implementation(self, implementation: Implementation) -> None:
        """Which routing kernel runs: 'reference' (PyTorch) or 'cpu' (native)."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.implementation = implementation

    def forward(
        self,
        input_ids: Tensor,
        subnets: Subnets,
        *,
        cache: Cache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T): one sub-network for all sequences, or one for each.

        With a cache, the tokens follow those that it holds, and their keys and values join it; the
        batch and its sub-networks must then stay the same from call to call.
        """
        return self.logits(self.last_state(input_ids, subnets, cache=cache, trace=trace))

    def last_state(
        self,
        input_ids: Tensor,
        subnets: Subnets,
        *,
        cache: Cache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after the last layer, before the final norm."""
        # maxlen 1: only the last state stays alive.
        ((_, x),) = deque(self.states(input_ids, subnets, cache=cache, trace=trace), maxlen=1)
        return x

    def states(
        self,
        input_ids: Tensor,
        subnets: Subnets,
        *,
        cache: Cache | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (layers done, residual stream (B, T, D)), from 0 (the embeddings) to L.

        The state after d layers is bit for bit the last state of the sub-network cut to depth d, so
        one pass serves every depth.
        """
        B, T = input_ids.shape
        device = input_ids.device
        per_sequence = [subnets] * B if isinstance(subnets, Subnet) else list(subnets)
        if len(per_sequence) != B:
            raise EngineError(f"{len(per_sequence)} sub-networks for a batch of {B} sequences.")
        distinct = list(dict.fromkeys(per_sequence))
        for subnet in distinct:
            if subnet.shape != self.shape:
                raise EngineError(
                    f"sub-network {subnet.name!r} belongs to a model of another shape. "
                    f"Resolve it against this one's."
                )
        choices = [subnet.layers for subnet in distinct]
        shape = self.shape
        table = build_table(choices, shape.num_experts, shape.channels_per_granule).to(device)
        index = {subnet: i for i, subnet in enumerate(distinct)}
        subnet_of = torch.tensor([index[subnet] for subnet in per_sequence], device=device)  # (B,)
        start = cache.length if cache is not None else 0
        angles = rotary_angles(start + T, self.config.head_dim, self.config.rope_theta)
        cos, sin = torch.tensor(np.stack([part[start:] for part in angles]), device=device)

        embedded = self.embed_tokens(input_ids)
        x = embedded.to(torch.promote_types(embedded.dtype, torch.float32))  # (B, T, D)
        yield 0, x
        for i, layer in enumerate(self.layers):
            active = [b for b, subnet in enumerate(per_sequence) if subnet.layers[i].active]
            if active:
                # A device waits for what it is handed, so it is handed nothing where all run.
                rows = None if len(active) == B else torch.tensor(active, device=device)  # (b,)
                h = x if rows is None else x[rows]  # (b, T, D)
                chosen = subnet_of if rows is None else subnet_of[rows]  # (b,)
                subnet_of_row = chosen.repeat_interleave(T)  # (b*T,)
                layer_cache = cache.layer(i) if cache is not None else None
                h, routed = layer(h, cos, sin, table.layer(i), subnet_of_row, layer_cache)
                if trace is not None and routed is not None:
                    trace.layers.append(LayerTrace(i, *routed))
                x = h if rows is None else x.index_copy(0, rows, h)
            yield i + 1, x
        if cache is not None:
            cache.length = start + T

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: residual stream (..., D) -> logits (..., V)."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(round_to(self.norm(x), self.input_dtype), head.weight.to(x.dtype))
