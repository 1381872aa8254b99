"""Which sub-networks a sweep measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.model.config import ElasticBlock
from elastic_moe.routing import ModelShape, Subnet, resolve, spell_float32

# Arguments of `resolve`, the letter that names them, and their name among the trained values.
AXES = {
    "depth": ("L", "depth"),
    "top_k": ("k", "top_k"),
    "expert_width": ("w", "width"),
    "sparsity_threshold": ("t", "threshold"),
    "expert_pool": ("p", "pool"),
}


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

    Width and pool only where the checkpoint was trained for them. `quick`: depth and top-k alone
    as well, instead of their product.
    """
    grid = Grid()
    grid.add(shape, {})
    depths, top_ks = _quarters(shape.num_layers), _quarters(shape.max_top_k)
    pairs = [{"depth": d, "top_k": k} for d, k in product(depths, top_ks)]
    if quick:
        pairs = [p for p in pairs if p["depth"] == depths[0] or p["top_k"] == top_ks[0]]
    for values in pairs:
        grid.add(shape, values)
    trained = elastic.trained if elastic else {}
    if "width" in trained:
        for width in _quarters(shape.width_granules):
            grid.add(shape, {"expert_width": width})
    for threshold in (0.25, 0.5, 0.75, 1.0):
        grid.add(shape, {"sparsity_threshold": threshold})
    if "pool" in trained:
        for pool in _quarters(shape.num_experts):
            grid.add(shape, {"expert_pool": pool})
    return grid


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
    full = resolve(subnet.shape)
    if subnet == full:
        return True
    if elastic is None or not subnet.is_prefix:
        return False
    values: dict[str, tuple[Any, float]] = {"depth": (subnet.depth, subnet.shape.num_layers)}
    if subnet.shape.moe_layers.intersection(subnet.active_layers):  # else nothing routes
        pool = subnet.uniform("expert_pool")
        values |= {
            "top_k": (subnet.uniform("top_k"), subnet.shape.max_top_k),
            "width": (subnet.uniform("expert_width"), subnet.shape.width_granules),
            "threshold": (subnet.uniform("sparsity_threshold"), 0.0),
            "pool": (len(pool) if pool else None, subnet.shape.num_experts),
        }
    return all(
        value == whole or (value is not None and elastic.was_trained(axis, value))
        for axis, (value, whole) in values.items()
    )


def _quarters(most: int) -> list[int]:
    """100, 75, 50 and 25 % of a count, each at least 1, without repetition."""
    return list(dict.fromkeys(max(1, round(most * part / 4)) for part in (4, 3, 2, 1)))


def _spell(values: dict[str, Any]) -> str:
    parts = []
    for axis, (letter, _) in AXES.items():
        if axis in values:
            value = values[axis]
            parts.append(
                letter
                + (
                    spell_float32(value)
                    if isinstance(value, float) and 0 <= value <= 1
                    else str(value)
                )
            )
    return "-".join(parts) or "full"
