"""What a run that goes on learns of before: lines that a kill undid, how long steps take.

And whether something is not as it was that may change bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elastic_moe.files import write_text
from elastic_moe.train.runs.log import read_lines
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.runs.progress import Note

_RECENT = 8  # steps, whose longest tells how long the next may take


def forget_steps_after(step: int, log: Path) -> list[dict[str, Any]]:
    """Drop the lines of steps that a kill undid: they will be run, and written, again.

    Returns:
        The records that stay.

    Raises:
        TrainingError: as `read_log`.
    """
    if not log.exists():
        return []
    kept = [(line, record) for line, record in read_lines(log) if record["step"] <= step]
    write_text(log, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept]


def note_of_change(
    before: Mapping[str, Any], now: Mapping[str, Any], *, any_threads: bool
) -> Note | None:
    """What is not as it was, if that may change the last bits of steps.

    Args:
        before, now: backend, device and threads; states of earlier versions lack some.
        any_threads: whether steps have the same bits on any number of threads.
    """
    for what in ("backend", "device"):
        if before.get(what) not in (None, now[what]):
            return Note(
                f"goes on with {what} {now[what]}, where it had {before[what]}: steps then differ "
                f"in their last bits from those of a run that never stopped"
            )
    if before.get("threads") in (None, now["threads"]) or any_threads:
        return None
    return Note(
        f"goes on with {now['threads']} threads, where it had {before['threads']}: steps in "
        f"PyTorch or with a teacher then differ in their last bits from those of a run that never "
        f"stopped"
    )


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
        """Whether a step may be begun, and done before a time of the monotonic clock."""
        now = time.monotonic()
        return now < deadline and now + self.expected(step) <= deadline

    def _work(self, step: int) -> int:
        stage = self.plan.stage(step)
        return stage.step_tokens * stage.layers
