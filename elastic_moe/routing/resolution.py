"""From values of the elastic axes to the sub-network that they mean for one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.routing.checks import (
    as_index,
    check_integer,
    check_threshold,
    is_list,
    shorten,
)
from elastic_moe.routing.shape import ModelShape
from elastic_moe.routing.subnet import INACTIVE, LayerSubnet, Subnet


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
    if max_depth is not None and as_index(max_depth) != L:
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
        k = check_integer(f"{where}top_k", ks[i], 1, most, hint)
        keep = check_integer(f"{where}min_experts", keeps[i], 1, k, "It cannot exceed top_k.")
        granules = shape.width_granules
        hint = f"The unit is 1/{granules} of an expert's channels."
        width = check_integer(f"{where}expert_width", widths[i], 1, granules, hint)
        threshold = check_threshold(f"{where}sparsity_threshold", thresholds[i])
        if i not in active:
            layers.append(INACTIVE)
        elif i not in shape.moe_layers:
            layers.append(LayerSubnet(active=True))
        else:
            layers.append(LayerSubnet(True, k, keep, width, threshold, pool))
    return Subnet(shape, tuple(layers))


def _layers(L: int, depth: int | None, active_layers: Iterable[int] | None) -> set[int]:
    if active_layers is None:
        return set(range(L if depth is None else check_integer("depth", depth, 1, L, "")))
    if isinstance(active_layers, (str, bytes)) or not isinstance(active_layers, Iterable):
        raise RoutingError(
            f"active_layers must list integers in [0, {L - 1}], got {shorten(active_layers)}."
        )
    chosen = [check_integer("active_layers", layer, 0, L - 1, "") for layer in active_layers]
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
    if not is_list(value):
        return [value] * L
    if len(value) != L:
        raise RoutingError(
            f"{field} lists {len(value)} values, but the model has {L} layers. "
            f"Give one value for all layers, or one for each of them."
        )
    return list(value)


def _pools(value: Any, E: int, L: int) -> list[tuple[int, ...]]:
    if is_list(value) and any(is_list(item) for item in value):
        return [
            _pool(f"layer {i}: ", item, E)
            for i, item in enumerate(_per_layer("expert_pool", value, E, L))
        ]
    return [_pool("", E if value is None else value, E)] * L


def _pool(where: str, value: Any, E: int) -> tuple[int, ...]:
    field = f"{where}expert_pool"
    if not is_list(value):
        return tuple(range(check_integer(field, value, 1, E, "It counts experts.")))
    ids = sorted(check_integer(field, item, 0, E - 1, "It lists expert ids.") for item in value)
    if not ids or len(set(ids)) < len(ids):
        raise RoutingError(
            f"{field} must list 1 to {E} different expert ids, got {shorten(value)}. "
            f"For a pool per layer, write one list of ids for each layer."
        )
    return tuple(ids)
