"""Sub-networks: what a choice of the elastic axes means for one model, its name and its cost.

Standard library only. `ModelShape` says what a model has; `Subnet` is one choice resolved against
it, layer by layer. `resolve` builds one from values, `parse_name` from a name.

This file is long because a name, the table behind it and its cost are one contract, read together.

Source: elastic depth, pool and top-k after ERNIE 5.0, arXiv:2602.04705; nested expert width after
MatFormer, arXiv:2310.07707; the threshold after NAEE, arXiv:2402.14800.
"""

from __future__ import annotations

import hashlib
import operator
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from elastic_moe.errors import RoutingError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that the elastic axes and the cost formulas need.

    Attributes:
        max_top_k: K, the experts per token of the full network.
        expert_hidden: F, hidden channels of each expert, in `width_granules` equal granules (G).
        moe_layers: layers that route; the others run a dense MLP of `dense_hidden` channels.
        shared_hidden: hidden channels of the experts that every token runs (0 without).
        qk_norm: norms on queries and keys: none, one gain per channel of a head, or of all heads.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    max_top_k: int
    expert_hidden: int
    moe_layers: frozenset[int]
    width_granules: int = 1
    dense_hidden: int = 0
    shared_hidden: int = 0
    qk_norm: Literal["none", "head", "all"] = "none"
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.width_granules < 1 or self.expert_hidden % self.width_granules:
            raise RoutingError(
                f"width_granules must divide the expert hidden size {self.expert_hidden}, "
                f"got {self.width_granules}. Use 1 for experts that cannot be sliced."
            )

    @property
    def channels_per_granule(self) -> int:
        return self.expert_hidden // self.width_granules

    @property
    def qk_channels(self) -> int:
        """Channels of all query and key heads."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def attention_params(self) -> int:
        """Projections and norms of one layer's attention."""
        gains = {"none": 0, "head": 2 * self.head_dim, "all": self.qk_channels}[self.qk_norm]
        return 2 * self.hidden_size * self.qk_channels + gains

    @property
    def total_params(self) -> int:
        """Parameters that the checkpoint stores."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        total = embeddings + self.hidden_size
        for layer in range(self.num_layers):
            mlp = 3 * self.hidden_size * self.dense_hidden
            if layer in self.moe_layers:
                routed = self.num_experts * (3 * self.expert_hidden + 1)  # the router's row is 1
                mlp = self.hidden_size * (routed + 3 * self.shared_hidden)
            total += self.attention_params + 2 * self.hidden_size + mlp
        return total


@dataclass(frozen=True, slots=True)
class LayerSubnet:
    """What runs in one layer. Only `active` means anything where no experts are routed.

    Attributes:
        active: False makes the layer the identity, attention included.
        top_k: experts per token.
        min_experts: experts that the threshold never drops.
        width: granules of each expert's hidden channels that run.
        threshold: drop a selected expert whose score is below threshold x the token's best; a
            float32 value.
        pool: ids of the experts that may be chosen, ascending.
    """

    active: bool
    top_k: int = 0
    min_experts: int = 0
    width: int = 0
    threshold: float = 0.0
    pool: tuple[int, ...] = ()


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
        return resolve(shape)

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
        _integer("depth", depth, 1, self.shape.num_layers, "")
        if not any(layer.active for layer in self.layers[:depth]):
            raise RoutingError(
                f"depth must be above {self.active_layers[0]}, the first layer that runs in "
                f"{self.name!r}, got {depth}."
            )
        kept = [layer if i < depth else _INACTIVE for i, layer in enumerate(self.layers)]
        return Subnet(self.shape, tuple(kept))

    def uniform(self, axis: str) -> Any:
        """The value of `axis` (a field of `LayerSubnet`) that all active MoE layers share.

        None where they differ, or where no active layer routes.
        """
        moe = self.shape.moe_layers.intersection(self.active_layers)
        values = {getattr(self.layers[i], axis) for i in moe}
        return values.pop() if len(values) == 1 else None

    @cached_property
    def name(self) -> str:
        """Canonical name such as 'L36-k2-w6-t0.7-p8': what equals the full network is left out.

        'x' and 8 hex digits where layers differ in k, min_experts, width, threshold or pool, or a
        pool is no prefix of the experts: such a sub-network is built from a configuration only.
        """
        shape = self.shape
        parts: list[str] = []
        if not self.is_prefix:
            parts.append(f"Lx{sum(1 << i for i in self.active_layers):x}")
        elif self.depth < shape.num_layers:
            parts.append(f"L{self.depth}")
        if shape.moe_layers.intersection(self.active_layers):
            values = {axis: self.uniform(axis) for axis in _FULL_VALUES}
            pool = values["pool"]
            if None in values.values() or pool != tuple(range(len(pool))):
                return f"x{self.fingerprint[:8]}"
            for axis, (letter, full) in _FULL_VALUES.items():
                if values[axis] != full(shape):
                    parts.append(letter + _spell(values[axis]))
        return "-".join(parts) or "full"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the per-layer table, 64 hex digits: equal exactly for equal tables."""
        digest = hashlib.sha256(b"elastic-moe subnet 1\0" + struct.pack("<I", len(self.layers)))
        for layer in self.layers:
            numbers = (layer.top_k, layer.min_experts, layer.width, layer.threshold)
            digest.update(struct.pack("<?IIIfI", layer.active, *numbers, len(layer.pool)))
            digest.update(struct.pack(f"<{len(layer.pool)}I", *layer.pool))
        return digest.hexdigest()

    # Costs are per token. With a threshold they are upper bounds, unless the measured mean number
    # of experts per token and active MoE layer is given.

    @property
    def active_params(self) -> int:
        """Parameters that one token uses, at most: with the head, without the look-up."""
        return round(self.active_params_at(None))

    def active_params_at(self, mean_experts: float | None) -> float:
        """Parameters that one token uses if `mean_experts` experts run; None: the upper bound."""
        shape = self.shape
        total = float(shape.hidden_size + shape.vocab_size * shape.hidden_size)  # final norm, head
        for index in self.active_layers:
            layer = self.layers[index]
            total += shape.attention_params + 2 * shape.hidden_size
            if index not in shape.moe_layers:
                total += 3 * shape.hidden_size * shape.dense_hidden
                continue
            experts = layer.top_k if mean_experts is None else mean_experts
            channels = layer.width * shape.channels_per_granule
            router = len(layer.pool)
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


_INACTIVE = LayerSubnet(active=False)
_DENSE = LayerSubnet(active=True)
# Letter in a name, and value in the full network, of every axis but the layers; in a name's order.
_FULL_VALUES: dict[str, tuple[str, Callable[[ModelShape], object]]] = {
    "top_k": ("k", lambda shape: shape.max_top_k),
    "min_experts": ("m", lambda _: 1),
    "width": ("w", lambda shape: shape.width_granules),
    "threshold": ("t", lambda _: 0.0),
    "pool": ("p", lambda shape: tuple(range(shape.num_experts))),
}


def _spell(value: int | float | tuple[int, ...]) -> str:
    if isinstance(value, float):
        return spell_float32(value)
    return str(len(value) if isinstance(value, tuple) else value)


def as_float32(value: float) -> float:
    """`value` rounded to the nearest float32, which is what kernels compare with."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def spell_float32(value: float) -> str:
    """The shortest decimal, without exponent, that reads back as the same float32: '0.7'."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    text = next(text for text in texts if as_float32(float(text)) == as_float32(value))
    return format(Decimal(text), "f")


def resolve(
    shape: ModelShape,
    *,
    max_depth: int | None = None,
    depth: int | None = None,
    active_layers: Iterable[int] | None = None,
    top_k: int | Sequence[int] | None = None,
    min_experts: int | Sequence[int] | None = None,
    expert_width: int | Sequence[int] | None = None,
    sparsity_threshold: float | Sequence[float] | None = None,
    expert_pool: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Subnet:
    """The sub-network of a model that a choice of the axes means. None is the full value.

    Args:
        max_depth: depth that the choice was written for; must be the model's, if given.
        depth: run layers 0..depth-1; not together with `active_layers`.
        active_layers: the layers that run, ascending.
        top_k, min_experts, expert_width, sparsity_threshold: one value, or one for each of the
            model's layers (values for layers that do not run or route are checked, then ignored).
        expert_pool: a count P for experts 0..P-1, a list of ids for every layer, or a list with
            such a list for each layer.

    Raises:
        RoutingError: naming field, value and allowed range.
    """
    L, E = shape.num_layers, shape.num_experts
    if max_depth is not None and _index(max_depth) != L:
        raise RoutingError(
            f"max_depth is {shorten(max_depth)}, but the model has {L} layers. The configuration "
            f"was written for another depth: set max_depth to {L} or leave it out."
        )
    active = _layers(L, depth, active_layers)
    ks = _per_layer("top_k", top_k, shape.max_top_k, L)
    keeps = _per_layer("min_experts", min_experts, 1, L)
    widths = _per_layer("expert_width", expert_width, shape.width_granules, L)
    thresholds = _per_layer("sparsity_threshold", sparsity_threshold, 0.0, L)
    pools = _pools(expert_pool, E, L)

    layers = []
    for i in range(L):
        where, pool = f"layer {i}: ", pools[i]
        most = min(shape.max_top_k, len(pool))
        hint = "Lower routing_top_k or widen expert_pool."
        k = _integer(f"{where}top_k", ks[i], 1, most, hint)
        keep = _integer(f"{where}min_experts", keeps[i], 1, k, "It cannot exceed top_k.")
        granules = shape.width_granules
        hint = f"The unit is 1/{granules} of an expert's channels."
        width = _integer(f"{where}expert_width", widths[i], 1, granules, hint)
        threshold = _threshold(f"{where}sparsity_threshold", thresholds[i])
        if i not in active:
            layers.append(_INACTIVE)
        elif i not in shape.moe_layers:
            layers.append(_DENSE)
        else:
            layers.append(LayerSubnet(True, k, keep, width, threshold, pool))
    return Subnet(shape, tuple(layers))


# 9 digits are beyond any range; `int` refuses 4301.
_NAME = re.compile(
    r"(?=[^-])(?:L(?:(?P<depth>[0-9]{1,9})|x(?P<layers>[0-9a-f]+)))?(?:(?:^|-)k(?P<k>[0-9]{1,9}))?"
    r"(?:(?:^|-)m(?P<m>[0-9]{1,9}))?(?:(?:^|-)w(?P<w>[0-9]{1,9}))?"
    r"(?:(?:^|-)t(?P<t>[0-9]+(?:\.[0-9]+)?))?(?:(?:^|-)p(?P<p>[0-9]{1,9}))?"
)


def parse_name(shape: ModelShape, name: str) -> Subnet:
    """The sub-network that a name means for this model; the inverse of `Subnet.name`.

    Raises:
        RoutingError: the text is no name, or a value is out of range.
    """
    if name == "full":
        return resolve(shape)
    if re.fullmatch(r"x[0-9a-f]{8}", name):
        raise RoutingError(
            f"sub-network {name!r} has values per layer and cannot be built from its name. "
            f"Use the configuration that it came from."
        )
    match = _NAME.fullmatch(name)
    if match is None:
        raise RoutingError(
            f"{shorten(name)} is no sub-network name. Write 'full', or parts in this order, absent "
            f"parts meaning the full value: L36 (layers) k2 (top_k) m1 (min_experts) w6 "
            f"(expert_width) t0.7 (sparsity) p8 (expert_pool), joined by '-', such as "
            f"'L36-k2-w6-t0.7-p8'."
        )
    part: dict[str, str | None] = match.groupdict()
    bits = f"{int(part['layers'], 16):b}" if part["layers"] else ""
    numbers = {
        key: int(text)
        for key, text in part.items()
        if text and key in ["depth", "k", "m", "w", "p"]
    }
    return resolve(
        shape,
        depth=numbers.get("depth"),
        active_layers=[i for i, bit in enumerate(reversed(bits)) if bit == "1"] if bits else None,
        top_k=numbers.get("k"),
        min_experts=numbers.get("m"),
        expert_width=numbers.get("w"),
        sparsity_threshold=float(part["t"]) if part["t"] else None,
        expert_pool=numbers.get("p"),
    )


def _layers(L: int, depth: int | None, active_layers: Iterable[int] | None) -> set[int]:
    if active_layers is None:
        return set(range(L if depth is None else _integer("depth", depth, 1, L, "")))
    if isinstance(active_layers, (str, bytes)) or not isinstance(active_layers, Iterable):
        raise RoutingError(
            f"active_layers must list integers in [0, {L - 1}], got {shorten(active_layers)}."
        )
    chosen = [_integer("active_layers", layer, 0, L - 1, "") for layer in active_layers]
    if depth is not None:
        raise RoutingError(
            f"depth {depth} and active_layers {shorten(chosen)} are both given. Keep one of them."
        )
    if not chosen:
        raise RoutingError(f"active_layers is empty; 1 to {L} layers must run.")
    for before, after in pairwise(chosen):
        if after <= before:
            raise RoutingError(
                f"active_layers must ascend without repetition, got {before} before {after} in "
                f"{shorten(chosen)}. Sort the list and remove repeated layers."
            )
    return set(chosen)


def _per_layer(field: str, value: Any, full: Any, L: int) -> list[Any]:
    if value is None:
        return [full] * L
    if not _is_list(value):
        return [value] * L
    if len(value) != L:
        raise RoutingError(
            f"{field} lists {len(value)} values, but the model has {L} layers. "
            f"Give one value for all layers, or one for each of them."
        )
    return list(value)


def _pools(value: Any, E: int, L: int) -> list[tuple[int, ...]]:
    if _is_list(value) and any(_is_list(item) for item in value):
        return [
            _pool(f"layer {i}: ", item, E)
            for i, item in enumerate(_per_layer("expert_pool", value, E, L))
        ]
    return [_pool("", E if value is None else value, E)] * L


def _pool(where: str, value: Any, E: int) -> tuple[int, ...]:
    field = f"{where}expert_pool"
    if not _is_list(value):
        return tuple(range(_integer(field, value, 1, E, "It counts experts.")))
    ids = sorted(_integer(field, item, 0, E - 1, "It lists expert ids.") for item in value)
    if not ids or len(set(ids)) < len(ids):
        raise RoutingError(
            f"{field} must list 1 to {E} different expert ids, got {shorten(value)}. "
            f"For a pool per layer, write one list of ids for each layer."
        )
    return tuple(ids)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _index(value: Any) -> int | None:
    """`value` as an integer; None for what is none, bool and 2.0 included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _integer(field: str, value: Any, low: int, high: int, hint: str) -> int:
    number = _index(value)
    if number is None or not low <= number <= high:
        allowed = f"an integer in [{low}, {high}]"
        raise RoutingError(f"{field} must be {allowed}, got {shorten(value)}. {hint}".rstrip())
    return number


def _threshold(field: str, value: Any) -> float:
    number = (
        value if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
    )
    if not 0 <= number <= 1:
        raise RoutingError(
            f"{field} must be a number in [0, 1], got {shorten(value)}. 0 keeps every expert."
        )
    return as_float32(float(number)) + 0.0  # -0.0 becomes 0.0


def shorten(value: object) -> str:
    """`repr` for an error message: at most 80 characters, and it fails on no number."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= 80 else text[:77] + "..."
