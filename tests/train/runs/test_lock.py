"""Two trainings never work in one folder, and a killed one locks nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.train import session
from elastic_moe.train.runs.folder import LOCK, lock_folder
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event
from tests.train.commands import error, train
from tests.train.tiny import trainer

_HOLDER = """
import sys, time
from pathlib import Path
from elastic_moe.train.runs.folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != LOCK}


def test_a_folder_in_which_a_training_runs_is_left_as_it_is_until_that_ends(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "run"
    run_steps(trainer(), folder, max_seconds=0)
    (folder / ".state.safetensors.1.part").write_bytes(b"what the other one is writing")
    (folder / ".checkpoint.1.part").mkdir()
    before = files(folder)
    other = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            message = f"a training is running in {folder}, process {holder.pid}. Wait for its end"
            with pytest.raises(TrainingError, match=re.escape(message)):
                run_steps(trainer(), folder)
            assert train(root) == 1
            assert error(capsys).startswith(message)
            assert files(folder) == before
            assert (folder / ".checkpoint.1.part").is_dir()
            assert not (folder / "data").exists()
        finally:
            holder.send_signal(signal.SIGKILL)
    it = trainer()
    run_steps(it, folder)  # a kill leaves the file, not the lock
    assert it.step == 14
    assert not (folder / ".state.safetensors.1.part").exists()


def test_a_run_holds_its_folder_from_beginning_to_end(tmp_path: Path) -> None:
    tried: list[int] = []

    def report(event: Event) -> None:
        with pytest.raises(TrainingError, match=f"process {os.getpid()}"):
            run_steps(trainer(), tmp_path)
        tried.append(len(str(event)))

    run_steps(trainer(), tmp_path, report=report, report_seconds=0)
    assert len(tried) == 14 + 2
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 14


def test_the_command_holds_its_folder_from_the_text_to_the_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def watched(name: str) -> None:
        real = getattr(session, name)

        def function(*args: object, **options: object) -> object:
            with pytest.raises(TrainingError, match="a training is running in"), lock_folder(out):
                pass
            tried.append(name)
            return real(*args, **options)

        monkeypatch.setattr(session, name, function)

    out = root / "run"
    for name in ("prepare", "measure_pace", "run_steps", "export", "write_table"):
        watched(name)
    assert train(root, length=("--minutes", 0.5, "--batch-tokens", 512, "--length", 128)) == 0
    assert sorted(tried) == ["export", "measure_pace", "prepare", "run_steps", "write_table"]
    with lock_folder(out):
        pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(TrainingError, match=r"\.lock cannot be locked: Function not implemented"),
        lock_folder(tmp_path),
    ):
        pass
