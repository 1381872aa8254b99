"""What was trained, and what it took: read from a run's folder, or from a checkpoint's manifest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from elastic_moe.errors import CheckpointError, OptionError, TrainingError
from elastic_moe.model.folder import CONFIG, checkpoint_name, find_checkpoint, read_json
from elastic_moe.routing import ModelShape
from elastic_moe.train.ledger import replay
from elastic_moe.train.log import read_log
from elastic_moe.train.models import config_from_json
from elastic_moe.train.parents import read_parent, tokens_before
from elastic_moe.train.plan import Stage, TrainingPlan

STATE, PLAN, MANIFEST = "state.safetensors", "plan.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class Training:
    """A training that was done, as far as it got.

    Attributes:
        kind: "run" (counted from its plan) or "checkpoint" (as its manifest says).
        steps: optimiser steps that were done; those of a run that a kill undid are not among them.
        flops: F.
        seconds: measured, summed over `timed_steps` of the steps; None without a log.
        parent: what its first weights were; None for random ones. What those had cost, on
            `tokens_before` tokens, is not in `flops`.
        before: the trainings that those weights came from, the first one first, where it is known.
    """

    name: str
    path: Path
    kind: str
    shape: ModelShape
    plan: TrainingPlan
    steps: int
    flops: float
    seconds: float | None = None
    timed_steps: int = 0
    parent: str | None = None
    tokens_before: int = 0
    before: tuple[Training, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in stages_done(self.plan, self.steps))


def stages_done(plan: TrainingPlan, steps: int) -> list[tuple[Stage, int]]:
    """The stages of the first `steps` steps, each with the tokens that it has read."""
    done, left = [], steps
    for stage in plan.stages:
        ran = min(left, stage.steps)
        left -= ran
        if ran:
            done.append((stage, ran * stage.step_tokens))
    return done


def read_training(trained: str | Path, *, download: bool = False) -> Training:
    """The training of a run's folder, or of a checkpoint that tells of its own.

    Args:
        trained: a folder that `elastic-moe train` wrote, a bundled model, or a checkpoint folder.
        download: as `find_checkpoint`.

    Raises:
        OptionError: it is neither.
        TrainingError: the run has saved no step yet, or its state cannot be read.
        CheckpointError: the checkpoint's files are damaged.
    """
    folder = Path(trained)
    if any((folder / name).is_file() for name in (STATE, PLAN)):
        return _read_run(folder)
    try:
        folder = find_checkpoint(trained, download=download)
    except CheckpointError as error:
        raise OptionError(
            f"{str(trained)!r} is neither the folder of a training run ({PLAN}, {STATE}) nor a "
            f"checkpoint ({CONFIG}, {MANIFEST}): {error}"
        ) from error
    return _read_checkpoint(folder)


def _read_run(folder: Path) -> Training:
    path = folder / STATE
    if not path.is_file():
        raise TrainingError(
            f"{folder} has {PLAN} and no {STATE}: no step was saved yet. Train on, or name another "
            f"run."
        )
    try:
        with safe_open(path, framework="np") as file:
            state = json.loads((file.metadata() or {})["elastic_moe_training"])
        plan, steps = TrainingPlan.from_json(state["plan"]), int(state["step"])
        config = config_from_json(state["model"])
        shape, parent = config.shape, state["parent"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path} is no training state that this version reads ({error!r:.200}). Use the "
            f"version that wrote it."
        ) from error
    if steps == 0:
        raise TrainingError(f"{path} is at step 0 of {plan.total_steps}. Train a step at least.")
    told = read_parent(folder)
    # The log may be ahead of the state, by steps that a kill undid.
    times = [r["seconds"] for r in read_log(folder) if r["step"] <= steps and "seconds" in r]
    return Training(
        name=folder.resolve().name,
        path=folder,
        kind="run",
        shape=shape,
        plan=plan,
        steps=steps,
        flops=replay(plan, shape, steps).flops,
        seconds=math.fsum(times) if times else None,
        timed_steps=len(times),
        parent=parent,
        tokens_before=tokens_before(told)
        or ((config.elastic.tokens or 0) if config.elastic else 0),
        before=_chain(told, shape, folder),
    )


def _read_checkpoint(folder: Path) -> Training:
    from elastic_moe.model.checkpoint import load_config  # deferred: loads torch

    config, name = load_config(folder), checkpoint_name(folder)
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).exists() else {}
    if "training" not in manifest:
        parent = config.elastic.parent if config.elastic else None
        raise OptionError(
            f"{folder} is a checkpoint that does not tell how it was trained: it has no {MANIFEST} "
            f"with 'training', as those of `elastic-moe train` have. Name "
            f"{f'its parent, {parent!r}, ' if parent else 'one of those '}or the folder of a run."
        )
    return _read_manifest(manifest, config.shape, name, folder)


def _chain(
    manifest: dict[str, Any] | None, shape: ModelShape, folder: Path
) -> tuple[Training, ...]:
    """The trainings that a parent's manifest tells of, the first one first."""
    if manifest is None:
        return ()
    last = _read_manifest(manifest, shape, folder.name, folder)
    return (*last.before, replace(last, before=()))


def _read_manifest(
    manifest: dict[str, Any], shape: ModelShape, name: str, folder: Path
) -> Training:
    try:
        training = manifest["training"]
        plan, steps = TrainingPlan.from_json(training["plan"]), training["steps"]
        # As counted then: a later version may draw other sub-networks from the same plan.
        flops = float(training["flops"])
        if not (0 < steps <= plan.total_steps and 0 < flops < math.inf):
            raise ValueError(f"{steps} of {plan.total_steps} steps, {flops} FLOP")
        return Training(
            name=name,
            path=folder,
            kind="checkpoint",
            shape=shape,
            plan=plan,
            steps=steps,
            flops=flops,
            parent=training.get("parent"),
            tokens_before=training.get("tokens_before", 0),
            before=_chain(manifest.get("before"), shape, folder),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: 'training' cannot be read ({error!r:.200}). It must hold plan, "
            f"steps and flops, as the export of a run writes them."
        ) from error
