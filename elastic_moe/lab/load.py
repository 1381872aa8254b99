"""Whether other programs wanted the machine's cores while speeds were measured."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROC = Path("/proc")
SETTLING_SECONDS = 0.001  # helpers of the kernels wait awake for 0.2 ms after a call


def count_other_threads(proc: Path = PROC) -> int | None:
    """Threads of other programs that run or could run now; None where the system does not say.

    The system's count of runnable threads (fourth column of /proc/loadavg) without this process's.
    """
    try:
        runnable = int((proc / "loadavg").read_text().split()[3].partition("/")[0])
        own = sum(_is_runnable(task) for task in (proc / "self" / "task").iterdir())
    except (OSError, ValueError, IndexError):
        return None
    return max(0, runnable - own)


def _is_runnable(task: Path) -> bool:
    try:
        stat = (task / "stat").read_text()
    except OSError:  # it has ended
        return False
    return stat.rpartition(")")[2].split()[0] == "R"  # a name may hold blanks and brackets


class LoadMonitor:
    """Reads the load before each measurement, so that results can say what ran beside them."""

    def __init__(self) -> None:
        self._readings: list[int] = []

    def read(self) -> None:
        """Count the runnable threads of other programs now."""
        time.sleep(SETTLING_SECONDS)
        others = count_other_threads()
        if others is not None:
            self._readings.append(others)

    def describe(self, *, threads: int) -> dict[str, Any]:
        """The `load` entry of a result.

        Args:
            threads: with which the measured program ran.

        Returns:
            `other_threads_mean` and `other_threads_max` over all readings, and `busy`: whether the
            mean left fewer cores than `threads`. Each is None where the system does not say.
        """
        cores = os.cpu_count() or 1
        if not self._readings:
            return {"other_threads_mean": None, "other_threads_max": None, "busy": None}
        mean = sum(self._readings) / len(self._readings)
        return {
            "other_threads_mean": round(mean, 2),
            "other_threads_max": max(self._readings),
            "busy": cores - int(mean + 0.5) < threads,
        }


def busy_warning(result: Mapping[str, Any]) -> str:
    """A sentence for the reader of a result that was measured on a busy machine; "" otherwise."""
    load = result.get("load") or {}
    if not load.get("busy"):
        return ""
    return (
        f"The machine was busy: threads of other programs wanted "
        f"{load['other_threads_mean']:.1f} of its {result['machine']['cores']} cores on average "
        f"(at most {load['other_threads_max']}). Speeds are lower than on an idle one, and ratios "
        f"of speeds may be wrong."
    )
