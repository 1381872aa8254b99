"""Which sub-networks a sweep measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.model.config import ElasticBlock
from elastic_moe.routing import ModelShape, Subnet, resolve
from elastic_moe.routing.axes import AXES, DEPTH, TOP_K, TRAINED, Axis, count, was_trained
from elastic_moe.routing.checks import as_index, is_list, is_number, shorten
from elastic_moe.routing.names import write_name


@dataclass(slots=True)
class Grid:
    """The points of a sweep, and those that were asked for but that the model cannot run."""

    subnets: list[Subnet] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, shape: ModelShape, values: dict[str, Any]) -> None:
        """Add a point; absent axes are full. Repetitions are dropped, impossible ones listed."""
        try:
            subnet = resolve(shape, **values)
        except RoutingError as error:
            self.skipped.append({"name": _spell(values), "reason": str(error)})
        else:
            if subnet not in self.subnets:
                self.subnets.append(subnet)


def default_grid(shape: ModelShape, elastic: ElasticBlock | None, *, quick: bool = False) -> Grid:
    """Depth x top-k at quarters of the model's values, and every other axis alone.

    Width, pool and other axes that count only where the checkpoint was trained for them. `quick`:
    depth and top-k alone as well, instead of their product.
    """
    grid = Grid()
    grid.add(shape, {})
    depths, top_ks = _quarters(DEPTH.most(shape)), _quarters(TOP_K.most(shape))
    for depth, top_k in product(depths, top_ks):
        if not quick or depth == depths[0] or top_k == top_ks[0]:
            grid.add(shape, {DEPTH.name: depth, TOP_K.name: top_k})
    trained = elastic.trained if elastic else {}
    for axis in TRAINED:
        if axis.kind == "real":
            steps: list[Any] = [axis.most(shape) * part / 4 for part in (1, 2, 3, 4)]
        elif axis not in (DEPTH, TOP_K) and axis.trained in trained:
            steps = _quarters(axis.most(shape))
        else:
            continue
        for value in steps:
            grid.add(shape, {axis.name: value})
    return grid


def check_values(shape: ModelShape, axes: Mapping[str, Iterable[Any]]) -> None:
    """Refuse values that no sub-network of the model has, whatever the other axes are.

    Args:
        axes: argument of `resolve` -> values. Lists of ids or of layers' values are checked too.

    Raises:
        RoutingError: naming every number that is out of range, or the first list that is wrong.
    """
    problems = []
    for key, values in axes.items():
        axis = next(axis for axis in AXES if key in (axis.name, axis.members))
        wrong = []
        for value in values:
            if is_list(value):
                resolve(shape, **{key: value}, **_loosest(axis))
            elif not _in_range(axis, value, axis.most(shape)):
                wrong.append(shorten(value))
        if wrong:
            kind = "a number" if axis.kind == "real" else "an integer"
            problems.append(
                f"{axis.wire} must be {kind} in {axis.interval(axis.most(shape))}, "
                f"got {', '.join(wrong)}"
            )
    if problems:
        raise RoutingError(f"{'; '.join(problems)}. Nothing was measured: leave those values out.")


def _in_range(axis: Axis, value: Any, most: float) -> bool:
    whole = axis.kind == "real" or as_index(value) is not None
    return whole and is_number(value) and axis.contains(value, most)


def _loosest(axis: Axis) -> dict[str, Any]:
    """Least values of the axes that `axis` bounds, directly or not."""
    bounded: dict[str, Any] = {}
    for _ in AXES:
        for other in AXES:
            if other.bounded_by in (axis.name, *bounded):
                bounded[other.name] = other.least
    return bounded


def product_grid(shape: ModelShape, axes: dict[str, Sequence[Any]]) -> Grid:
    """Every combination of the values given for each axis; absent axes are full."""
    grid = Grid()
    grid.add(shape, {})
    names = list(axes)
    for values in product(*axes.values()):
        grid.add(shape, dict(zip(names, values, strict=True)))
    return grid


def groups(subnets: Sequence[Subnet]) -> list[tuple[Subnet, list[Subnet]]]:
    """Bundle sub-networks that are prefixes of one another: [(the deepest, all of them)].

    One pass over the deepest measures the whole bundle. A set of layers that is no prefix stands
    alone. The bundle of the full network comes first.
    """
    bundles: list[tuple[Subnet, list[Subnet]]] = []
    for subnet in sorted(subnets, key=lambda s: -s.depth):
        for deepest, members in bundles:
            if deepest.is_prefix and subnet.is_prefix and deepest.at_depth(subnet.depth) == subnet:
                members.append(subnet)
                break
        else:
            bundles.append((subnet, [subnet]))
    return sorted(bundles, key=lambda bundle: bundle[0].name != "full")


def is_trained(subnet: Subnet, elastic: ElasticBlock | None) -> bool:
    """Whether training drew every value that differs from the full network's."""
    if subnet == Subnet.full(subnet.shape):
        return True
    if elastic is None or not subnet.is_prefix:
        return False
    values = {DEPTH: subnet.depth}
    if subnet.routed_layers:
        values |= {axis: count(subnet.uniform(axis.name)) for axis in TRAINED if axis.per_layer}
    return all(
        was_trained(axis, value, axis.whole(subnet.shape), elastic.trained.get(str(axis.trained)))
        for axis, value in values.items()
    )


def _quarters(most: int) -> list[int]:
    """100, 75, 50 and 25 % of a count, each at least 1, without repetition."""
    return list(dict.fromkeys(max(1, round(most * part / 4)) for part in (4, 3, 2, 1)))


def _spell(values: dict[str, Any]) -> str:
    """A name of values that may be out of range, such as L60-k1-p2."""
    return write_name({axis: [values[axis.name]] for axis in AXES if axis.name in values})
