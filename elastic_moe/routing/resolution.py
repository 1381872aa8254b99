"""From values of the elastic axes to the sub-network that they mean for one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.routing.axes import BOUNDS_FIRST, DEPTH, KEYS, PER_LAYER, Axis, LayerSubnet, count
from elastic_moe.routing.checks import (
    as_float32,
    as_index,
    check_integer,
    check_length,
    is_list,
    is_number,
    shorten,
)
from elastic_moe.routing.names import read_name
from elastic_moe.routing.shape import ModelShape
from elastic_moe.routing.subnet import INACTIVE, Subnet


def resolve(shape: ModelShape, /, *, max_depth: Any = None, **values: Any) -> Subnet:
    """The sub-network of a model that a choice of the axes means. None is the full value.

    Args:
        max_depth: depth that the choice was written for; must be the model's, if given.
        values: axis -> value, in any spelling of `elastic_moe.routing.axes`: one value, or one for
            each of the model's layers (values for layers that do not run or route are checked,
            then ignored). depth runs layers 0..depth-1; active_layers lists them, ascending.
            expert_pool is a count P for experts 0..P-1, a list of ids for every layer, or a list
            with such a list for each layer.

    Raises:
        RoutingError: naming field, value and allowed range.
    """
    L = shape.num_layers
    if max_depth is not None and as_index(max_depth) != L:
        raise RoutingError(
            f"max_depth is {shorten(max_depth)}, but the model has {L} layers. The configuration "
            f"was written for another depth: set max_depth to {L} or leave it out."
        )
    choice = canonical(values)
    active = _active_layers(L, choice)
    columns = {axis.name: _column(axis, choice.get(axis.name), shape) for axis in PER_LAYER}
    if any(isinstance(column, list) for column in columns.values()):
        rows = [
            _row(shape, i, {name: _at(column, i) for name, column in columns.items()})
            for i in range(L)
        ]
    else:
        rows = [_row(shape, 0, columns)] * L
    dense = LayerSubnet(active=True)
    return Subnet(
        shape,
        tuple(
            INACTIVE if i not in active else rows[i] if i in shape.moe_layers else dense
            for i in range(L)
        ),
    )


def parse_name(shape: ModelShape, name: str) -> Subnet:
    """The sub-network that a name means for this model; the inverse of `Subnet.name`.

    Raises:
        RoutingError: the text is no name, or a value is out of range.
    """
    return resolve(shape, **read_name(shape, name))


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by the axes' own names; keys that are no spelling of an axis are refused."""
    written: dict[str, str] = {}
    for key in values:
        name = KEYS.get(key)
        if name is None:
            allowed = ", ".join(sorted(set(KEYS.values())))
            raise RoutingError(f"unknown key {shorten(key)}; allowed are {allowed}.")
        if name in written:
            raise RoutingError(f"{written[name]} and {key} are both given. Keep one spelling.")
        written[name] = key
    return {name: values[key] for name, key in written.items()}


def _active_layers(L: int, choice: Mapping[str, Any]) -> set[int]:
    field, depth = str(DEPTH.members), choice.get(DEPTH.name)
    listed = choice.get(field)
    if listed is None:
        return set(range(L if depth is None else check_integer(DEPTH.name, depth, 1, L, "")))
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise RoutingError(f"{field} must list integers in [0, {L - 1}], got {shorten(listed)}.")
    chosen = [check_integer(field, layer, 0, L - 1, "") for layer in listed]
    if depth is not None and as_index(depth) != len(chosen):
        raise RoutingError(
            f"{DEPTH.name} and {field} are both given, but {DEPTH.name} is {shorten(depth)} and "
            f"{field} {shorten(chosen)} are {len(chosen)}. Keep one of them."
        )
    if not chosen:
        raise RoutingError(f"{field} is empty; 1 to {L} layers must run.")
    for before, after in pairwise(chosen):
        if after <= before:
            raise RoutingError(
                f"{field} must ascend without repetition, got {before} before {after} in "
                f"{shorten(chosen)}. Sort the list and remove repeated layers."
            )
    return set(chosen)


def _column(axis: Axis, value: Any, shape: ModelShape) -> Any:
    """One value for all layers, or a list with one for each. Sets are checked, as tuples of ids."""
    if value is None:
        value = axis.whole(shape)
    most = axis.most(shape)
    if axis.kind == "set":
        if not (is_list(value) and any(is_list(item) for item in value)):
            return _members(axis, "", value, most)
        check_length(axis.name, len(value), shape.num_layers)
        return [_members(axis, f"layer {i}: ", item, most) for i, item in enumerate(value)]
    if not is_list(value):
        return value
    check_length(axis.name, len(value), shape.num_layers)
    return list(value)


def _at(column: Any, layer: int) -> Any:
    return column[layer] if isinstance(column, list) else column


def _members(axis: Axis, where: str, value: Any, most: int) -> tuple[int, ...]:
    field = f"{where}{axis.name}"
    if not is_list(value):
        return tuple(range(check_integer(field, value, 1, most, axis.hint)))
    ids = sorted(check_integer(field, item, 0, most - 1, "It lists ids.") for item in value)
    if not ids or len(set(ids)) < len(ids):
        raise RoutingError(
            f"{field} must list 1 to {most} different expert ids, got {shorten(value)}. "
            f"For a pool per layer, write one list of ids for each layer."
        )
    return tuple(ids)


def _check_real(axis: Axis, field: str, value: Any, most: float, hint: str) -> float:
    if not (is_number(value) and axis.contains(value, most)):
        raise RoutingError(
            f"{field} must be a number in {axis.interval(most)}, got {shorten(value)}. "
            f"{hint}".rstrip()
        )
    return as_float32(float(value)) + 0.0  # -0.0 becomes 0.0


def _row(shape: ModelShape, layer: int, values: Mapping[str, Any]) -> LayerSubnet:
    """What runs in a layer, with each value checked against its range and its bounding axis."""
    row = dict(values)
    for axis in BOUNDS_FIRST:
        field, most = f"layer {layer}: {axis.name}", axis.most(shape)
        hint = axis.hint.format(most=most)
        if axis.bounded_by is not None:
            most = min(most, count(row[axis.bounded_by]))
        if axis.kind == "real":
            row[axis.name] = _check_real(axis, field, row[axis.name], most, hint)
        elif axis.kind == "count":
            row[axis.name] = check_integer(field, row[axis.name], 1, most, hint)
    return LayerSubnet(True, **row)
