"""A whole run: text, steps, checkpoint, log. What both commands do."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_moe.errors import NotGrownError
from elastic_moe.files import write_text
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.folder import CONFIG, checkpoint_name, find_checkpoint
from elastic_moe.train.export import STATE, export
from elastic_moe.train.ledger import replay
from elastic_moe.train.parents import keep_parent
from elastic_moe.train.runs.checkpoint import load_state
from elastic_moe.train.runs.folder import has_begun, record
from elastic_moe.train.runs.lock import holding
from elastic_moe.train.runs.log import LOG, last_loss, read_log, split_records, write_table
from elastic_moe.train.runs.progress import Note, StepReport, clock
from elastic_moe.train.runs.stopping import StoppableTrainer, Stopped, stopping
from elastic_moe.train.runs.timebox import Pace, fit_steps, measure_pace
from elastic_moe.train.settings import (
    CHECKPOINT,
    PLAN,
    Settings,
    describe_texts,
    read_settings,
)
from elastic_moe.train.step.loop import Trainer, run
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.text.corpus import SourceFile, library_files
from elastic_moe.train.text.prepare import MANIFEST, open_stream, prepare
from elastic_moe.train.text.tokens import TokenStream

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of one start of a run; `seconds` is infinite without --minutes."""

    began: float
    seconds: float

    def spent(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.seconds - self.spent()


def train(
    options: argparse.Namespace,
    report: Report,
    *,
    began: float | None = None,
    report_seconds: float = 10.0,
) -> dict[str, Any]:
    """Begin the run that the options ask for, or go on with it; write what there is to see of it.

    Args:
        options: as `options.add_arguments` declares them.
        report: gets lines; those about steps are `StepReport`.
        began: `time.monotonic()` at which the time box began; None for now.
        report_seconds: between two of those about steps.

    Returns:
        The summary that --json prints: folders and files, steps, tokens, losses, and what ended it
        ('plan', 'time' or 'signal').

    Raises:
        OptionError: the options do not go together, or not with the run that is there.
        TrainingError, CorpusError: the run cannot begin, resume or go on.
    """
    minutes = math.inf if options.minutes is None else options.minutes
    timer = Clock(time.monotonic() if began is None else began, 60 * minutes)
    settings = read_settings(options)
    with holding(settings.out):
        return _train(settings, timer, report, report_seconds)


def _train(
    settings: Settings, timer: Clock, report: Report, report_seconds: float
) -> dict[str, Any]:
    """All of it, in a folder that no other training can enter meanwhile."""
    out = settings.out
    if not (settings.data / MANIFEST).exists():
        _prepare(settings, report)
    stream = open_stream(settings.data, settings.args.seed)
    if settings.model.raw is not None and not has_begun(out):
        write_text(out / CONFIG, json.dumps(settings.model.raw, indent=1) + "\n")
    record(out, settings.record)
    with stopping() as stop:
        plan, pace = settings.plan, None
        if plan is None:
            plan, pace = _fit(settings, stream, timer, report)
        _describe(settings, plan, stream, report)
        trainer = _make_trainer(settings, plan, stream)
        trainer.stop = stop
        _adopt(settings, trainer, report)
        ended_by = _run(settings, trainer, timer, pace, report, report_seconds)
    return _finish(settings, trainer, ended_by, timer, report)


def _prepare(settings: Settings, report: Report) -> None:
    args = settings.args
    library: Sequence[SourceFile] = ()
    if args.with_library:
        library = listing = library_files()
        report(f"the Python library: {listing.describe()}")
    if (texts := describe_texts(settings)) is not None:
        report(texts)
    report(f"preparing the text in {settings.data}, which takes some seconds per 10 MB")
    prepare(
        settings.data,
        library,
        settings.texts,
        settings.mixture,
        vocab_size=settings.model.config.vocab_size,
        seed=args.seed,
        tokenizer=settings.tokenizer,
    )


def _make_trainer(settings: Settings, plan: TrainingPlan, stream: TokenStream) -> StoppableTrainer:
    args = settings.args
    return StoppableTrainer(settings.model.config, plan, stream, args.device, args.backend)


def _fit(
    settings: Settings, stream: TokenStream, timer: Clock, report: Report
) -> tuple[TrainingPlan, Pace]:
    """The plan whose steps fill the time that is left. It is written down at once."""
    config, args = settings.model.config, settings.args
    trial = settings.with_steps(1)
    pace = measure_pace(
        lambda plan: _make_trainer(settings, plan, stream),
        trial,
        settings.out,
        timer.left(),
    )
    steps = fit_steps(pace, timer.left(), trial, config.shape, args.save_every)
    plan = settings.with_steps(steps)
    write_text(settings.out / PLAN, json.dumps(plan.to_json(), indent=1) + "\n")
    report(
        f"a step of the full network takes {pace.step_seconds:.2f} s: {steps:,} steps fit into the "
        f"{clock(timer.left())} that are left"
    )
    return plan, pace


def _describe(settings: Settings, plan: TrainingPlan, stream: TokenStream, report: Report) -> None:
    config = settings.model.config
    tokens = sum(stage.steps * stage.step_tokens for stage in plan.stages)
    report(
        f"model: {config.num_layers} layers, {config.num_experts} experts of "
        f"{config.expert_hidden} channels, {config.max_top_k} per token, "
        f"{config.shape.total_params:,} parameters"
    )
    report(
        f"plan: {plan.total_steps:,} steps, {tokens:,} tokens, which is "
        f"{tokens / len(stream.tokens):.2f} of the text's {len(stream.tokens):,}"
    )


def _adopt(settings: Settings, trainer: StoppableTrainer, report: Report) -> None:
    """Give the trainer the weights that it begins with, or the name of those that it began with."""
    start, state = settings.model.start, settings.out / STATE
    if start is None:
        return
    if state.is_file():
        trainer.parent = load_state(state)[1].get("parent")
        return
    folder = find_checkpoint(start)
    checkpoint = Checkpoint(folder)
    weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.shapes}
    trainer.adopt(weights, f"{checkpoint_name(folder)} sha256:{checkpoint.files.sha256()}")
    keep_parent(settings.out, folder)
    report(f"weights of {start}, a fresh optimiser, {trainer.plan.warmup_steps} steps of warm-up")


def _run(
    settings: Settings,
    trainer: StoppableTrainer,
    timer: Clock,
    pace: Pace | None,
    report: Report,
    report_seconds: float,
) -> str:
    """Run the steps; returns what ended them."""
    state = settings.out / STATE
    if pace is None:  # nothing was timed: saving takes as long as the state is big
        pace = Pace(0.0, state.stat().st_size / 200e6 if state.is_file() else 0.0)
    try:
        run(
            trainer,
            settings.out,
            max_seconds=max(0.0, timer.left() - pace.end_seconds),
            step_seconds=pace.step_seconds,
            report=lambda line: report(line) if isinstance(line, StepReport | Note) else None,
            report_seconds=report_seconds,
            held=True,
        )
    except Stopped:
        trainer.save(state)
        return "signal"
    return "plan" if trainer.step == trainer.plan.total_steps else "time"


def _finish(
    settings: Settings, trainer: Trainer, ended_by: str, timer: Clock, report: Report
) -> dict[str, Any]:
    """Write checkpoint and table; returns the summary."""
    out, args, plan, config = settings.out, settings.args, trainer.plan, trainer.config
    for half in out.glob(f".{CHECKPOINT}.*.part"):  # what a kill left of a checkpoint
        shutil.rmtree(half, ignore_errors=True)
    table = write_table(out)
    checkpoint: Path | None = out / CHECKPOINT
    try:
        ledger = export(out, out / CHECKPOINT, max_shard_bytes=args.max_shard_size)
    except NotGrownError as error:
        report(f"no checkpoint yet: {error}")
        checkpoint, ledger = None, replay(plan, config.shape, trainer.step)
    records = read_log(out)
    full, reduced = split_records(records, plan, config.shape)
    seconds = sum(r["seconds"] for r in records)
    return {
        "out": str(out),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "log": str(out / LOG),
        "table": str(table),
        "steps": trainer.step,
        "total_steps": plan.total_steps,
        "complete": trainer.step == plan.total_steps,
        "ended_by": ended_by,
        "tokens": ledger.tokens,
        "flops": ledger.flops,
        "full_steps": ledger.full_steps,
        "first_loss": last_loss(full[:1]),
        "loss": last_loss(full),
        "first_reduced_loss": last_loss(reduced[:1]),
        "reduced_loss": last_loss(reduced),
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(ledger.tokens / seconds, 1) if seconds else None,
        "seconds": round(timer.spent(), 1),
        "total_params": config.shape.total_params,
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as a reader wants it, ending in what to do next."""
    s = summary
    done = f"{s['steps']:,} of {s['total_steps']:,} steps, {s['tokens']:,} tokens"
    done += f" in {clock(s['training_seconds'])}"
    if s["loss"] is not None:
        done += f": loss {s['first_loss']:.3f} at first, {s['loss']:.3f} at last"
    elif s["reduced_loss"] is not None:  # as of a fixed network, or where none happened to be full
        done += f": loss of reduced networks {s['first_reduced_loss']:.3f} at first, "
        done += f"{s['reduced_loss']:.3f} at last"
    files = [key for key in ("checkpoint", "loss_curve", "table") if s.get(key)]
    told = [done, *(f"{key.replace('_', ' ')}: {s[key]}" for key in files)]
    if not s["complete"]:
        why = {"time": "the time is over", "signal": "stopped"}[s["ended_by"]]
        told.append(f"{why}: the same command goes on from there")
    elif s["checkpoint"]:
        told.append(f"next: elastic-moe sweep {s['checkpoint']} --quick")
    return told
