"""Trainings that were done: their plan and cost, from a run's folder or a checkpoint's manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from elastic_moe.errors import CheckpointError, ElasticMoEError, OptionError, TrainingError
from elastic_moe.model.checkpoints.folder import (
    CONFIG,
    MANIFEST,
    checkpoint_name,
    find_checkpoint,
    read_json,
)
from elastic_moe.model.families import read_config
from elastic_moe.routing import ModelShape, Subnet, parse_name, resolve, shorten
from elastic_moe.routing.subnet import INACTIVE
from elastic_moe.train.export import PARENT, read_parent
from elastic_moe.train.ledger import replay
from elastic_moe.train.models import config_from_json
from elastic_moe.train.runs.log import read_log
from elastic_moe.train.step.plan import Stage, TrainingPlan
from elastic_moe.train.step.sampling import fixed_subnet

STATE, PLAN = "state.safetensors", "plan.json"
MOST_TOKENS = 10**18  # of one training; more is no count that anything wrote

# What reading JSON of unknown origin as a plan can end in.
_FOREIGN = (ElasticMoEError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Training:
    """A training that was done, as far as it got.

    Attributes:
        name: "" where only the manifest of a later one names it.
        kind: "run" (counted from its plan), "checkpoint" (as its manifest says) or "parent" (as the
            manifest of one that went on from it says).
        steps: optimiser steps that were done; those of a run that a kill undid are not among them.
        flops: F.
        seconds: measured, summed over `timed_steps` of the steps; None without a log.
        parent: what its first weights were; None for random ones. What those had cost, on
            `tokens_before` tokens, is not in `flops`.
        before: the trainings that those weights came from, the first one first, where it is known.
        cut: the sub-network that was extracted from its weights, if the next training, or what was
            named, began with that; a training of what was extracted has the shape of this alone.
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
    cut: Subnet | None = None

    @property
    def whole_shape(self) -> ModelShape:
        """The shape of the network that the first training known of trained."""
        return (*self.before, self)[0].shape

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in stages_done(self.plan, self.steps))

    @property
    def alone(self) -> Subnet | None:
        """The proper sub-network that every step trained; None of any other training."""
        fixed = self.plan.sampling.fixed
        subnet = parse_name(self.shape, fixed) if fixed else None
        return None if subnet is None or subnet.name == "full" else subnet

    def is_same(self, other: Training) -> bool:
        """Whether both are one training, perhaps at different steps.

        Of all that led to one set of weights, no two began with the same ones.
        """
        # How often a run saves may change when it is resumed.
        mine, others = (replace(one.plan, save_every_steps=1) for one in (self, other))
        return mine == others and self.parent == other.parent


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
    """The training of a run's folder, or of a checkpoint with a manifest.

    Args:
        trained: a folder that `elastic-moe train` wrote, a bundled model, or a checkpoint folder.
        download: as `find_checkpoint`.

    Raises:
        OptionError: it is neither.
        TrainingError: the run has saved no step yet, or its state or log cannot be read.
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
    except (SafetensorError, *_FOREIGN) as error:
        raise TrainingError(
            f"{path} is no training state that this version reads ({error!r:.200}). Use the "
            f"version that wrote it."
        ) from error
    if steps == 0:
        raise TrainingError(f"{path} is at step 0 of {plan.total_steps}. Train a step at least.")
    before = _read_chain(read_parent(folder), shape, folder / PARENT)
    if before:
        tokens_before = before[0].tokens_before + sum(part.tokens for part in before)
    else:
        tokens_before = (config.elastic.tokens or 0) if config.elastic else 0
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
        tokens_before=tokens_before,
        before=before,
    )


def _read_checkpoint(folder: Path) -> Training:
    from elastic_moe.model.checkpoints.checkpoint import load_config  # deferred: loads torch

    config, name = load_config(folder), checkpoint_name(folder)
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).exists() else {}
    if "training" not in manifest:
        parent = config.elastic.parent if config.elastic else None
        raise OptionError(
            f"{folder} is a checkpoint without a record of its training: it has no {MANIFEST} "
            f"with 'training', as those of `elastic-moe train` have. Name "
            f"{f'its parent, {parent!r}, ' if parent else 'one of those '}or the folder of a run."
        )
    *before, own = _read_chain(manifest, config.shape, folder / MANIFEST)
    return replace(own, name=name, kind="checkpoint", before=tuple(before))


def _read_chain(
    manifest: Mapping[str, Any] | None, shape: ModelShape, path: Path
) -> tuple[Training, ...]:
    """The trainings that a manifest records, oldest first."""
    found: list[Training] = []
    place = ""
    while manifest is not None:
        cut = None
        if isinstance(manifest, Mapping) and "extracted" in manifest:
            cut = _read_cut(manifest["extracted"], shape, path, f"{place}extracted")
            shape = cut.shape
        own = _read_manifest(manifest, shape, path, f"{place}training")
        found.insert(0, replace(own, cut=cut))
        manifest, place = manifest.get("before"), f"{place}before."
    return tuple(found)


def _read_cut(entry: Any, shape: ModelShape, path: Path, place: str) -> Subnet:
    """The sub-network that was extracted from a trained network, at once or in several cuts.

    Args:
        shape: of the last extracted network.

    Raises:
        CheckpointError: it is not as `extract` writes it.
    """
    try:
        whole = read_config(entry["config"], str(path)).shape
        cut = resolve(whole, **entry["routing"])
        if cut.depth != shape.num_layers:
            raise ValueError(f"it has {cut.depth} layers, what was extracted {shape.num_layers}")
    except _FOREIGN as error:
        raise CheckpointError(
            f"{path}: {place!r} cannot be read ({error!r:.200}). It must hold config and routing, "
            f"as `elastic-moe extract` writes them."
        ) from error
    return cut if "of" not in entry else within(_read_cut(entry["of"], whole, path, place), cut)


def within(outer: Subnet, inner: Subnet) -> Subnet:
    """What `inner`, a sub-network of the network that was extracted as `outer`, is of the whole."""
    layers = [INACTIVE] * outer.shape.num_layers
    for i, layer in zip(outer.active_layers, inner.layers, strict=True):
        if layer.active:
            # Experts that a bias shuts out were not cut off: ids are still those of the whole.
            cut_off = inner.shape.num_experts < outer.shape.num_experts
            pool = outer.layers[i].expert_pool
            kept = (
                (pool[e] for e in layer.expert_pool)
                if cut_off
                else set(pool).intersection(layer.expert_pool)
            )
            layers[i] = replace(layer, expert_pool=tuple(sorted(kept)))
    return Subnet(outer.shape, tuple(layers))


def _read_manifest(
    manifest: Mapping[str, Any], shape: ModelShape, path: Path, place: str
) -> Training:
    """One training; `place` is where in the manifest of `path` it stands.

    Raises:
        CheckpointError: it is not as an export writes it, or of another model.
    """
    try:
        training = manifest["training"]
        plan, steps = TrainingPlan.from_json(training["plan"]), training["steps"]
        # As counted then: a later version may draw other sub-networks from the same plan.
        flops = float(training["flops"])
        parent, tokens_before = training.get("parent"), training.get("tokens_before", 0)
        _check_plan(plan, shape)
        for what, fits in (
            ("steps", type(steps) is int and 0 < steps <= plan.total_steps),
            ("flops", 0 < flops < math.inf),
            ("parent", parent is None or isinstance(parent, str)),
            ("tokens_before", type(tokens_before) is int and 0 <= tokens_before <= MOST_TOKENS),
        ):
            if not fits:
                raise ValueError(f"{what} = {shorten(training.get(what))}")
    except _FOREIGN as error:
        raise CheckpointError(
            f"{path}: {place!r} cannot be read ({error!r:.200}). It must hold plan, steps and "
            f"flops, as the export of a run writes them."
        ) from error
    return Training(
        name="",
        path=path.parent,
        kind="parent",
        shape=shape,
        plan=plan,
        steps=steps,
        flops=flops,
        parent=parent,
        tokens_before=tokens_before,
    )


def _check_plan(plan: TrainingPlan, shape: ModelShape) -> None:
    """Refuse a plan that no run of this model had; JSON may hold numbers of any kind and size.

    Raises:
        TrainingError: the model is too small for it, or lacks its fixed sub-network.
        ValueError: it counts in fractions, or more than anything could have read.
    """
    for stage in plan.stages:
        numbers = (stage.steps, stage.layers, stage.pieces, stage.length)
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"numbers of {stage} must be integers")
    if sum(stage.steps * stage.step_tokens for stage in plan.stages) > MOST_TOKENS:
        raise ValueError(f"plan: more than {MOST_TOKENS:,} tokens")
    plan.check(shape.num_layers)
    for stage in plan.stages:
        if plan.sampling.fixed:
            fixed_subnet(shape, plan.sampling.fixed, stage.grown(shape.num_layers))
