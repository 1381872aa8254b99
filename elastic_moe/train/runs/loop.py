"""The loop over a run's steps: log, saves, time limit, exact resume of what its folder holds."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from elastic_moe.files import write_text
from elastic_moe.train.runs.folder import lock_folder
from elastic_moe.train.runs.log import LOG, drop_records_after
from elastic_moe.train.runs.progress import NextCommand, Notice, Progress, Report, StateSaved
from elastic_moe.train.runs.stopping import StopFlag
from elastic_moe.train.runs.timebox import StepPace
from elastic_moe.train.step.plan import PLAN
from elastic_moe.train.step.state import HALF_STATE, STATE
from elastic_moe.train.step.trainer import Trainer


def run_steps(
    trainer: Trainer,
    folder: Path,
    *,
    max_seconds: float = math.inf,
    step_seconds: float = 0.0,
    report: Report | None = None,
    report_seconds: float = 10.0,
    stop: StopFlag | None = None,
    locked: bool = False,
) -> None:
    """Train to the end of the plan or for `max_seconds`; resumes what is in `folder`.

    A step starts only if one as long as the longest of the last eight still fits.

    Args:
        max_seconds: from now on, what it takes to read a state included.
        step_seconds: of the first step, as far as the log has none.
        report: gets an event now and then, and what to do next at the end.
        stop: no step starts once it is requested.
        locked: the caller holds the folder's lock.

    Raises:
        TrainingError: another training runs in the folder, which is then left alone; the state
            there is of another run, or cannot be read or written; numbers are no longer finite,
            and the last state with finite ones stays.
    """
    deadline = time.monotonic() + max_seconds
    with nullcontext() if locked else lock_folder(folder):
        _run(trainer, folder, deadline, step_seconds, report, report_seconds, stop or StopFlag())


def _run(
    trainer: Trainer,
    folder: Path,
    deadline: float,
    step_seconds: float,
    report: Report | None,
    report_seconds: float,
    stop: StopFlag,
) -> None:
    plan, state, log_path = trainer.plan, folder / STATE, folder / LOG
    for pattern in (".*.part", "data/.*.part", HALF_STATE):  # what a kill left
        for half in folder.glob(pattern):
            if half.is_file():
                half.unlink()
    notice: str | None = None
    if state.exists():
        notice = trainer.load(state)
    else:
        write_text(folder / PLAN, json.dumps(plan.to_json(), indent=1) + "\n")
        if trainer.parent is not None:
            notice = f"starts with the weights of {trainer.parent} and fresh optimisers"
    if notice is not None and report is not None:
        report(Notice(notice))
    before = drop_records_after(trainer.step, log_path)
    pace = StepPace(plan, before, step_seconds)
    left = deadline - time.monotonic()
    progress = Progress(plan, trainer.step, report, report_seconds, left)
    first, session = trainer.step, {"threads": torch.get_num_threads()}
    with log_path.open("a", encoding="utf-8") as log:
        while (
            trainer.step < plan.total_steps
            and pace.fits(trainer.step, deadline)
            and not stop.requested
        ):
            started = time.monotonic()
            record = trainer.train_step()
            record["seconds"] = round(time.monotonic() - started, 3)
            pace.learn(record)
            log.write(json.dumps(record | session) + "\n")
            session.clear()  # the first record of a session has it
            log.flush()
            progress.step_done(record)
            if trainer.step % plan.save_every_steps == 0:
                trainer.save(state)
    trainer.save(state)
    if report is None:
        return
    done = trainer.step == plan.total_steps
    if not done and trainer.step == first and not stop.requested and time.monotonic() < deadline:
        report(Notice(f"no step fits: one takes {pace.expected(first):.1f} s. Give more time."))
    report(StateSaved(state, trainer.step, plan.total_steps))
    export = f"python -m elastic_moe.train.export {folder} FOLDER writes the checkpoint"
    report(NextCommand(export if done else "run the same command again to resume"))
