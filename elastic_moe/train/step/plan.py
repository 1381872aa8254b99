"""What decides a training run besides its text: stages, rates, and how sub-networks are drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from elastic_moe.errors import TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.routing import ModelShape, Subnet, resolve
from elastic_moe.train.step.sampling import (
    ADDED_AXES,
    SamplingPlan,
    fixed_subnet,
    sample_subnet,
    smallest_subnet,
)
from elastic_moe.train.text import PIECE_TOKENS

PLAN = "plan.json"  # in the folder of a run
SAVE_EVERY_STEPS = 100
DTYPES = ("float32", "bfloat16")
BALANCE = 0.003


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

    def __post_init__(self) -> None:
        numbers = (self.steps, self.layers, self.pieces, self.length)
        if min(numbers) < 1 or PIECE_TOKENS % self.length:
            raise TrainingError(
                f"{self}: numbers must be positive and length must divide {PIECE_TOKENS}."
            )

    @property
    def step_tokens(self) -> int:
        return self.pieces * PIECE_TOKENS

    @property
    def sequences(self) -> int:
        return self.step_tokens // self.length

    def grown(self, num_layers: int) -> list[int]:
        """The layers that the network of this stage has: 12 of 48 are 0, 4, ..., 44."""
        return [i * num_layers // self.layers for i in range(self.layers)]


@dataclass(frozen=True, slots=True)
class Pass:
    """One sub-network of a step, the sequences that it runs, and the weight of its mean loss."""

    subnet: Subnet
    rows: slice
    weight: float


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """All that decides a run. Rates warm up, stay, and fall linearly at the end.

    Attributes:
        muon_lr: rate of the layers' matrices; adam_lr: of everything else.
        decay_fraction: share of all steps in which rates fall, to `final_lr` of their value.
        balance: weight of the load-balancing loss, summed over layers.
        clip: largest gradient norm of the parameters that Adam trains.
        distill: weight of KL(full || reduced) per token where a reduced network runs: in place,
            from the full network on the same batch, which gets no gradient by it. Cross-entropy
            weighs the rest.
        sandwich: every step runs the full network on cross-entropy, then the smallest that
            `sampling` draws and a random reduced one. The step minimises the mean of the three
            losses (universally slimmable networks, arXiv:1903.05134, where `distill` is 1).
        split: every step runs the full network on this share of its sequences, rounded to whole
            ones and at least one for either, and a drawn reduced network on the others; the step
            minimises the mean over all tokens. 0 runs one network a step.
        bias_rate: how far a step moves the correction bias of every router that ran, for each
            expert of its pool, towards equal loads (balancing without a loss, arXiv:2408.15664);
            a network moves it by its share of the step.
        dtype: of the inputs of matrix products; everything else stays float32.

    Raises:
        TrainingError: a value is out of its range, or two of them contradict each other.
    """

    stages: tuple[Stage, ...]
    sampling: SamplingPlan = field(default_factory=SamplingPlan)
    seed: int = 0
    muon_lr: float = 0.02
    adam_lr: float = 4.5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    final_lr: float = 0.04
    balance: float = BALANCE
    clip: float = 1.0
    save_every_steps: int = SAVE_EVERY_STEPS
    distill: float = 0.0
    sandwich: bool = False
    split: float = 0.0
    bias_rate: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("muon_lr", 0, math.inf),
            ("adam_lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup_steps", 1, math.inf),
            ("decay_fraction", 0, 1),
            ("final_lr", 0, 1),
            ("balance", 0, math.inf),
            ("clip", 0, math.inf),
            ("save_every_steps", 1, math.inf),
            ("distill", 0, 1),
            ("split", 0, math.nextafter(1, 0)),
            ("bias_rate", 0, math.inf),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or not low <= value <= high:
                allowed = f"in [{low}, {high}]" if high < math.inf else f"at least {low}"
                raise TrainingError(f"plan: {name} must be a number {allowed}, got {value!r}.")
        if not self.stages:
            raise TrainingError("plan: stages must have at least one stage, got none.")
        if self.dtype not in DTYPES:
            raise TrainingError(
                f"plan: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}."
            )
        if self.sandwich and self.split:
            raise TrainingError(
                f"plan: sandwich and split = {self.split} are two ways to run the full network in "
                f"every step. Leave one out."
            )
        mixed = "sandwich" if self.sandwich else "split" if self.split else ""
        wanting = mixed or ("distill" if self.distill else "")
        if wanting and not self.sampling.can_reduce:
            raise TrainingError(
                f"plan: {wanting} = {getattr(self, wanting)} needs reduced networks, but sampling "
                f"draws none. Give an axis a chance and leave 'fixed' out, or leave {wanting} out."
            )
        if mixed and self.sampling.full is not None:
            raise TrainingError(
                f"plan: sampling.full = {self.sampling.full} has no meaning beside {mixed}: every "
                f"step runs the full network and reduced ones. Leave full out."
            )
        for index, stage in enumerate(self.stages):
            if self.split and stage.sequences < 2:
                raise TrainingError(
                    f"stage {index}: a step must have at least 2 sequences to split, got 1. Give "
                    f"it more pieces, or shorter sequences."
                )

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

    def whole(self, shape: ModelShape, step: int) -> Subnet:
        """The full network, as far as it has grown."""
        return resolve(shape, active_layers=self.stage(step).grown(shape.num_layers))

    def subnet(self, shape: ModelShape, step: int) -> Subnet:
        """The sub-network that is drawn for a step: a function of seed and step."""
        rng = random.Random(f"{self.seed}/{step}")
        grown = self.stage(step).grown(shape.num_layers)
        reduced = self.sandwich or self.split > 0
        return sample_subnet(shape, self.sampling, grown, rng, reduced=reduced)

    def passes(self, shape: ModelShape, step: int) -> tuple[Pass, ...]:
        """What a step runs: the drawn sub-network, the two of a split or the three of a sandwich.

        The full network comes first where it is not drawn.
        """
        drawn, stage = self.subnet(shape, step), self.stage(step)
        rows = stage.sequences
        if self.split:
            of_full = min(max(1, round(self.split * rows)), rows - 1)
            share = of_full / rows
            return (
                Pass(self.whole(shape, step), slice(0, of_full), share),
                Pass(drawn, slice(of_full, rows), 1 - share),
            )
        subnets: tuple[Subnet, ...] = (drawn,)
        if self.sandwich:
            smallest = smallest_subnet(shape, self.sampling, stage.grown(shape.num_layers))
            subnets = (self.whole(shape, step), smallest, drawn)
        return tuple(Pass(subnet, slice(0, rows), 1 / len(subnets)) for subnet in subnets)

    def untrained_teacher(self, shape: ModelShape, step: int) -> list[slice]:
        """The sequences on which the full network runs as a teacher alone, without a gradient."""
        whole, trained, alone = self.whole(shape, step), set(), dict[tuple[int, int], slice]()
        for one in self.passes(shape, step) if self.distill else ():
            span = (one.rows.start, one.rows.stop)
            if one.subnet == whole:
                trained.add(span)
            elif span not in trained:
                alone[span] = one.rows
        return list(alone.values())

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

    def check_model(self, config: ModelConfig) -> None:
        """All that `check` does, and what else must fit the model.

        Raises:
            TrainingError: as `check`; the model lacks the fixed sub-network, positions for a
                sequence, a head that training can use, or the biases that `bias_rate` is to move.
        """
        self.check(config.num_layers)
        for index, stage in enumerate(self.stages):
            if stage.length > config.max_positions:
                raise TrainingError(
                    f"stage {index}: length must be at most the model's {config.max_positions} "
                    f"positions, got {stage.length}. Train on shorter sequences, or a model with "
                    f"more positions."
                )
        if self.sampling.fixed:
            for stage in self.stages:
                fixed_subnet(config.shape, self.sampling.fixed, stage.grown(config.num_layers))
        if self.bias_rate and not config.selection_bias:
            raise TrainingError(
                f"plan: bias_rate must be 0 for architecture {config.model_type!r}, which stores "
                f"no correction bias, got {self.bias_rate}. Use the balance loss."
            )
        if not config.tied_embeddings:
            raise TrainingError(
                "tied_embeddings must be True, got False: training uses the embeddings as the "
                "head, and a head of its own would stay random. Tie them in the configuration."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingPlan:
        """The plan that `to_json` wrote, now or before a field was added.

        Raises:
            TrainingError: it is no plan, or a field is unknown or out of its range.
        """
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"plan: an object with stages and sampling is needed, and their fields: {error!r}."
            ) from None

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> TrainingPlan:
        for kind, part in ((cls, data), (SamplingPlan, data["sampling"])):
            unknown = sorted(part.keys() - {f.name for f in fields(kind)})
            if unknown:
                raise TrainingError(
                    f"plan: {unknown[0]} = {part[unknown[0]]!r} is no field that this version "
                    f"knows. Read it with the version that wrote it."
                )
        stages = tuple(Stage(**stage) for stage in data["stages"])
        # A plan from before an axis was added never drew it; a fixed plan draws none.
        absent = {} if data["sampling"].get("fixed") else dict.fromkeys(ADDED_AXES, 0.0)
        sampling = SamplingPlan(**{**absent, **data["sampling"]})
        return cls(**{**data, "stages": stages, "sampling": sampling})


def completed(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A plan's JSON with the fields that a version before they were added did not write.

    Raises:
        TrainingError: as `TrainingPlan.from_json`, with `where` in front.
    """
    try:
        whole: dict[str, Any] = json.loads(json.dumps(TrainingPlan.from_json(data).to_json()))
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from None
    return whole


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
        try:
            stages.append(Stage(steps=steps, layers=layers, pieces=pieces, length=length))
        except TrainingError:
            raise TrainingError(
                f"stage {part!r}: numbers must be positive and LENGTH must divide {PIECE_TOKENS}."
            ) from None
    return tuple(stages)
