"""The training runs of the experiment: what each one is, where it lies, and how far it is.

Twelve layers, otherwise elastic-mini. A run of a seed reads the same pieces of text in the same
order as all others of that seed, and begins with the same weights; they differ in what a step runs.
Needs what training needs, nothing else.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from elastic_moe.errors import TrainingError
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.runs.log import read_log
from elastic_moe.train.step.plan import Stage, TrainingPlan, completed
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import FREE
from elastic_moe.train.text.prepare import MANIFEST, TOKENIZER, read_manifest

LAYERS, PIECES, LENGTH = 12, 8, 512
TOKENS = 10_000_000
CONFIG = replace(ELASTIC_MINI, num_layers=LAYERS)
STATE, CHECKPOINT = "state.safetensors", "checkpoint"
SESSIONS = "sittings.jsonl"  # of a run: a line per start, on what machine and from which step
RECENT_STEPS = 50

# What the steps of each family run: the fields of the plan in which families differ. The elastic
# one runs the full network on three quarters of every step's text, and on the rest one that is
# drawn, whose reduced depths are first layers; in the frugal one that rest is an eighth. The drawn
# one has the defaults of `elastic-moe train`, as ERNIE 5.0: one network a step by independent
# chances, a quarter of the reduced depths random layers. The specialist at full size is the
# inelastic network.
RECIPE = ("sampling", "split", "distill")
FAMILIES: dict[str, dict[str, Any]] = {
    "elastic": {"sampling": SamplingPlan(prefix=1.0), "split": 0.75},
    "frugal": {"sampling": SamplingPlan(prefix=1.0), "split": 0.875},
    "drawn": {"sampling": SamplingPlan()},
    "inelastic": {"sampling": SamplingPlan(fixed="full")},
    "depth9": {"sampling": SamplingPlan(fixed="L9")},
    "pool8": {"sampling": SamplingPlan(fixed="p8")},
}
SPECIALISTS = {"depth9": "L9", "pool8": "p8"}  # the one point that each is for
# What the bars judge, each against the inelastic one, and what it is called that costs something.
SPLITS = {"elastic": "Elasticity", "frugal": "Frugal elasticity"}


@dataclass(frozen=True, slots=True)
class Run:
    """One network to train. `seed` decides its first weights, its draws and the order of text."""

    family: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.seed}"

    def plan(self, tokens: int = TOKENS, dtype: str = "float32") -> TrainingPlan:
        """As many whole steps as fit into so many tokens.

        Raises:
            TrainingError: not one does.
        """
        step_tokens = PIECES * LENGTH
        if tokens < step_tokens:
            raise TrainingError(f"--tokens must be at least {step_tokens}, one step, got {tokens}.")
        return TrainingPlan(
            stages=(Stage(tokens // step_tokens, LAYERS, PIECES, LENGTH),),
            seed=self.seed,
            dtype=dtype,
            **FAMILIES[self.family],
        )


# First one of each, so that there is something to compare; then what the bars need, then the rest.
# One drawn run is enough to see how far its recipe is from the elastic one.
RUNS = tuple(
    Run(family, seed)
    for families, seeds in (
        (("elastic", "inelastic", "depth9", "pool8"), (0,)),
        (("elastic", "inelastic"), (1, 2)),
        (("frugal",), (0, 1, 2)),
        (("depth9", "pool8"), (1, 2)),
        (("drawn",), (0,)),
    )
    for seed in seeds
    for family in families
)


def choose(only: str | None) -> list[Run]:
    """The runs of a list of names, in the order in which they are trained; None for all.

    Raises:
        TrainingError: a name is unknown.
    """
    if only is None:
        return list(RUNS)
    names = only.split(",")
    known = [run.name for run in RUNS]
    for name in names:
        if name not in known:
            raise TrainingError(f"--only: there is no run {name!r}; there are {', '.join(known)}.")
    return [run for run in RUNS if run.name in names]


def check_text(data: Path, folder: Path) -> None:
    """Refuse to go on with a run on other text than it was started with.

    Raises:
        TrainingError: names both.
    """
    if not (folder / "data" / MANIFEST).is_file():
        return
    theirs, ours = (read_manifest(at)[0]["stream_sha256"] for at in (folder / "data", data))
    if theirs != ours:
        raise TrainingError(
            f"{folder} was started on other text: its stream_sha256 is {theirs}, that of {data} is "
            f"{ours}. Name the data that it was started with, or another --out."
        )


def bring_data(data: Path, folder: Path) -> None:
    """Put manifest and tokenizer into a run's folder, so that it says what it was trained on."""
    read_manifest(data)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, TOKENIZER):
        shutil.copyfile(data / name, folder / "data" / name)


def is_finished(folder: Path, plan: TrainingPlan) -> bool:
    """Whether the run's checkpoint is there.

    Raises:
        TrainingError: it is there, and of another plan.
    """
    manifest = folder / CHECKPOINT / MANIFEST
    if not manifest.is_file():
        return False
    training = json.loads(manifest.read_text(encoding="utf-8"))["training"]
    had = completed(training["plan"], str(manifest))
    wanted = json.loads(json.dumps(plan.to_json()))
    for field in sorted((had.keys() | wanted.keys()) - FREE):
        if had.get(field) != wanted.get(field):
            raise TrainingError(
                f"{folder} was finished with another plan: {field} = {had.get(field)!r}, got "
                f"{wanted.get(field)!r}. Repeat the options that started it, or name another --out."
            )
    return True


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        state: 'finished', 'begun' or 'waiting'.
        steps: that its saved state has; those after it are run again.
        total: of the plan that it was started with; None before that.
        loss: mean of the last steps of the log, whatever sub-networks they ran; of split steps, the
            full network's.
        seconds: that all logged steps took.
    """

    state: str
    steps: int = 0
    total: int | None = None
    loss: float | None = None
    seconds: float = 0.0


def progress_of(folder: Path) -> Progress:
    """Read from the folder of a run alone, while it goes on or not."""
    records = read_log(folder)
    recent = [record["loss"] for record in records[-RECENT_STEPS:]]
    loss = statistics.fmean(recent) if recent else None
    seconds = sum(record["seconds"] for record in records)
    manifest = folder / CHECKPOINT / MANIFEST
    if manifest.is_file():
        training = json.loads(manifest.read_text(encoding="utf-8"))["training"]
        return Progress("finished", training["steps"], training["steps"], loss, seconds)
    plan = folder / "plan.json"
    if not plan.is_file():
        return Progress("waiting")
    total = TrainingPlan.from_json(json.loads(plan.read_text(encoding="utf-8"))).total_steps
    return Progress("begun", saved_step(folder / STATE), total, loss, seconds)


def saved_step(state: Path) -> int:
    """Steps of a saved state, from its header alone; 0 where there is none."""
    if not state.is_file():
        return 0
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata() or {}
    return int(json.loads(metadata["elastic_moe_training"])["step"])
