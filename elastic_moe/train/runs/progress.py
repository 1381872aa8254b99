"""Events of a run, for printed lines and progress bars: steps, notices, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.train.step.plan import TrainingPlan


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step is done.

    Attributes:
        step, total_steps: this one, counted from 1, and the last of the plan.
        loss: of the sub-network that the step ran, in nats per token; of several, the full one's.
        tokens_per_second: since the event before.
        seconds_left: of the plan or of the time that the run has, whichever ends first.
    """

    step: int
    total_steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"step {self.step} of {self.total_steps}, loss {self.loss:.3f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {clock(self.seconds_left)} left"
        )


@dataclass(frozen=True, slots=True)
class Notice:
    """A line that every user should read, however few steps are shown."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class StateSaved:
    """The loop has ended, and `path` holds the state after `step` of `total_steps` steps."""

    path: Path
    step: int
    total_steps: int

    def __str__(self) -> str:
        return f"step {self.step} of {self.total_steps} saved to {self.path}"


@dataclass(frozen=True, slots=True)
class NextCommand:
    """The command that comes next, once the loop has ended."""

    text: str

    def __str__(self) -> str:
        return f"next: {self.text}"


Event = StepDone | Notice | StateSaved | NextCommand
Report = Callable[[Event], None]


class Progress:
    """Reports the first step, the last, and one every `every_seconds`."""

    def __init__(
        self,
        plan: TrainingPlan,
        first_step: int,
        report: Report | None,
        every_seconds: float,
        max_seconds: float = math.inf,
    ) -> None:
        self.plan, self.first_step, self.report = plan, first_step, report
        self.every_seconds, self.max_seconds = every_seconds, max_seconds
        self.start = time.monotonic()
        self.reported_at = -math.inf  # seconds since the start, of the last event
        self.tokens, self.busy_seconds = 0, 0.0  # since that event

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def step_done(self, record: Mapping[str, Any]) -> None:
        """Report a step, if it is time to; `record` is its line of the log."""
        step, now = record["step"], self.seconds()
        self.tokens += self.plan.stage(step - 1).step_tokens
        self.busy_seconds += record["seconds"]
        last = step == self.plan.total_steps
        if self.report is None or (now - self.reported_at < self.every_seconds and not last):
            return
        rate = self.tokens / max(self.busy_seconds, 1e-9)
        left = self.seconds_left(step, now)
        self.report(StepDone(step, self.plan.total_steps, record["loss"], rate, left))
        self.reported_at, self.tokens, self.busy_seconds = now, 0, 0.0

    def seconds_left(self, step: int, now: float) -> float:
        """By the work of the steps to come: those of a grown network take longer."""
        plan = self.plan
        done = plan.work(step) - plan.work(self.first_step)
        left = plan.work(plan.total_steps) - plan.work(step)
        return max(0.0, min(now * left / done, self.max_seconds - now))


def clock(seconds: float) -> str:
    """5025 -> '1:23:45'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
