"""The training command on a tiny model, for the tests of what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.train.__main__ import main
from elastic_moe.train.step.state import load_state

STAGES = "2x2x1x128,6x4x1x128"
SIZES = {
    "--layers": 6,
    "--hidden": 32,
    "--heads": 4,
    "--kv-heads": 2,
    "--experts": 8,
    "--top-k": 3,
    "--expert-hidden": 16,
    "--granules": 4,
    "--vocab-size": 400,
}
TINY = tuple(str(part) for pair in SIZES.items() for part in pair)
LENGTH = ("--stages", STAGES)


def train(root: Path, *options: object, length: tuple = LENGTH, model: tuple = TINY) -> int:
    return main(["--out", str(root / "run"), *model, *map(str, length), *map(str, options)])


def state(root: Path) -> dict:
    return load_state(root / "run" / "state.safetensors")[1]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said, which is one line that begins with 'error: '."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")
