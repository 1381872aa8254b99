"""Which sub-network a training step runs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any

from elastic_moe.errors import RoutingError, TrainingError
from elastic_moe.routing import ModelShape, Subnet, is_name, parse_name, resolve
from elastic_moe.routing.axes import DEPTH, POOL, THRESHOLD, TOP_K, TRAINED, WIDTH, Axis
from elastic_moe.routing.subnet import INACTIVE

# The order in which a draw decides which axes it reduces, fixed by a run's seed: real ones last.
_DRAWN = sorted(TRAINED, key=lambda axis: axis.kind == "real")
AXES = tuple(str(axis.trained) for axis in _DRAWN)
# They take a random number at chance 0 too: the plans of checkpoints that exist replay so. Any
# other axis takes none then, so a row in the table of axes changes no draw of those plans.
_ALWAYS_TAKE_A_NUMBER = (DEPTH, TOP_K, WIDTH, THRESHOLD, POOL)
ADDED_AXES = tuple(str(axis.trained) for axis in _DRAWN if axis not in _ALWAYS_TAKE_A_NUMBER)
_REAL = (0.3, 0.9)  # where reduced values lie, in parts of the largest

if TYPE_CHECKING:

    class _Chances:
        def __init__(self, **chances: Any) -> None: ...

        def __getattr__(self, axis: str) -> float: ...

else:
    _Chances = make_dataclass(
        "_Chances",
        [(axis.trained, float, axis.chance) for axis in _DRAWN],
        frozen=True,
        slots=True,
        kw_only=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan(_Chances):
    """How often steps run a reduced network, and which axes such a step reduces.

    Attributes:
        full: None: every step draws each axis on its own, and reduces those that come up. A number:
            this fraction of steps runs the full network, and the others draw until an axis comes
            up, as all do that run the full network anyway.
        of each axis, under its key in `trained`: the chance that a draw reduces it.
        prefix: of the steps with reduced depth, the fraction that keeps the first layers; the
            others keep a random subset.
        per_layer: of the steps with reduced top_k, the fraction that draws k for each layer.
        depths: reduced depths are multiples of 1/depths of the layers, rounded to a layer.
        fixed: the name of the one sub-network that every step runs, cut to the layers that the
            network has grown to ('full' for one that is not elastic); nothing is drawn then.

    Raises:
        TrainingError: a value is out of its range, or two of them contradict each other.
    """

    full: float | None = None
    prefix: float = 0.75
    per_layer: float = 0.5
    depths: int = 8
    fixed: str = ""

    def __post_init__(self) -> None:
        for name in (*AXES, "prefix", "per_layer"):
            _check_fraction(name, getattr(self, name))
        if self.full is not None:
            _check_fraction("full", self.full)
        if not isinstance(self.depths, int) or self.depths < 2:
            raise TrainingError(f"sampling: depths must be an integer from 2, got {self.depths!r}.")
        if self.fixed and not is_name(self.fixed):
            raise TrainingError(
                f"sampling: fixed must be the name of a sub-network such as 'full', 'L9' or "
                f"'k2-p8', got {self.fixed!r}. '' draws."
            )
        if self.fixed and self.full is not None:
            raise TrainingError(
                f"sampling: full = {self.full} and fixed = {self.fixed!r} are both given, but a "
                f"fixed network is never drawn. Leave full out."
            )
        if self.full is not None and self.full < 1 and not self.can_reduce:
            raise TrainingError(
                f"sampling: full = {self.full} asks for reduced networks, but the chance of every "
                f"axis is 0. Give one of {', '.join(AXES)} a chance, or set full to 1."
            )

    @property
    def can_reduce(self) -> bool:
        """Whether a step may draw a reduced network."""
        drawn = any(getattr(self, axis) > 0 for axis in AXES)
        return drawn and not self.fixed and self.full != 1


def _check_fraction(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise TrainingError(f"sampling: {name} must be a number in [0, 1], got {value!r}.")


def sample_subnet(
    shape: ModelShape,
    plan: SamplingPlan,
    grown: Sequence[int],
    rng: random.Random,
    *,
    reduced: bool = False,
) -> Subnet:
    """Draw the sub-network of one step; `grown` are the layers that the network has so far.

    `reduced` draws until an axis comes up, whatever `plan.full` says; the plan must allow one.
    """
    if plan.fixed:
        return fixed_subnet(shape, plan.fixed, grown)
    if plan.full is not None and not reduced and rng.random() < plan.full:
        return resolve(shape, **{str(DEPTH.members): grown})
    axes = _draw_axes(plan, rng)
    while not axes and (reduced or plan.full is not None):
        axes = _draw_axes(plan, rng)
    layers = list(grown)
    if DEPTH in axes:
        depth = _at_depth(layers, rng.randint(1, plan.depths - 1), plan)
        prefix = rng.random() < plan.prefix
        layers = layers[:depth] if prefix else sorted(rng.sample(layers, depth))
    values: dict[str, Any] = {}
    for axis in _BY_KIND:
        most = _most(axis, shape, values)
        values[axis.name] = _draw(axis, shape, most, plan, rng) if axis in axes else most
    return resolve(shape, **{str(DEPTH.members): layers}, **values)


def smallest_subnet(shape: ModelShape, plan: SamplingPlan, grown: Sequence[int]) -> Subnet:
    """The smallest sub-network that the plan draws: the least value of every axis with a chance."""
    layers = list(grown)
    if plan.depth:
        layers = layers[: _at_depth(layers, 1, plan)]
    values: dict[str, Any] = {}
    for axis in _BY_KIND:
        chance = getattr(plan, str(axis.trained))
        if chance and not (axis == THRESHOLD and plan.top_k):  # of one expert it drops nothing
            values[axis.name] = _least(axis, shape)
        else:
            values[axis.name] = _most(axis, shape, values)
    return resolve(shape, **{str(DEPTH.members): layers}, **values)


# The order in which their values are drawn: sets, then the counts that they bound, then real ones.
_BY_KIND = sorted(
    (axis for axis in TRAINED if axis.per_layer),
    key=lambda axis: ("set", "count", "real").index(axis.kind),
)


def _most(axis: Axis, shape: ModelShape, values: Mapping[str, Any]) -> Any:
    """The value that reduces nothing, under what bounds the axis."""
    whole = axis.whole(shape)
    return whole if axis.bounded_by is None else min(whole, values[axis.bounded_by])


def _least(axis: Axis, shape: ModelShape) -> Any:
    """The cheapest value that training draws: 1 of top_k, a quarter of other counts and sets."""
    if axis.kind == "real":
        if axis.cheaper is None:
            return axis.whole(shape)
        return axis.most(shape) * (max(_REAL) if axis.cheaper == "higher" else min(_REAL))
    return 1 if axis == TOP_K else max(1, int(axis.most(shape)) // 4)


def _draw(axis: Axis, shape: ModelShape, most: Any, plan: SamplingPlan, rng: random.Random) -> Any:
    """A reduced value."""
    if axis.kind == "real":
        return round(axis.most(shape) * rng.uniform(*_REAL), 2)
    if axis.kind == "set":
        return max(1, int(axis.most(shape)) * rng.randint(1, 3) // 4)
    if axis == TOP_K and rng.random() < plan.per_layer:
        return [rng.randint(1, most) for _ in range(shape.num_layers)]
    return rng.randint(_least(axis, shape), max(1, most - 1))


def fixed_subnet(shape: ModelShape, name: str, grown: Sequence[int]) -> Subnet:
    """The sub-network of a name, cut to the layers that the network has grown to.

    Raises:
        TrainingError: the model has no such sub-network, or none of its layers has grown yet.
    """
    try:
        named = parse_name(shape, name)
    except RoutingError as error:
        raise TrainingError(f"sampling: fixed = {name!r}: {error}") from None
    has = set(grown)
    if not has.intersection(named.active_layers):
        raise TrainingError(
            f"sampling: fixed = {name!r} runs none of the {len(has)} layers that a stage has grown "
            f"to. Begin with more layers."
        )
    kept = (layer if i in has else INACTIVE for i, layer in enumerate(named.layers))
    return Subnet(shape, tuple(kept))


def _draw_axes(plan: SamplingPlan, rng: random.Random) -> list[Axis]:
    chances = {axis: getattr(plan, str(axis.trained)) for axis in _DRAWN}
    return [
        axis
        for axis, chance in chances.items()
        if (chance > 0 or axis in _ALWAYS_TAKE_A_NUMBER) and rng.random() < chance
    ]


def _at_depth(layers: Sequence[int], parts: int, plan: SamplingPlan) -> int:
    """A reduced depth, below that of the layers where they are more than one."""
    return max(1, min(round(len(layers) * parts / plan.depths), len(layers) - 1))
