"""What decides a training run besides its text: stages, rates, and how sub-networks are drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_moe.errors import TrainingError
from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.train.sampling import SamplingPlan, sample_subnet

PIECE_TOKENS = 512
SAVE_EVERY_STEPS = 100


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run.

    Attributes:
        steps: optimiser steps.
        layers: how many layers the network has grown to, spread evenly over its depth. Those
            between them do not run yet; they start as the identity, so growing loses nothing, and
            each part of the depth keeps its share of what was learned (block expansion,
            arXiv:2401.02415).
        pieces: pieces of 512 tokens that a step reads.
        length: tokens of each sequence; divides 512.
    """

    steps: int
    layers: int
    pieces: int
    length: int

    @property
    def step_tokens(self) -> int:
        return self.pieces * PIECE_TOKENS

    def grown(self, num_layers: int) -> list[int]:
        """The layers that the network of this stage has: 12 of 48 are 0, 4, ..., 44."""
        return [i * num_layers // self.layers for i in range(self.layers)]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """All that decides a run. Rates warm up, stay, and fall linearly at the end.

    Attributes:
        muon_lr: rate of the layers' matrices; adam_lr: of everything else.
        decay_fraction: share of all steps in which rates fall, to `final_lr` of their value.
        balance: weight of the load-balancing loss, summed over layers.
        clip: largest gradient norm of the parameters that Adam trains.
    """

    stages: tuple[Stage, ...]
    sampling: SamplingPlan = field(default_factory=SamplingPlan)
    seed: int = 0
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    final_lr: float = 0.04
    balance: float = 0.003
    clip: float = 1.0
    save_every_steps: int = SAVE_EVERY_STEPS

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to."""
        left = step
        for stage in self.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        raise TrainingError(f"step {step} is past the plan, which has {self.total_steps} steps.")

    def lr_scale(self, step: int) -> float:
        """Factor on both rates."""
        decay_steps = max(1, round(self.total_steps * self.decay_fraction))
        left = (self.total_steps - step) / decay_steps
        return min(1.0, (step + 1) / self.warmup_steps, max(left, self.final_lr))

    def subnet(self, shape: ModelShape, step: int) -> Subnet:
        """The sub-network that a step runs: a function of seed and step."""
        rng = random.Random(f"{self.seed}/{step}")
        return sample_subnet(shape, self.sampling, self.stage(step).grown(shape.num_layers), rng)

    def work(self, step: int) -> int:
        """Tokens times layers of the first `step` steps: what the time of a run goes with."""
        done, left = 0, step
        for stage in self.stages:
            steps = min(left, stage.steps)
            done += steps * stage.step_tokens * stage.layers
            left -= steps
        return done

    def check(self, num_layers: int) -> None:
        """Refuse a plan that a model cannot follow, before its first step.

        Raises:
            TrainingError: a stage has more layers than the model.
        """
        for index, stage in enumerate(self.stages):
            if stage.layers > num_layers:
                raise TrainingError(
                    f"stage {index}: layers must be in [1, {num_layers}], got {stage.layers}. "
                    f"The network can grow to no more layers than the model has."
                )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingPlan:
        stages = tuple(Stage(**stage) for stage in data["stages"])
        sampling = SamplingPlan(**data["sampling"])
        return cls(**{**data, "stages": stages, "sampling": sampling})


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Read 'LAYERSxSTEPSxPIECESxLENGTH,...'."""
    stages = []
    for part in text.split(","):
        try:
            layers, steps, pieces, length = (int(number) for number in part.split("x"))
        except ValueError:
            raise TrainingError(
                f"stage {part!r} must be LAYERSxSTEPSxPIECESxLENGTH, such as 48x600x4x256."
            ) from None
        if min(layers, steps, pieces, length) < 1 or PIECE_TOKENS % length:
            raise TrainingError(
                f"stage {part!r}: numbers must be positive and LENGTH must divide {PIECE_TOKENS}."
            )
        stages.append(Stage(steps=steps, layers=layers, pieces=pieces, length=length))
    return tuple(stages)
