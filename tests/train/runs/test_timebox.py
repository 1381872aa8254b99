"""A run that has so many minutes ends by itself before they are over, or says why it cannot."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.train import session
from elastic_moe.train.config import TrainConfig
from elastic_moe.train.runs import timebox
from elastic_moe.train.runs.timebox import Pace, StepPace, fit_steps, mean_cost, measure_pace
from elastic_moe.train.settings import read_settings
from elastic_moe.train.step.plan import Stage, TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from tests.train.commands import error, state, train
from tests.train.tiny import PLAN, trainer


def test_the_steps_that_fit_are_fixed_and_the_run_ends_by_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "measure_pace", lambda *_: Pace(0.6, 0.1))
    box = ("--minutes", 0.4, "--batch-tokens", 512, "--length", 128)
    assert train(root, length=box) == 0
    plan = json.loads((root / "run" / "plan.json").read_text())
    steps = plan["stages"][0]["steps"]
    assert 20 <= steps <= 42  # some 20 s of 24, at 0.6 s or less
    assert state(root)["step"] == steps
    assert plan["warmup_steps"] == steps // 10
    log = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["lr_scale"] < 0.25  # the rates fell as they should
    monkeypatch.setattr(session, "measure_pace", lambda *_: pytest.fail("timed again"))
    assert train(root, length=("--minutes", 3, *box[2:])) == 0
    assert json.loads((root / "run" / "plan.json").read_text()) == plan
    assert train(root, length=("--tokens", 9, *box[2:])) == 2
    assert "--tokens: " in error(capsys)
    assert train(root, length=box[2:]) == 2


def test_a_machine_that_becomes_slower_leaves_a_checkpoint_and_a_run_that_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "measure_pace", lambda *_: Pace(0.002, 0.0))
    monkeypatch.setattr(timebox, "_END_SECONDS", 0.5)
    fast = Trainer.train_step

    def slow(trainer: Trainer) -> dict:
        time.sleep(0.2)
        return fast(trainer)

    monkeypatch.setattr(Trainer, "train_step", slow)
    began = time.monotonic()
    assert train(root, "--json", length=("--minutes", 0.08, "--batch-tokens", 512)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert time.monotonic() - began < 4.8 + 3.0
    assert summary["ended_by"] == "time"
    assert 1 <= summary["steps"] < summary["total_steps"]
    assert load_config(Path(summary["checkpoint"])).elastic.tokens == summary["tokens"]
    plan = (root / "run" / "plan.json").read_bytes()
    assert train(root, length=("--minutes", 0, "--batch-tokens", 512)) == 0  # is not timed again
    assert capsys.readouterr().out.endswith("over: run the same command again to resume\n")
    assert state(root)["step"] == summary["steps"]
    assert (root / "run" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_torn_plan_is_told_by_its_file(
    root: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, length=("--minutes", 0)) == 1  # the text is prepared, and nothing else
    (root / "run" / "plan.json").write_text(text)
    capsys.readouterr()
    assert train(root, length=("--minutes", 1)) == 2
    message = error(capsys)
    assert re.search(r"plan\.json is torn \(.+\)\. It says how long the run is: start", message)


def test_a_time_box_takes_steps_that_are_split_where_they_have_two_sequences(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "measure_pace", lambda *_: Pace(0.001, 0.001))
    box = ("--minutes", 0.1, "--length", 512, "--batch-tokens", 1024, "--split", 0.9)
    assert train(root, length=box) == 0
    plan = TrainingPlan.from_json(json.loads((root / "run" / "plan.json").read_text()))
    assert plan.split == 0.9
    log = (root / "run" / "log.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["split"]) == 1 for line in log)


def test_what_the_end_needs_is_kept_from_the_steps(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 s: 3 for the checkpoint, and three times what saving a state takes."""
    given: list[dict] = []

    def watched(*_: object, **options: object) -> None:
        given.append(options)

    monkeypatch.setattr(session, "run_steps", watched)
    monkeypatch.setattr(session, "measure_pace", lambda *_: Pace(0.5, 4.0))
    monkeypatch.setattr(session, "_finish", lambda *_: SimpleNamespace(ended_by="time"))
    monkeypatch.setattr(session, "summary_lines", lambda *_: [])
    box = ("--minutes", 1, "--batch-tokens", 512)
    assert train(root, length=box) == 0
    assert given[0]["step_seconds"] == 0.5
    assert 0 < given[0]["max_seconds"] <= 60 - 3 - 3 * 4.0
    with (root / "run" / "state.safetensors").open("wb") as file:
        file.truncate(int(200e6 * 3))  # nothing is written: a state that takes 3 s
    assert train(root, length=box) == 0
    assert 0 < given[1]["max_seconds"] <= 60 - 3 - 3 * 3.0


def test_a_time_that_is_over_before_ten_steps_trains_nothing_and_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, length=("--minutes", 0)) == 1
    message = error(capsys)
    assert message.startswith("--minutes: the time was over when the text was prepared.")
    monkeypatch.setattr(session, "measure_pace", lambda *_: Pace(3.0, 0.1))
    assert train(root, length=("--minutes", 0.5)) == 1
    message = error(capsys)
    assert "and a step takes 2." in message  # of the mean network, which is a reduced one
    assert re.search(r"enough for \d steps, 10 are the least\. Give more minutes\.", message)
    assert (root / "run" / "data" / "manifest.json").exists()
    assert not (root / "run" / "state.safetensors").exists()


def test_the_cost_of_a_step_follows_what_it_runs() -> None:
    config = read_settings(TrainConfig(out=Path("none"))).model.config
    stages = (Stage(5, 12, 4, 256),)

    def cost(**changes: object) -> float:
        return mean_cost(TrainingPlan(stages=stages, **changes), config.shape)

    assert cost(sampling=SamplingPlan(fixed="full")) == pytest.approx(1)
    assert 0.4 < cost(sampling=SamplingPlan(fixed="L3")) < 0.6
    assert 0.8 < cost() < 1
    assert cost() + 0.15 < cost(distill=0.5) < cost() + 1 / 3
    assert 1.7 < cost(sandwich=True) < 3
    one = SamplingPlan(depth=0, pool=0, width=0, threshold=0, top_k=1)
    reduced = cost(sampling=one)
    mixed = cost(sampling=one, split=0.75)
    assert mixed == pytest.approx(0.75 + 0.25 * reduced, abs=0.01) != pytest.approx(1, abs=0.01)
    assert cost(sampling=one, split=0.75, distill=0.5) == pytest.approx(mixed + 0.25 / 3)
    pace, plan = Pace(0.5, 2.0), TrainingPlan(stages=stages, sampling=SamplingPlan(fixed="full"))
    seconds = 300 - pace.end_seconds
    assert fit_steps(pace, 300, plan, config.shape, 10) == int(seconds * 0.94 / (0.5 + 0.2))


def test_the_pace_is_that_of_the_full_network_on_a_trainer_that_is_thrown_away(
    tmp_path: Path,
) -> None:
    made: list[Trainer] = []
    sizes: list[int] = []  # of what was saved

    def make(plan: TrainingPlan) -> Trainer:
        made.append(it := trainer(plan))
        save = it.save

        def watched(path: Path) -> None:
            save(path)
            sizes.append(path.stat().st_size)

        it.save = watched
        return it

    before = list(tmp_path.iterdir())
    pace = measure_pace(make, PLAN, tmp_path, seconds=1e9)
    assert made[0].step == 8
    assert made[0].plan.stages[0].layers == 6  # of the last stage
    assert {made[0].plan.subnet(made[0].config.shape, step).name for step in range(8)} == {"full"}
    assert pace.step_seconds > 0
    assert pace.save_seconds > 0
    assert len(sizes) == 1 < sizes[0]
    assert list(tmp_path.iterdir()) == before
    (tmp_path / ".timing-killed").mkdir()
    measure_pace(make, PLAN, tmp_path, seconds=1e-9)
    assert list(tmp_path.iterdir()) == before
    assert made[1].step == 3  # no fewer, however short the time is


# --- how long the next step may take, read from the last ones

GROWING = TrainingPlan(stages=parse_stages("2x10x1x128,6x10x2x128"))


def test_the_next_step_is_taken_to_be_as_long_as_the_longest_of_the_last_eight() -> None:
    pace = StepPace(GROWING, [], first_seconds=4.0)
    assert pace.expected(0) == 4.0
    for step, seconds in ((1, 9.0), (2, 1.0), (3, 3.0)):
        pace.learn({"step": step, "seconds": seconds})
    assert pace.expected(3) == pytest.approx(9.0)
    for step in range(4, 10):
        pace.learn({"step": step, "seconds": 2.0})
    assert pace.expected(9) == pytest.approx(3.0)  # the longest is forgotten
    assert pace.expected(10) == pytest.approx(3.0 * 6)  # three times the layers, twice the tokens


def test_records_of_an_earlier_session_count_and_may_lack_the_seconds() -> None:
    records = [{"step": 9, "seconds": 2.0}, {"step": 10}, {"step": 11, "seconds": 24.0}]
    assert StepPace(GROWING, records, first_seconds=50.0).expected(11) == pytest.approx(24.0)
    assert StepPace(GROWING, records[:1]).expected(10) == pytest.approx(12.0)
    assert StepPace(GROWING, records[1:2], first_seconds=50.0).expected(10) == 0.0


def test_a_step_fits_if_it_would_be_done_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    pace = StepPace(GROWING, [], first_seconds=4.0)
    assert pace.fits(0, 104.0)
    assert not pace.fits(0, 103.9)
    assert pace.fits(0, math.inf)
    unknown = StepPace(GROWING, [])
    assert unknown.fits(0, 100.1)
    assert not unknown.fits(0, 100.0)
