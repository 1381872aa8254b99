"""How far requests may go on each elastic axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from elastic_moe.errors import RoutingError, ServerError
from elastic_moe.routing import LayerSubnet, ModelShape, Subnet, as_float32
from elastic_moe.routing.subnet import INACTIVE, full_layer

N = TypeVar("N", int, float)
Bounds = tuple[N | None, N | None]  # least, most; None is no bound


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator allows.

    Attributes:
        depth: how many layers run.
        top_k, expert_width, expert_pool, sparsity: of every active layer; a pool is counted.
        refuse: refuse requests beyond them; otherwise these run as near as is allowed, and their
            answers say so.
    """

    depth: Bounds[int] = (None, None)
    top_k: Bounds[int] = (None, None)
    expert_width: Bounds[int] = (None, None)
    expert_pool: Bounds[int] = (None, None)
    sparsity: Bounds[float] = (None, None)
    refuse: bool = False

    def check(self, shape: ModelShape) -> None:
        """Raise `ServerError` unless the model can obey them."""
        ranges: dict[str, tuple[float, float]] = {
            "depth": (1, shape.num_layers),
            "top_k": (1, shape.max_top_k),
            "expert_width": (1, shape.width_granules),
            "expert_pool": (1, shape.num_experts),
            "sparsity": (0.0, 1.0),
        }
        for axis, (low, high) in ranges.items():
            least, most = getattr(self, axis)
            for word, value in (("min", least), ("max", most)):
                if value is not None and not low <= value <= high:
                    raise ServerError(
                        f"{word} {axis} must be in [{low}, {high}] for this model, got {value}."
                    )
            if least is not None and most is not None and least > most:
                raise ServerError(f"min {axis} is {least}, above max {axis}, which is {most}.")
        least_k, most_pool = self.top_k[0] or 1, self.expert_pool[1]
        if most_pool is not None and least_k > most_pool:
            raise ServerError(
                f"min top_k is {least_k}, above max expert_pool, which is {most_pool}."
            )

    def apply(self, subnet: Subnet) -> Subnet:
        """The sub-network that runs where this one is asked for.

        Raises:
            RoutingError: it is beyond the limits, and these refuse.
        """
        layers = list(subnet.layers)
        self._fit_depth(subnet, layers)
        for index, layer in enumerate(layers):
            if layer.active and index in subnet.shape.moe_layers:
                layers[index] = self._fit_layer(layer, subnet.shape)
        allowed = Subnet(subnet.shape, tuple(layers))
        if self.refuse and allowed != subnet:
            parts = [
                f"{axis} {asked} (nearest that is allowed: {applied})"
                for axis, (asked, applied) in changes(subnet, allowed).items()
            ]
            raise RoutingError(f"beyond this server's limits: {', '.join(parts)}.")
        return allowed

    def _fit_depth(self, subnet: Subnet, layers: list[LayerSubnet]) -> None:
        wanted = _clamp(subnet.depth, self.depth)
        for index in subnet.active_layers[wanted:]:
            layers[index] = INACTIVE
        moe = [i for i in subnet.active_layers if i in subnet.shape.moe_layers]
        like = subnet.layers[moe[0]] if moe else full_layer(subnet.shape)
        for _ in range(wanted - subnet.depth):  # the lowest that do not run
            index = next(i for i, layer in enumerate(layers) if not layer.active)
            layers[index] = like if index in subnet.shape.moe_layers else LayerSubnet(active=True)

    def _fit_layer(self, layer: LayerSubnet, shape: ModelShape) -> LayerSubnet:
        least_k = self.top_k[0] or 1
        pool = list(layer.pool)
        wanted = max(_clamp(len(pool), self.expert_pool), least_k)
        others = (i for i in range(shape.num_experts) if i not in layer.pool)
        pool = sorted([*pool[:wanted], *(next(others) for _ in range(wanted - len(pool)))])
        top_k = min(_clamp(layer.top_k, self.top_k), len(pool))
        return replace(
            layer,
            pool=tuple(pool),
            top_k=top_k,
            min_experts=min(layer.min_experts, top_k),
            width=_clamp(layer.width, self.expert_width),
            threshold=as_float32(_clamp(layer.threshold, self.sparsity)),
        )


def _clamp(value: N, bounds: Bounds[N]) -> N:
    least, most = bounds
    if most is not None and value > most:
        return most
    return least if least is not None and value < least else value


_AXES: dict[str, Callable[[LayerSubnet], Any]] = {
    "top_k": lambda layer: layer.top_k,
    "expert_width": lambda layer: layer.width,
    "sparsity": lambda layer: layer.threshold,
    "expert_pool": lambda layer: pool_value(layer.pool),
    "min_experts": lambda layer: layer.min_experts,
}


def pool_value(pool: tuple[int, ...]) -> int | list[int]:
    """A pool as the wire has it: how many experts, or which."""
    return len(pool) if pool == tuple(range(len(pool))) else list(pool)


def values(subnet: Subnet) -> dict[str, Any]:
    """Axis -> its value; a list with one for each active layer that routes, where they differ."""
    active = [subnet.layers[i] for i in subnet.active_layers]
    routed = [layer for layer in active if layer.top_k] or active
    told: dict[str, Any] = {}
    for axis, of in _AXES.items():
        listed = [of(layer) for layer in routed]
        told[axis] = listed[0] if all(value == listed[0] for value in listed) else listed
    return told


def changes(asked: Subnet, applied: Subnet) -> dict[str, tuple[Any, Any]]:
    """Axis -> (what was asked for, what runs), where these differ."""
    before, after = ({"depth": s.depth, **values(s)} for s in (asked, applied))
    return {axis: (before[axis], after[axis]) for axis in before if before[axis] != after[axis]}
