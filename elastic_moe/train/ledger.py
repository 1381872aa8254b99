"""The ledger of a run, computed from its plan: draws per axis value, tokens, operations.

Every draw is a function of (seed, step), so the ledger needs no log.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.routing.axes import DEPTH, TRAINED, Axis, count
from elastic_moe.train.step.plan import TrainingPlan


@dataclass(slots=True)
class Ledger:
    """Sums over the first steps of a plan.

    Attributes:
        flops: forward and backward (three times forward) of every network that a step trains, and
            forward of a teacher that it does not train; attention at half a sequence.
        full_steps: steps that trained the whole network, as far as it had grown.
        draws: {axis: {value: networks trained}} in words, such as {'depth': {'24 of 48 (prefix)':
            3}}: one network in each step, the two of a split or the three of a sandwich. Of a
            network whose layers are all dense, the axes of routers say 'none routes'.
        trained: {axis: values} drawn once all layers were there; what the checkpoint may claim.
    """

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    full_steps: int = 0
    draws: dict[str, Counter[str]] = field(default_factory=dict)
    trained: dict[str, set[float]] = field(default_factory=dict)

    def draws_to_json(self) -> dict[str, dict[str, int]]:
        return {axis: dict(sorted(counts.items())) for axis, counts in self.draws.items()}

    def trained_to_json(self) -> dict[str, tuple[float, ...]]:
        return {axis: tuple(sorted(values)) for axis, values in self.trained.items()}


def replay(plan: TrainingPlan, shape: ModelShape, steps: int) -> Ledger:
    """The ledger of the first `steps` steps."""
    ledger = Ledger()
    for step in range(steps):
        stage, passes = plan.stage(step), plan.passes(shape, step)
        whole = plan.whole(shape, step)
        ledger.steps += 1
        ledger.tokens += stage.step_tokens
        ledger.full_steps += any(one.subnet == whole for one in passes)
        forwards = [(one.subnet, one.rows, 3) for one in passes]
        forwards += [(whole, rows, 1) for rows in plan.untrained_teacher(shape, step)]
        for subnet, rows, times in forwards:
            per_token = subnet.flops_per_token(stage.length // 2)
            ledger.flops += times * per_token * (rows.stop - rows.start) * stage.length
        grown = stage.grown(shape.num_layers)
        for one in passes:
            for axis, (value, words) in _values(one.subnet, grown).items():
                ledger.draws.setdefault(axis, Counter())[words] += 1
                if stage.layers == shape.num_layers and value is not None:
                    ledger.trained.setdefault(axis, set()).add(value)
    return ledger


def _values(subnet: Subnet, grown: list[int]) -> dict[str, tuple[float | None, str]]:
    """(value, words) of each axis; the value is None where a name could not ask for it."""
    kind = "prefix" if list(subnet.active_layers) == grown[: subnet.depth] else "subset"
    depth = subnet.depth if subnet.is_prefix else None
    values: dict[str, tuple[float | None, str]] = {
        str(DEPTH.trained): (depth, f"{subnet.depth} of {len(grown)} ({kind})")
    }
    for axis in TRAINED:
        if axis.per_layer:
            values[str(axis.trained)] = _value(subnet, axis)
    return values


def _value(subnet: Subnet, axis: Axis) -> tuple[float | None, str]:
    if not subnet.routed_layers:
        return None, "none routes"
    value = count(subnet.uniform(axis.name))
    if value is None:
        return None, "per layer"
    return (round(value, 2), f"{value:.2f}") if axis.kind == "real" else (value, str(value))
