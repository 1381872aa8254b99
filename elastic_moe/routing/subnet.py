"""Sub-networks: one choice of the elastic axes, layer by layer; its name and its cost.

Source: elastic depth, pool and top-k after ERNIE 5.0, arXiv:2602.04705; nested expert width after
MatFormer, arXiv:2310.07707; the threshold after NAEE, arXiv:2402.14800.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.routing.axes import DEPTH, PER_LAYER, Axis, LayerSubnet
from elastic_moe.routing.checks import check_integer
from elastic_moe.routing.names import write_name
from elastic_moe.routing.shape import ModelShape

INACTIVE = LayerSubnet(active=False)


def full_layer(shape: ModelShape | Mapping[str, int]) -> LayerSubnet:
    """What runs in a layer of experts of the whole network; of a shape, the axes' sizes do."""
    whole = {axis.name: axis.whole(shape) for axis in PER_LAYER}
    sets = {axis.name: tuple(range(whole[axis.name])) for axis in PER_LAYER if axis.kind == "set"}
    return LayerSubnet(True, **{**whole, **sets})


@dataclass(frozen=True)
class Subnet:
    """One sub-network of one model: a `LayerSubnet` for each of the model's layers.

    Equal choices are equal objects, whichever way they were written.
    """

    shape: ModelShape
    layers: tuple[LayerSubnet, ...]

    @classmethod
    def full(cls, shape: ModelShape) -> Subnet:
        """The whole network."""
        return cls(
            shape,
            tuple(
                full_layer(shape) if i in shape.moe_layers else LayerSubnet(active=True)
                for i in range(shape.num_layers)
            ),
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Subnet({self.name!r}, {self.depth} of {self.shape.num_layers} layers)"

    @cached_property
    def active_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.active)

    @property
    def depth(self) -> int:
        """How many layers run."""
        return len(self.active_layers)

    @property
    def is_prefix(self) -> bool:
        """Whether the active layers are 0..depth-1."""
        return self.active_layers == tuple(range(self.depth))

    def at_depth(self, depth: int) -> Subnet:
        """This sub-network cut to the model's first `depth` layers: an exact prefix of it."""
        check_integer("depth", depth, 1, self.shape.num_layers, "")
        if not any(layer.active for layer in self.layers[:depth]):
            raise RoutingError(
                f"depth must be above {self.active_layers[0]}, the first layer that runs in "
                f"{self.name!r}, got {depth}."
            )
        kept = [layer if i < depth else INACTIVE for i, layer in enumerate(self.layers)]
        return Subnet(self.shape, tuple(kept))

    @cached_property
    def routed_layers(self) -> tuple[int, ...]:
        """The active layers that choose among experts; the others are dense."""
        return tuple(i for i in self.active_layers if i in self.shape.moe_layers)

    def uniform(self, axis: str) -> Any:
        """The value of `axis` (a field of `LayerSubnet`) that all active MoE layers share.

        None where they differ, or where no active layer routes.
        """
        values = {getattr(self.layers[i], axis) for i in self.routed_layers}
        return values.pop() if len(values) == 1 else None

    def column(self, axis: str) -> list[Any]:
        """The value of `axis` in each of the model's layers, which `resolve` takes back.

        A layer that does not run or route has the value of the routed one before it, or else of the
        first; where none routes, all have the whole network's.
        """
        routed = self.routed_layers
        value = getattr(self.layers[routed[0]] if routed else full_layer(self.shape), axis)
        column = []
        for i, layer in enumerate(self.layers):
            if layer.active and i in self.shape.moe_layers:
                value = getattr(layer, axis)
            column.append(value)
        return column

    @cached_property
    def name(self) -> str:
        """Canonical name such as 'L36-k2-w6-t0.7-p8': what equals the full network is left out.

        `parse_name` gives the sub-network back.
        """
        values: dict[Axis, list[Any]] = {}
        if self.depth < self.shape.num_layers:
            values[DEPTH] = [self.active_layers]
        full = full_layer(self.shape)
        for axis in PER_LAYER if self.routed_layers else ():
            column = self.column(axis.name)
            if any(value != getattr(full, axis.name) for value in column):
                values[axis] = column
        return write_name(values)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the per-layer table, 64 hex digits: equal exactly for equal tables."""
        digest = hashlib.sha256(b"elastic-moe subnet 1\0" + struct.pack("<I", len(self.layers)))
        for layer in self.layers:
            digest.update(_as_bytes(layer))
        return digest.hexdigest()

    @cached_property
    def kv_keys(self) -> tuple[bytes, ...]:
        """What the keys and values of each active layer depend on beside the tokens, as digests.

        Keys of the i-th active layer depend on which layers run up to there and on what runs in
        those before it. Two sub-networks with equal i-th digests leave the same keys and values in
        their first i + 1 layers: one that is cut to a smaller depth has a prefix of these.
        """
        digest = hashlib.sha256(b"elastic-moe kv 1\0" + struct.pack("<I", len(self.layers)))
        keys = []
        for index in self.active_layers:
            digest.update(struct.pack("<I", index))
            keys.append(digest.digest())
            digest.update(_as_bytes(self.layers[index]))
        return tuple(keys)

    # Costs are per token. With a threshold they are upper bounds, unless the measured mean number
    # of experts per token and active MoE layer is given.

    @cached_property
    def active_params(self) -> int:
        """Parameters that one token uses, at most: with the head, without the look-up."""
        return round(self.active_params_at(None))

    def active_params_at(self, mean_experts: float | None) -> float:
        """Parameters that one token uses if `mean_experts` experts run; None: the upper bound."""
        shape = self.shape
        total = float(shape.hidden_size + shape.vocab_size * shape.hidden_size)  # final norm, head
        per_layer = shape.attention_params + 2 * shape.hidden_size
        for index in self.active_layers:
            layer = self.layers[index]
            total += per_layer
            if index not in shape.moe_layers:
                total += 3 * shape.hidden_size * shape.dense_hidden
                continue
            experts = layer.top_k if mean_experts is None else mean_experts
            channels = layer.expert_width * shape.channels_per_granule
            router = len(layer.expert_pool)
            total += shape.hidden_size * (router + 3 * (experts * channels + shape.shared_hidden))
        return total

    def flops_per_token(self, context: int, mean_experts: float | None = None) -> float:
        """Floating-point operations for a token that attends to `context` positions, with itself.

        Two per multiply-add: matrices, attention, router and head. A norm counts 4 per channel
        (square and sum, scale and gain). Look-up, softmax, RoPE and activations are not counted.
        """
        shape = self.shape
        stored_gains = shape.hidden_size + self.depth * (
            shape.attention_params
            - 2 * shape.hidden_size * shape.qk_channels
            + 2 * shape.hidden_size
        )
        matrices = self.active_params_at(mean_experts) - stored_gains
        normed = 0 if shape.qk_norm == "none" else shape.qk_channels
        norms = shape.hidden_size + self.depth * (2 * shape.hidden_size + normed)
        attention = self.depth * 2 * context * shape.num_heads * shape.head_dim  # QK^T and PV
        return 2 * (matrices + attention) + 4 * norms

    def weight_bytes_per_token(
        self, bytes_per_weight: int, mean_experts: float | None = None
    ) -> float:
        """Bytes of weights that decoding one sequence reads per token."""
        return self.active_params_at(mean_experts) * bytes_per_weight

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        return 2 * self.depth * self.shape.num_kv_heads * self.shape.head_dim * bytes_per_value


_CODES = {"count": "I", "real": "f"}


def _as_bytes(layer: LayerSubnet) -> bytes:
    """The layer's values in the order of the table; a set as its size and its ids."""
    form = "<?"
    numbers: list[float] = [layer.active]
    for axis in PER_LAYER:
        value = getattr(layer, axis.name)
        if axis.kind == "set":
            form += f"I{len(value)}I"
            numbers += [len(value), *value]
        else:
            form += _CODES[axis.kind]
            numbers.append(value)
    return struct.pack(form, *numbers)
