"""How many steps fit into a given time: a few are timed, on a trainer that is thrown away.

The number is fixed before the first step, so that the rates decay as the plan says and the run ends
by itself. Should the machine become slower, the run stops at its time; the same command resumes it.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_moe.errors import TrainingError
from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.train.runs.progress import clock
from elastic_moe.train.step.plan import Stage, TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer

RESERVE = 0.06  # of the time that is left: steps are not equally long
LEAST_STEPS = 10  # fewer train nothing that is worth a checkpoint
_TIMED_STEPS, _TIMED_SHARE = 8, 0.05  # at most; of the time that is left, where steps are short
_LEAST_TIMED = 3
_BESIDE = ".timing-"
_OVERHEAD = 0.25  # of a step's time at the full network: what no smaller sub-network saves
_DRAWS = 200
_RECENT = 8  # steps, the longest is the estimate of the next
_END_SECONDS = 3.0  # checkpoint, log and picture of a model of few parameters


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step of the full network, and of saving the state."""

    step_seconds: float
    save_seconds: float

    @property
    def end_seconds(self) -> float:
        """What is kept for the end: the state is saved, and the checkpoint made of it."""
        return _END_SECONDS + 3 * self.save_seconds


def measure_pace(
    make_trainer: Callable[[TrainingPlan], Trainer],
    plan: TrainingPlan,
    folder: Path,
    seconds: float,
) -> Pace:
    """Time some steps of the full network and one save.

    Args:
        make_trainer: of a plan; what it gives is thrown away.
        plan: of the run, whose last stage is timed.
        folder: on the disk that states are saved to.
        seconds: that the run has; a twentieth of it is spent here, and three steps at least.

    Raises:
        TrainingError: there are none left.
    """
    if seconds <= 0:
        raise TrainingError(
            "--minutes: the time was over when the text was prepared. Give more minutes. The text "
            "stays prepared."
        )
    stage = replace(plan.stages[-1], steps=_TIMED_STEPS)
    whole = replace(
        plan,
        stages=(stage,),
        sampling=SamplingPlan(full=1.0),
        distill=0.0,
        sandwich=False,
        split=0.0,
    )
    trainer = make_trainer(whole)
    started = time.monotonic()
    times: list[float] = []
    while len(times) < _TIMED_STEPS:
        step_started = time.monotonic()
        trainer.train_step()
        times.append(time.monotonic() - step_started)
        if len(times) >= _LEAST_TIMED and time.monotonic() - started > seconds * _TIMED_SHARE:
            break
    for half in folder.glob(f"{_BESIDE}*"):  # what a kill left of an earlier one
        shutil.rmtree(half, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_BESIDE, dir=folder) as beside:
        save_started = time.monotonic()
        trainer.save(Path(beside) / "state")
        save_seconds = time.monotonic() - save_started
    return Pace(statistics.median(times[1:]), save_seconds)  # the first one warms up


def fit_steps(
    pace: Pace, seconds: float, plan: TrainingPlan, shape: ModelShape, save_every_steps: int
) -> int:
    """The steps of a run that has `seconds` left for everything.

    Raises:
        TrainingError: they are fewer than 10.
    """
    step = pace.step_seconds * mean_cost(plan, shape) + pace.save_seconds / save_every_steps
    left = (seconds - pace.end_seconds) * (1 - RESERVE)
    steps = int(left / step)
    if steps < LEAST_STEPS:
        raise TrainingError(
            f"--minutes: {clock(max(0.0, seconds))} are left, and a step takes {step:.2f} s: that "
            f"is enough for {max(0, steps)} steps, {LEAST_STEPS} are the least. Give more minutes. "
            f"The text stays prepared."
        )
    return steps


def mean_cost(plan: TrainingPlan, shape: ModelShape) -> float:
    """Of a step, in steps of the full network: by operations, with an overhead that stays.

    An estimate from draws of the plan's first stage.
    """
    stage = plan.stages[0]
    longer = replace(plan, stages=(Stage(_DRAWS, stage.layers, stage.pieces, stage.length),))
    full = longer.whole(shape, 0)

    def cost(subnet: Subnet) -> float:
        share = subnet.flops_per_token(stage.length // 2) / full.flops_per_token(stage.length // 2)
        return _OVERHEAD + (1 - _OVERHEAD) * share

    def share(rows: slice) -> float:
        count: int = rows.stop - rows.start
        return count / stage.sequences

    total: float = 0.0
    for step in range(_DRAWS):
        total += sum(cost(one.subnet) * share(one.rows) for one in longer.passes(shape, step))
        # The teacher's forward pass, without a backward one.
        total += sum(share(rows) / 3 for rows in longer.untrained_teacher(shape, step))
    return total / _DRAWS


class StepPace:
    """How long the next step may take: as the longest of the last ones, by tokens times layers.

    Args:
        records: of steps that were done before, as the log has them.
        first_seconds: of a step, where there are none.
    """

    def __init__(
        self, plan: TrainingPlan, records: Iterable[Mapping[str, Any]], first_seconds: float = 0.0
    ) -> None:
        self.plan, self.first_seconds = plan, first_seconds
        self.recent: deque[float] = deque(maxlen=_RECENT)  # seconds per token and layer
        for record in records:
            self.learn(record)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Learn from a step that is done; `record` is its line of the log."""
        self.recent.append(record.get("seconds", 0.0) / self._work(record["step"] - 1))

    def expected(self, step: int) -> float:
        """Seconds of a step, counted from 0."""
        return max(self.recent) * self._work(step) if self.recent else self.first_seconds

    def fits(self, step: int, deadline: float) -> bool:
        """Whether a step may start, and be done before a time of the monotonic clock."""
        now = time.monotonic()
        return now < deadline and now + self.expected(step) <= deadline

    def _work(self, step: int) -> int:
        stage = self.plan.stage(step)
        return stage.step_tokens * stage.layers
