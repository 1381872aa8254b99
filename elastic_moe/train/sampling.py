"""Which sub-network a training step runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.routing import ModelShape, Subnet, resolve


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How often steps run a reduced network, and which axes such a step reduces.

    Attributes:
        full: fraction of steps that run the full network (ERNIE 5.0: 0.75 to 0.80).
        depth, top_k, width, pool, threshold: chance that a reduced step reduces this axis; a draw
            that reduces none is drawn again.
        prefix: of the steps with reduced depth, the fraction that keeps the first layers; the
            others keep a random subset.
        per_layer: of the steps with reduced top_k, the fraction that draws k for each layer.
        depths: reduced depths are multiples of 1/depths of the layers.
    """

    full: float = 0.75
    depth: float = 0.5
    top_k: float = 0.35
    width: float = 0.35
    pool: float = 0.35
    threshold: float = 0.25
    prefix: float = 0.75
    per_layer: float = 0.5
    depths: int = 8


AXES = ("depth", "top_k", "width", "pool", "threshold")


def sample_subnet(
    shape: ModelShape, plan: SamplingPlan, grown: Sequence[int], rng: random.Random
) -> Subnet:
    """Draw the sub-network of one step; `grown` are the layers that the network has so far."""
    if rng.random() < plan.full:
        return resolve(shape, active_layers=grown)
    reduced: list[str] = []
    while not reduced:
        reduced = [axis for axis in AXES if rng.random() < getattr(plan, axis)]
    layers = list(grown)
    if "depth" in reduced:
        depth = max(1, round(len(layers) * rng.randint(1, plan.depths - 1) / plan.depths))
        prefix = rng.random() < plan.prefix
        layers = layers[:depth] if prefix else sorted(rng.sample(layers, depth))
    pool = shape.num_experts
    if "pool" in reduced:
        pool = shape.num_experts * rng.randint(1, 3) // 4
    most = min(shape.max_top_k, pool)
    top_k: int | list[int] = most
    if "top_k" in reduced:
        if rng.random() < plan.per_layer:
            top_k = [rng.randint(1, most) for _ in range(shape.num_layers)]
        else:
            top_k = rng.randint(1, max(1, most - 1))
    width = shape.width_granules
    if "width" in reduced:
        width = rng.randint(max(1, width // 4), max(1, width - 1))
    threshold = round(rng.uniform(0.3, 0.9), 2) if "threshold" in reduced else 0.0
    return resolve(
        shape,
        active_layers=layers,
        top_k=top_k,
        expert_width=width,
        sparsity_threshold=threshold,
        expert_pool=pool,
    )
