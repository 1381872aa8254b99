"""`elastic-moe train`: from texts to a checkpoint that the other commands take, and a picture."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic_moe.cli import main
from elastic_moe.train import session
from tests.train.commands import TINY, state
from tests.train.tiny import library, novels

PNG = b"\x89PNG\r\n\x1a\n"
SHORT = ("--tokens", "4096", "--batch-tokens", "512", "--length", "128")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with novels, and a library of one module instead of Python's."""
    sources = library(tmp_path)
    novels(tmp_path)
    monkeypatch.setattr(session, "library_files", lambda: sources)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny steps are slower on many
    yield tmp_path
    torch.set_num_threads(threads)


def train(root: Path, *options: object, model: tuple = TINY) -> int:
    return main(["train", "--out", str(root / "run"), *model, *SHORT, *map(str, options)])


def test_a_run_ends_with_files_that_the_other_commands_take(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = ("--tokenizer", "elastic-mini")  # its words make a text long enough to sweep over
    assert train(root, "--corpus", root / "novels", *bundled, model=TINY[:-2]) == 0
    captured = capsys.readouterr()
    run = root / "run"
    lines = captured.out.splitlines()
    assert lines[0].startswith("8 of 8 steps, 4,096 tokens in 0:00:0")
    assert lines[1:] == [
        f"checkpoint: {run / 'checkpoint'}",
        f"loss curve: {run / 'loss.png'}",
        f"table: {run / 'log.csv'}",
        f"next: elastic-moe sweep {run / 'checkpoint'} --quick --out {run / 'sweep'}",
    ]
    assert "step 8 of 8, loss " in captured.err  # plain lines: this is no terminal
    assert (run / "loss.png").read_bytes().startswith(PNG)

    checkpoint, out = str(run / "checkpoint"), str(root / "sweep")
    text = root / "novels" / "Dickens_X_1850.txt"
    common = ["--text", str(text), "--tokens", "600", "--depth", "3,6", "--out", out]
    assert main(["sweep", checkpoint, *common, "--quick", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["name"] for point in points] == ["full", "L3"]
    assert main(["extract", checkpoint, "L2-k1", "--out", str(root / "cut")]) == 0
    capsys.readouterr()
    assert main(["info", str(root / "cut"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["model"]["num_layers"] == 2
    assert info["model"]["elastic_moe"]["subnet"] == "L2-k1"


def test_the_summary_is_one_line_of_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(root, "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert summary["steps"] == state(root)["step"] == 8
    assert summary["loss_curve"] == str(root / "run" / "loss.png")
    assert summary["first_loss"] > summary["loss"]


def test_a_run_without_a_step_has_no_picture(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0) == 0
    out = capsys.readouterr().out
    assert "loss curve" not in out
    assert out.endswith("the time is over: run the same command again to resume\n")
    assert not (root / "run" / "loss.png").exists()


def test_bad_arguments_are_told_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(root, "--reduce-depth", 2) == 2
    captured = capsys.readouterr()
    assert captured.err == "elastic-moe train: --reduce-depth must be in [0, 1], got 2.0.\n"
    assert captured.out == ""
    assert train(root, "--minutes", 0) == 0
    capsys.readouterr()
    assert train(root, "--seed", 1) == 2
    assert "elastic-moe train: --seed: the run in" in capsys.readouterr().err


def test_a_terminal_shows_a_bar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    assert train(root) == 0
    shown = terminal.getvalue()
    assert "step 8 of 8" in shown
    assert "tokens/s" in shown
    assert "━" in shown
    assert "the Python library: 1 files" in shown
