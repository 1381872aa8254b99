"""A training that was never done, for ledgers: its plan, and what it counts as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_moe.lab.cost.training import Training
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from tests.train.tiny import CONFIG

SHAPE = CONFIG.shape
STAGES = parse_stages("2x3x1x128,6x5x2x256")
FULL_ONLY = TrainingPlan(stages=STAGES, sampling=SamplingPlan(fixed="full"))
SMALL_PLAN = TrainingPlan(stages=STAGES, sampling=SamplingPlan(full=0.3))


def training(plan: TrainingPlan = SMALL_PLAN, steps: int = 8, **changes: Any) -> Training:
    flops = replay(plan, SHAPE, steps).flops
    return replace(Training("tiny", Path("tiny"), "run", SHAPE, plan, steps, flops), **changes)
