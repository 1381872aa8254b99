"""Ctrl-C and SIGTERM wait for the end of a step; a second one does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event, StepDone
from elastic_moe.train.runs.stopping import StopFlag, stop_on_signal
from elastic_moe.train.step.state import load_state
from tests.train.commands import TINY
from tests.train.tiny import trainer

ROOT = Path(__file__).resolve().parents[3]

_CHILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from elastic_moe.train import session
from elastic_moe.train.__main__ import main
from tests.train.tiny import library
sources = library(Path(sys.argv[1]))
session.library_files = lambda: sources
sys.exit(main(sys.argv[2:]))
"""


def test_a_signal_ends_the_run_after_a_step_with_everything_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*TINY, "--tokens", "51200000", "--batch-tokens", "512", "--out", str(out)]
    command = [sys.executable, "-c", _CHILD.format(root=str(ROOT)), str(tmp_path), *options]
    process = subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    try:
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    summary = json.loads(printed)
    assert summary["ended_by"] == "signal"
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, summary["steps"] + 1))
    assert load_state(out / "state.safetensors")[1]["step"] == summary["steps"]
    assert load_config(out / "checkpoint").elastic.tokens == summary["steps"] * 512


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_acts(number: signal.Signals) -> None:
    def usual(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(number, usual)
    try:
        with stop_on_signal() as flag:
            assert not flag.requested
            os.kill(os.getpid(), number)
            assert flag.requested
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), number)
        with stop_on_signal():
            pass
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_a_trainer_that_shall_stop_begins_no_step(tmp_path: Path) -> None:
    it, stop = trainer(), StopFlag()

    def request(event: Event) -> None:
        stop.requested = stop.requested or isinstance(event, StepDone)

    run_steps(it, tmp_path, report=request, report_seconds=0, stop=stop)
    assert it.step == 1
    assert load_state(tmp_path / "state.safetensors")[1]["step"] == 1
    run_steps(trainer(), tmp_path, stop=stop)
    assert load_state(tmp_path / "state.safetensors")[1]["step"] == 1


def test_in_another_thread_no_signal_is_taken() -> None:
    taken: list[object] = []

    def run() -> None:
        with stop_on_signal():
            taken.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert taken == [signal.getsignal(signal.SIGTERM)]
