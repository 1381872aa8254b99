"""The load of the machine: whose threads count, and when a result says that it was busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.lab import load
from elastic_moe.lab.load import LoadMonitor, busy_warning, count_other_threads


def proc(root: Path, loadavg: str, *tasks: str) -> Path:
    """A /proc with these contents; tasks are stat files."""
    (root / "loadavg").write_text(loadavg)
    for i, stat in enumerate(tasks):
        (root / "self" / "task" / str(i)).mkdir(parents=True)
        (root / "self" / "task" / str(i) / "stat").write_text(stat)
    return root


def test_threads_of_this_process_do_not_count(tmp_path: Path) -> None:
    tasks = ("7 (python) R 1 1", "8 (a) R (b)) S 1 1", "9 (helper) R 1 1")
    assert count_other_threads(proc(tmp_path, "0.20 0.18 0.12 5/80 11206\n", *tasks)) == 3


def test_there_are_never_fewer_than_none(tmp_path: Path) -> None:
    tasks = ("7 (python) R 1 1", "8 (helper) R 1 1")
    assert count_other_threads(proc(tmp_path, "0.20 0.18 0.12 1/80 11206\n", *tasks)) == 0


@pytest.mark.parametrize("text", ["", "0.20 0.18", "0.20 0.18 0.12 x/80 1"])
def test_a_system_that_does_not_say_gives_none(tmp_path: Path, text: str) -> None:
    assert count_other_threads(tmp_path) is None
    assert count_other_threads(proc(tmp_path, text, "7 (python) R 1 1")) is None


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="this system has no /proc/loadavg")
def test_busy_loops_of_other_processes_are_seen() -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert max(count_other_threads() or 0 for _ in range(20_000)) >= 3
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def describe(
    monkeypatch: pytest.MonkeyPatch, readings: list[int | None], threads: int, cores: int
) -> dict[str, object]:
    monkeypatch.setattr(load, "SETTLING_SECONDS", 0)
    monkeypatch.setattr(load, "count_other_threads", iter(readings).__next__)
    monkeypatch.setattr(load.os, "cpu_count", lambda: cores)
    monitor = LoadMonitor()
    for _ in readings:
        monitor.read()
    return monitor.describe(threads=threads)


@pytest.mark.parametrize(
    ("readings", "threads", "cores", "mean", "busy"),
    [
        ([0, 0, 0, 0], 2, 2, 0.0, False),
        ([0, 0, 0, 1], 2, 2, 0.25, False),  # a moment
        ([0, 0, 1, 1], 2, 2, 0.5, True),  # half a core of two
        ([1, 1, 1, 1], 1, 2, 1.0, False),  # the other core
        ([9, None, 5], 1, 2, 7.0, True),
    ],
)
def test_a_machine_is_busy_when_others_want_the_cores_of_our_threads(
    monkeypatch: pytest.MonkeyPatch,
    readings: list[int | None],
    threads: int,
    cores: int,
    mean: float,
    busy: bool,
) -> None:
    entry = describe(monkeypatch, readings, threads, cores)
    largest = max(each for each in readings if each is not None)
    assert entry == {"other_threads_mean": mean, "other_threads_max": largest, "busy": busy}
    warning = busy_warning({"load": entry, "machine": {"cores": cores}})
    assert bool(warning) is busy
    assert not busy or f"wanted {mean:.1f} of its 2 cores" in warning


def test_what_was_not_read_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = describe(monkeypatch, [None, None], 2, 2)
    assert entry == {"other_threads_mean": None, "other_threads_max": None, "busy": None}
    assert busy_warning({"load": entry}) == busy_warning({"load": None}) == busy_warning({}) == ""
