"""Lines about a run: step, loss, tokens per second, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from elastic_moe.train.step.plan import TrainingPlan


class Note(str):
    """A line about a run that everyone should read, however little they show of its steps."""


class StepReport(str):
    """The line about a step that is done, with its numbers for who draws a bar.

    Attributes:
        step, total_steps: this one, counted from 1, and the last of the plan.
        loss: of the sub-network that the step ran, in nats per token; of several, the full one's.
        tokens_per_second: since the report before.
        seconds_left: of the plan or of the time that the run has, whichever ends first.
    """

    step: int
    total_steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float

    @classmethod
    def make(
        cls, step: int, total_steps: int, loss: float, tokens_per_second: float, seconds: float
    ) -> StepReport:
        """The line, and the numbers that it was made of."""
        line = cls(
            f"step {step} of {total_steps}, loss {loss:.3f}, "
            f"{tokens_per_second:,.0f} tokens/s, {clock(seconds)} left"
        )
        line.step, line.total_steps, line.loss = step, total_steps, loss
        line.tokens_per_second, line.seconds_left = tokens_per_second, seconds
        return line


class Progress:
    """Reports the first step, the last, and one every `every_seconds`."""

    def __init__(
        self,
        plan: TrainingPlan,
        first_step: int,
        report: Callable[[str], None] | None,
        every_seconds: float,
        max_seconds: float = math.inf,
    ) -> None:
        self.plan, self.first_step, self.report = plan, first_step, report
        self.every_seconds, self.max_seconds = every_seconds, max_seconds
        self.start = time.monotonic()
        self.told_at = -math.inf  # seconds since the start, of the last line
        self.tokens, self.busy_seconds = 0, 0.0  # since that line

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def tell(self, record: Mapping[str, Any]) -> None:
        """Report a step that is done, if it is time to; `record` is its line of the log."""
        step, now = record["step"], self.seconds()
        self.tokens += self.plan.stage(step - 1).step_tokens
        self.busy_seconds += record["seconds"]
        last = step == self.plan.total_steps
        if self.report is None or (now - self.told_at < self.every_seconds and not last):
            return
        rate = self.tokens / max(self.busy_seconds, 1e-9)
        left = self.seconds_left(step, now)
        self.report(StepReport.make(step, self.plan.total_steps, record["loss"], rate, left))
        self.told_at, self.tokens, self.busy_seconds = now, 0, 0.0

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
