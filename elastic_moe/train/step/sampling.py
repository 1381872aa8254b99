"""Which sub-network a training step runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.errors import RoutingError, TrainingError
from elastic_moe.routing import ModelShape, Subnet, is_name, parse_name, resolve
from elastic_moe.routing.subnet import INACTIVE

AXES = ("depth", "top_k", "width", "pool", "threshold")


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How often steps run a reduced network, and which axes such a step reduces.

    Attributes:
        full: None: every step draws each axis on its own, and reduces those that come up. A number:
            this fraction of steps runs the full network, and the others draw until an axis comes
            up, as all do that run the full network anyway.
        depth, top_k, width, pool, threshold: chance that a draw reduces this axis.
        prefix: of the steps with reduced depth, the fraction that keeps the first layers; the
            others keep a random subset.
        per_layer: of the steps with reduced top_k, the fraction that draws k for each layer.
        depths: reduced depths are multiples of 1/depths of the layers, rounded to a layer.
        fixed: the name of the one sub-network that every step runs, cut to the layers that the
            network has grown to ('full' for one that is not elastic); nothing is drawn then.

    Raises:
        TrainingError: a value is out of its range, or two of them contradict each other.

    Source: ERNIE 5.0, arXiv:2602.04705, for full : reduced of depth (75:25), pool and top_k
    (80:20); it has no width and no threshold.
    """

    full: float | None = None
    depth: float = 0.25
    top_k: float = 0.20
    width: float = 0.20
    pool: float = 0.20
    threshold: float = 0.10
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
        return resolve(shape, active_layers=grown)
    axes = _draw_axes(plan, rng)
    while not axes and (reduced or plan.full is not None):
        axes = _draw_axes(plan, rng)
    layers = list(grown)
    if "depth" in axes:
        depth = _at_depth(layers, rng.randint(1, plan.depths - 1), plan)
        prefix = rng.random() < plan.prefix
        layers = layers[:depth] if prefix else sorted(rng.sample(layers, depth))
    pool = shape.num_experts
    if "pool" in axes:
        pool = _pool(shape, rng.randint(1, 3))
    most = min(shape.max_top_k, pool)
    top_k: int | list[int] = most
    if "top_k" in axes:
        if rng.random() < plan.per_layer:
            top_k = [rng.randint(1, most) for _ in range(shape.num_layers)]
        else:
            top_k = rng.randint(1, max(1, most - 1))
    width = shape.width_granules
    if "width" in axes:
        width = rng.randint(_least_width(shape), max(1, width - 1))
    threshold = round(rng.uniform(0.3, 0.9), 2) if "threshold" in axes else 0.0
    return resolve(
        shape,
        active_layers=layers,
        top_k=top_k,
        expert_width=width,
        sparsity_threshold=threshold,
        expert_pool=pool,
    )


def smallest_subnet(shape: ModelShape, plan: SamplingPlan, grown: Sequence[int]) -> Subnet:
    """The smallest sub-network that the plan draws: the least value of every axis with a chance."""
    layers = list(grown)
    if plan.depth:
        layers = layers[: _at_depth(layers, 1, plan)]
    pool = _pool(shape, 1) if plan.pool else shape.num_experts
    return resolve(
        shape,
        active_layers=layers,
        top_k=1 if plan.top_k else min(shape.max_top_k, pool),
        expert_width=_least_width(shape) if plan.width else None,
        # Of one expert a threshold drops nothing.
        sparsity_threshold=0.9 if plan.threshold and not plan.top_k else None,
        expert_pool=pool,
    )


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


def _draw_axes(plan: SamplingPlan, rng: random.Random) -> list[str]:
    return [axis for axis in AXES if rng.random() < getattr(plan, axis)]


def _at_depth(layers: Sequence[int], parts: int, plan: SamplingPlan) -> int:
    """A reduced depth, below that of the layers where they are more than one."""
    return max(1, min(round(len(layers) * parts / plan.depths), len(layers) - 1))


def _pool(shape: ModelShape, quarters: int) -> int:
    return max(1, shape.num_experts * quarters // 4)


def _least_width(shape: ModelShape) -> int:
    return max(1, shape.width_granules // 4)
