"""A whole run: text, steps, checkpoint, log. Both commands and Python start one here."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_moe_kernels.arrays import tensor

from elastic_moe.errors import NotGrownError
from elastic_moe.files import write_text
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.folder import CONFIG, checkpoint_name, find_checkpoint
from elastic_moe.train.config import TrainConfig
from elastic_moe.train.export import export, keep_parent
from elastic_moe.train.ledger import replay
from elastic_moe.train.runs.folder import has_started, lock_folder, write_record
from elastic_moe.train.runs.log import LOG, last_loss, read_log, split_records, write_table
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event, Notice, Report, StepDone, clock
from elastic_moe.train.runs.stopping import StopFlag, stop_on_signal
from elastic_moe.train.runs.timebox import Pace, fit_steps, measure_pace
from elastic_moe.train.settings import CHECKPOINT, Settings, describe_texts, read_settings
from elastic_moe.train.step.plan import PLAN, TrainingPlan
from elastic_moe.train.step.state import STATE, load_state
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.corpus import SourceFile, library_files
from elastic_moe.train.text.prepare import MANIFEST, open_stream, prepare
from elastic_moe.train.text.tokens import TokenStream


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of one session of a run; `seconds` is infinite without a time box."""

    started: float
    seconds: float

    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.seconds - self.spent()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run has come to, all its sessions together; --json prints it.

    Attributes:
        out, checkpoint, log, table: where things lie; `checkpoint` is None as long as no step ran
            all layers.
        complete: all steps of the plan are done.
        ended_by: 'plan', 'time' or 'signal'.
        flops: of training, as the ledger counts them.
        full_steps: steps that trained the whole network.
        first_loss, loss: nats per token of the full network, over the first and the last steps;
            those of reduced networks beside them. None where no step ran such a network.
        training_seconds: of the steps; `seconds`: of this session, all else included.
    """

    out: Path
    checkpoint: Path | None
    log: Path
    table: Path
    steps: int
    total_steps: int
    complete: bool
    ended_by: str
    tokens: int
    flops: float
    full_steps: int
    first_loss: float | None
    loss: float | None
    first_reduced_loss: float | None
    reduced_loss: float | None
    training_seconds: float
    tokens_per_second: float | None
    seconds: float
    total_params: int

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def run(
    config: TrainConfig,
    *,
    report: Report | None = None,
    started: float | None = None,
    report_seconds: float = 10.0,
) -> TrainResult:
    """Start the run that a configuration asks for, or resume it; write its checkpoint and log.

    Ctrl-C and SIGTERM end it after the step that is running, with everything saved.

    Args:
        report: gets an `Event` now and then; `str(event)` is a line about it.
        started: `time.monotonic()` of the start of the time box; None for now.
        report_seconds: between two events about steps.

    Raises:
        OptionError: the configuration contradicts the model or the run that `config.out` holds.
        TrainingError, CorpusError: the run cannot start, resume or continue.
    """
    minutes = math.inf if config.minutes is None else config.minutes
    timer = Clock(time.monotonic() if started is None else started, 60 * minutes)
    settings = read_settings(config)
    with lock_folder(settings.out):
        return _run(settings, timer, report or _ignore, report_seconds)


def _ignore(_event: Event) -> None:
    pass


def _run(settings: Settings, timer: Clock, report: Report, report_seconds: float) -> TrainResult:
    """All of it, in a folder that no other training can enter meanwhile."""
    out = settings.out
    if not (settings.data / MANIFEST).exists():
        _prepare(settings, report)
    stream = open_stream(settings.data, settings.config.seed)
    if settings.model.raw is not None and not has_started(out):
        write_text(out / CONFIG, json.dumps(settings.model.raw, indent=1) + "\n")
    write_record(out, settings.record)
    with stop_on_signal() as stop:
        plan, pace = settings.plan, None
        if plan is None:
            plan, pace = _fit(settings, stream, timer, report)
        _describe(settings, plan, stream, report)
        trainer = _make_trainer(settings, plan, stream)
        _adopt(settings, trainer, report)
        ended_by = _train(settings, trainer, stop, timer, pace, report, report_seconds)
    return _finish(settings, trainer, ended_by, timer, report)


def _prepare(settings: Settings, report: Report) -> None:
    config = settings.config
    library: Sequence[SourceFile] = ()
    if config.reads_library:
        library = listing = library_files()
        report(Notice(f"the Python library: {listing.describe()}"))
    if (texts := describe_texts(settings)) is not None:
        report(Notice(texts))
    report(Notice(f"preparing the text in {settings.data}, which takes some seconds per 10 MB"))
    prepare(
        settings.data,
        library,
        settings.texts,
        config.mixture,
        vocab_size=settings.model.config.vocab_size,
        seed=config.seed,
        tokenizer=settings.tokenizer,
    )


def _make_trainer(settings: Settings, plan: TrainingPlan, stream: TokenStream) -> Trainer:
    config = settings.config
    return Trainer(settings.model.config, plan, stream, config.device, config.backend)


def _fit(
    settings: Settings, stream: TokenStream, timer: Clock, report: Report
) -> tuple[TrainingPlan, Pace]:
    """The plan whose steps fill the time that is left. It is written down at once."""
    trial = settings.with_steps(1)
    pace = measure_pace(
        lambda plan: _make_trainer(settings, plan, stream),
        trial,
        settings.out,
        timer.left(),
    )
    shape, save_every = settings.model.config.shape, settings.config.save_every
    plan = settings.with_steps(fit_steps(pace, timer.left(), trial, shape, save_every))
    write_text(settings.out / PLAN, json.dumps(plan.to_json(), indent=1) + "\n")
    report(
        Notice(
            f"a step of the full network takes {pace.step_seconds:.2f} s: {plan.total_steps:,} "
            f"steps fit into the {clock(timer.left())} that are left"
        )
    )
    return plan, pace


def _describe(settings: Settings, plan: TrainingPlan, stream: TokenStream, report: Report) -> None:
    config = settings.model.config
    tokens = sum(stage.steps * stage.step_tokens for stage in plan.stages)
    report(
        Notice(
            f"model: {config.num_layers} layers, {config.num_experts} experts of "
            f"{config.expert_hidden} channels, {config.max_top_k} per token, "
            f"{config.shape.total_params:,} parameters"
        )
    )
    report(
        Notice(
            f"plan: {plan.total_steps:,} steps, {tokens:,} tokens, which is "
            f"{tokens / len(stream.tokens):.2f} of the text's {len(stream.tokens):,}"
        )
    )


def _adopt(settings: Settings, trainer: Trainer, report: Report) -> None:
    """Give the trainer its first weights, or of a run to resume the name that they had."""
    start, state = settings.model.start, settings.out / STATE
    if start is None:
        return
    if state.is_file():
        trainer.parent = load_state(state)[1].get("parent")
        return
    folder = find_checkpoint(start)
    checkpoint = Checkpoint(folder)
    weights = {name: tensor(checkpoint.read(name, "float32")) for name in checkpoint.shapes}
    trainer.adopt(weights, f"{checkpoint_name(folder)} sha256:{checkpoint.files.sha256()}")
    keep_parent(settings.out, folder)
    warmup = trainer.plan.warmup_steps
    report(Notice(f"weights of {start}, a fresh optimiser, {warmup} steps of warm-up"))


def _train(
    settings: Settings,
    trainer: Trainer,
    stop: StopFlag,
    timer: Clock,
    pace: Pace | None,
    report: Report,
    report_seconds: float,
) -> str:
    """Run the steps; returns what ended them."""
    state = settings.out / STATE
    if pace is None:  # nothing was timed: saving takes as long as the state is big
        pace = Pace(0.0, state.stat().st_size / 200e6 if state.is_file() else 0.0)
    run_steps(
        trainer,
        settings.out,
        max_seconds=max(0.0, timer.left() - pace.end_seconds),
        step_seconds=pace.step_seconds,
        report=lambda event: report(event) if isinstance(event, StepDone | Notice) else None,
        report_seconds=report_seconds,
        stop=stop,
        locked=True,
    )
    if trainer.step == trainer.plan.total_steps:
        return "plan"
    return "signal" if stop.requested else "time"


def _finish(
    settings: Settings, trainer: Trainer, ended_by: str, timer: Clock, report: Report
) -> TrainResult:
    """Write checkpoint and table."""
    out, plan, shape = settings.out, trainer.plan, trainer.config.shape
    for half in out.glob(f".{CHECKPOINT}.*.part"):  # what a kill left of a checkpoint
        shutil.rmtree(half, ignore_errors=True)
    table = write_table(out)
    checkpoint: Path | None = out / CHECKPOINT
    try:
        ledger = export(out, out / CHECKPOINT, max_shard_bytes=settings.config.max_shard_bytes)
    except NotGrownError as error:
        report(Notice(f"no checkpoint yet: {error}"))
        checkpoint, ledger = None, replay(plan, shape, trainer.step)
    records = read_log(out)
    full, reduced = split_records(records, plan, shape)
    seconds = sum(r["seconds"] for r in records)
    return TrainResult(
        out=out,
        checkpoint=checkpoint,
        log=out / LOG,
        table=table,
        steps=trainer.step,
        total_steps=plan.total_steps,
        complete=trainer.step == plan.total_steps,
        ended_by=ended_by,
        tokens=ledger.tokens,
        flops=ledger.flops,
        full_steps=ledger.full_steps,
        first_loss=last_loss(full[:1]),
        loss=last_loss(full),
        first_reduced_loss=last_loss(reduced[:1]),
        reduced_loss=last_loss(reduced),
        training_seconds=round(seconds, 1),
        tokens_per_second=round(ledger.tokens / seconds, 1) if seconds else None,
        seconds=round(timer.spent(), 1),
        total_params=shape.total_params,
    )


def summary_lines(result: TrainResult, loss_curve: Path | None = None) -> list[str]:
    """The result in lines for a reader, ending in what to do next."""
    r = result
    done = f"{r.steps:,} of {r.total_steps:,} steps, {r.tokens:,} tokens"
    done += f" in {clock(r.training_seconds)}"
    if r.loss is not None:
        done += f": loss {r.first_loss:.3f} at first, {r.loss:.3f} at last"
    elif r.reduced_loss is not None:  # as of a fixed network, or where none happened to be full
        done += f": loss of reduced networks {r.first_reduced_loss:.3f} at first, "
        done += f"{r.reduced_loss:.3f} at last"
    lines = [done]
    for name, path in (
        ("checkpoint", r.checkpoint),
        ("loss curve", loss_curve),
        ("table", r.table),
    ):
        if path is not None:
            lines.append(f"{name}: {path}")
    if not r.complete:
        why = "stopped" if r.ended_by == "signal" else "the time is over"
        lines.append(f"{why}: run the same command again to resume")
    elif r.checkpoint is not None:
        out = r.checkpoint.parent / "sweep"
        lines.append(f"next: elastic-moe sweep {r.checkpoint} --quick --out {out}")
    return lines
