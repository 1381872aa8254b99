"""Kill a tiny run at random moments, again and again.

    python -m tests.train.runs.kills FOLDER KILLS

Every run is a fork of this process, which has everything loaded and has not trained a step: a start
takes milliseconds. Prints a line of JSON per kill: the step saved before, the last that was logged
and the step saved after it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.step.plan import parse_stages
from elastic_moe.train.step.state import load_state
from elastic_moe.train.step.trainer import Trainer
from tests.train import tiny

SAVE_EVERY = 2
STEPS_PER_KILL = 4  # more than a save interval, so that the run gets on
CONFIG = replace(tiny.CONFIG, num_layers=2)


def make_trainer(kills: int) -> Trainer:
    """At its first step, with a plan so long that every kill finds a run that is not done."""
    steps = kills * STEPS_PER_KILL + SAVE_EVERY
    stages = parse_stages(f"1x{steps // 2}x1x128,2x{steps - steps // 2}x1x128")
    plan = replace(tiny.PLAN, stages=stages, save_every_steps=SAVE_EVERY)
    return Trainer(CONFIG, plan, tiny.stream())


def start(trainer: Trainer, folder: Path) -> tuple[int, int]:
    """Fork a run; returns its process id and a pipe that gets a byte per step."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    status = 1
    try:
        os.close(read)
        run_steps(
            trainer, folder, report=lambda _line: os.write(write, b".") and None, report_seconds=0
        )
        status = 0
    finally:
        os._exit(status)


def finish(trainer: Trainer, folder: Path) -> None:
    """A run to its end."""
    child, read = start(trainer, folder)
    while os.read(read, 4096):
        pass
    os.close(read)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a run that nobody killed failed")


def kill(trainer: Trainer, folder: Path, rng: random.Random, step_seconds: float) -> None:
    """Start a run and kill it at a random moment after a random step."""
    child, read = start(trainer, folder)
    steps = rng.randrange(STEPS_PER_KILL)
    while steps > 0:
        steps -= len(os.read(read, steps))
    time.sleep(rng.uniform(0, 2 * step_seconds))
    os.kill(child, signal.SIGKILL)
    os.close(read)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise SystemExit("a run was done, or failed, before its kill")


def saved(folder: Path) -> int:
    """The step of the last state, 0 without one."""
    state = folder / "state.safetensors"
    return load_state(state)[1]["step"] if state.exists() else 0


def logged(folder: Path) -> int:
    """The last step whose line is whole, 0 without one."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main() -> None:
    """Straight to the end in FOLDER/straight; with kills in FOLDER/killed."""
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    trainer = make_trainer(kills)
    began = time.monotonic()
    finish(trainer, root / "straight")
    step_seconds = (time.monotonic() - began) / trainer.plan.total_steps
    rng = random.Random(0)
    for _ in range(kills):
        before = saved(root / "killed")
        kill(trainer, root / "killed", rng, step_seconds)
        found = {"before": before, "logged": logged(root / "killed")}
        sys.stdout.write(json.dumps({**found, "after": saved(root / "killed")}) + "\n")
    finish(trainer, root / "killed")


if __name__ == "__main__":
    main()
