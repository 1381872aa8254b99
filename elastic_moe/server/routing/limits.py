"""How far requests may go on each elastic axis."""

from __future__ import annotations

from typing import Any

from elastic_moe.errors import RoutingError, ServerError
from elastic_moe.protocol.routing import changes
from elastic_moe.routing import LayerSubnet, ModelShape, Subnet, as_float32
from elastic_moe.routing.axes import BOUNDS_FIRST, DEPTH, PER_LAYER, TRAINED, Axis, count, find
from elastic_moe.routing.subnet import INACTIVE, full_layer

Bounds = tuple[Any, Any]  # least, most; None is no bound


class Limits:
    """What an operator allows.

    Args:
        refuse: refuse requests beyond them; otherwise these run as near as is allowed, and their
            answers say so.
        bounds: axis, in any spelling -> (least, most), either of them None for no bound. Depth
            counts the layers that run; the others hold for every active layer. A pool is counted.
    """

    def __init__(self, *, refuse: bool = False, **bounds: Bounds) -> None:
        self.refuse = refuse
        self._bounds = {find(spelling).name: pair for spelling, pair in bounds.items()}

    def __getitem__(self, axis: Axis | str) -> Bounds:
        """(least, most) of an axis, in any spelling."""
        name = axis.name if isinstance(axis, Axis) else find(axis).name
        return self._bounds.get(name, (None, None))

    def check(self, shape: ModelShape) -> None:
        """Raise `ServerError` unless the model can obey them."""
        for axis in TRAINED:
            largest = axis.most(shape)
            least, most = self[axis]
            for word, value in (("min", least), ("max", most)):
                if value is not None and not axis.contains(value, largest):
                    raise ServerError(
                        f"{word} {axis.wire} must be in {axis.interval(largest)} for this model, "
                        f"got {value}."
                    )
            if least is not None and most is not None and least > most:
                raise ServerError(
                    f"min {axis.wire} is {least}, above max {axis.wire}, which is {most}."
                )
        for axis in TRAINED:
            if axis.bounded_by is None:
                continue
            least, most = self[axis][0] or axis.least, self[axis.bounded_by][1]
            if most is not None and least > most:
                raise ServerError(
                    f"min {axis.wire} is {least}, above max {find(axis.bounded_by).wire}, which "
                    f"is {most}."
                )

    def apply(self, subnet: Subnet) -> Subnet:
        """The sub-network that runs where this one is requested.

        Raises:
            RoutingError: it is beyond the limits, and these refuse.
        """
        layers = list(subnet.layers)
        self._fit_depth(subnet, layers)
        fitted: dict[LayerSubnet, LayerSubnet] = {}  # most layers are alike
        for index, layer in enumerate(layers):
            if layer.active and index in subnet.shape.moe_layers:
                if layer not in fitted:
                    fitted[layer] = self._fit_layer(layer, subnet.shape)
                layers[index] = fitted[layer]
        if tuple(layers) == subnet.layers:
            return subnet  # its name and keys are known
        allowed = Subnet(subnet.shape, tuple(layers))
        if self.refuse:
            parts = [
                f"{axis} {asked} (nearest that is allowed: {applied})"
                for axis, (asked, applied) in changes(subnet, allowed).items()
            ]
            raise RoutingError(f"beyond this server's limits: {', '.join(parts)}.")
        return allowed

    def _fit_depth(self, subnet: Subnet, layers: list[LayerSubnet]) -> None:
        wanted = _clamp(subnet.depth, self[DEPTH])
        for index in subnet.active_layers[wanted:]:
            layers[index] = INACTIVE
        routed = subnet.routed_layers
        like = subnet.layers[routed[0]] if routed else full_layer(subnet.shape)
        for _ in range(wanted - subnet.depth):  # the lowest that do not run
            index = next(i for i, layer in enumerate(layers) if not layer.active)
            layers[index] = like if index in subnet.shape.moe_layers else LayerSubnet(active=True)

    def _fit_layer(self, layer: LayerSubnet, shape: ModelShape) -> LayerSubnet:
        row: dict[str, Any] = {}
        for axis in BOUNDS_FIRST:
            value, bounds = getattr(layer, axis.name), self[axis]
            if axis.kind == "set":
                # As many members as the least value of whatever they bound.
                least = [
                    self[other][0] or 1 for other in PER_LAYER if other.bounded_by == axis.name
                ]
                wanted = max(_clamp(len(value), bounds), *least, 1)
                value = _fit_set(value, wanted, axis.most(shape))
            else:
                value = _clamp(value, bounds)
                if axis.bounded_by is not None:
                    value = min(value, count(row[axis.bounded_by]))
                if axis.kind == "real":
                    value = as_float32(value)
            row[axis.name] = value
        return LayerSubnet(True, **row)


def _clamp(value: Any, bounds: Bounds) -> Any:
    least, most = bounds
    if most is not None and value > most:
        return most
    return least if least is not None and value < least else value


def _fit_set(members: tuple[int, ...], size: int, most: int) -> tuple[int, ...]:
    """The first members, or the lowest others beside them."""
    others = [i for i in range(most) if i not in members]
    return tuple(sorted([*members[:size], *others[: max(0, size - len(members))]]))
