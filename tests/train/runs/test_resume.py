"""A run that is stopped, or killed at any moment, goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.errors import TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.train.ledger import replay
from elastic_moe.train.runs.folder import LOCK
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state, save_state
from elastic_moe.train.step.trainer import Trainer
from tests.train.runs.kills import SAVE_EVERY
from tests.train.tiny import CONFIG, PLAN, parameters, stream, trainer

ROOT = Path(__file__).resolve().parents[3]
STATE = "state.safetensors"


def logged_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_states(one: Path, other: Path) -> None:
    """Bit for bit: weights, momenta, counters."""
    tensors, progress = load_state(one)
    expected, expected_progress = load_state(other)
    assert progress == expected_progress
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def stopped(folder: Path, steps: int = 7) -> None:
    """The folder of a run that was stopped after some steps."""
    it = trainer()
    for _ in range(steps):
        it.train_step()
    folder.mkdir()
    it.save(folder / STATE)


BIASED = replace(CONFIG, model_type="ernie4_5_moe", selection_bias=True)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, {}),
        (CONFIG, {"sampling": SamplingPlan()}),
        (CONFIG, {"sampling": SamplingPlan(), "distill": 0.5}),
        (CONFIG, {"sampling": SamplingPlan(), "sandwich": True}),
        (CONFIG, {"sampling": SamplingPlan(), "sandwich": True, "distill": 1.0}),
        (CONFIG, {"sampling": SamplingPlan(), "split": 0.5}),
        (CONFIG, {"sampling": SamplingPlan(fixed="L3-p4")}),
        (CONFIG, {"dtype": "bfloat16"}),
        (BIASED, {"bias_rate": 0.01}),
    ],
    ids=[
        *("plain", "default-draws", "distill", "sandwich", "sandwich-distill", "split", "fixed"),
        *("bfloat16", "bias"),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(
    config: ModelConfig, options: dict, tmp_path: Path
) -> None:
    plan = replace(PLAN, stages=parse_stages("2x3x1x128,6x4x1x128"), **options)
    straight, stopped, resumed = (Trainer(config, plan, stream()) for _ in range(3))
    run_steps(straight, tmp_path / "straight")
    (tmp_path / "stopped").mkdir()
    for _ in range(4):
        stopped.train_step()
    stopped.save(tmp_path / "stopped" / STATE)
    run_steps(resumed, tmp_path / "stopped")
    assert resumed.step == straight.step == 7
    assert resumed.tokens == straight.tokens
    assert_same_states(tmp_path / "stopped" / STATE, tmp_path / "straight" / STATE)
    assert logged_steps(tmp_path / "straight") == list(range(1, 8))
    assert logged_steps(tmp_path / "stopped") == [5, 6, 7]  # it did not begin again


def test_what_a_kill_left_of_files_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    left = [tmp_path / ".log.csv.7.part", tmp_path / "data" / ".train.npy.7.part"]
    left += [tmp_path / ".tmpAb3xY9"]  # of safetensors
    kept = [tmp_path / "notes.part", tmp_path / ".mine", tmp_path / ".tmp-notes"]
    for path in (*left, *kept):
        path.write_text("half")
    run_steps(trainer(), tmp_path, max_seconds=0)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_a_run_resumes_with_the_weights_that_it_started_with_only(tmp_path: Path) -> None:
    weights = parameters(trainer(replace(PLAN, seed=5)))
    earlier = trainer()
    earlier.adopt(weights, parent="good")
    run_steps(earlier, tmp_path, max_seconds=0)
    for wrong, message in ((None, "not with random weights"), ("bad", "not with bad")):
        it = trainer()
        if wrong is not None:
            it.adopt(weights, parent=wrong)
        with pytest.raises(TrainingError, match=f"started with good, {message}"):
            run_steps(it, tmp_path)
    right = trainer()
    right.adopt(weights, parent="good")
    run_steps(right, tmp_path)
    assert load_state(tmp_path / STATE)[1]["parent"] == "good"
    run_steps(trainer(), tmp_path / "random", max_seconds=0)
    other = trainer()
    other.adopt(weights, parent="good")
    with pytest.raises(TrainingError, match="started with random weights, not with good"):
        run_steps(other, tmp_path / "random")


def test_steps_that_a_kill_undid_are_logged_once(tmp_path: Path) -> None:
    stopped(tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": -1.0}) for step in range(1, 10)]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join([*lines, '{"step": 10, "lo']))
    run_steps(trainer(), tmp_path / "run")
    assert logged_steps(tmp_path / "run") == list(range(1, 15))
    (tmp_path / "run" / STATE).unlink()  # killed before the first state
    run_steps(trainer(), tmp_path / "run", max_seconds=0)
    assert logged_steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"plan": replace(PLAN, stages=parse_stages("2x6x1x128"))}, "plan: stages"),
        ({"plan": replace(PLAN, adam_lr=0.1)}, "plan: adam_lr = 0.0045, got 0.1"),
        ({"config": replace(CONFIG, max_top_k=2)}, "model: max_top_k = 3, got 2"),
        ({"stream": stream("other text")}, "data: source = '', got 'other text'"),
    ],
    ids=["shorter-plan", "rate", "model", "data"],
)
def test_a_run_resumes_with_its_own_plan_model_and_data_only(
    other: dict, field: str, tmp_path: Path
) -> None:
    run_steps(trainer(), tmp_path, max_seconds=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = {"config": CONFIG, "plan": PLAN, "stream": stream(), **other}
    with pytest.raises(TrainingError, match=f"was trained with another {field}"):
        run_steps(Trainer(**made), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_how_often_states_are_saved_may_change(tmp_path: Path) -> None:
    run_steps(trainer(), tmp_path, max_seconds=0)
    first_plan = (tmp_path / "plan.json").read_bytes()
    run_steps(trainer(replace(PLAN, save_every_steps=5)), tmp_path)
    assert load_state(tmp_path / STATE)[1]["step"] == 14
    assert (tmp_path / "plan.json").read_bytes() == first_plan


def test_the_plan_of_a_state_replays_to_what_was_done(tmp_path: Path) -> None:
    run_steps(trainer(), tmp_path)
    _, progress = load_state(tmp_path / STATE)
    assert TrainingPlan.from_json(progress["plan"]) == PLAN
    assert json.loads((tmp_path / "plan.json").read_text()) == progress["plan"]
    assert replay(PLAN, CONFIG.shape, progress["step"]).tokens == progress["tokens"]


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / STATE
    save_state(path, {"a": torch.ones(1)}, {"step": 1})
    tensors, progress = load_state(path)
    assert (float(tensors["a"]), progress["step"]) == (1.0, 1)
    save_state(path, {}, {"format": 99})
    with pytest.raises(TrainingError, match="format 99, this version reads 3"):
        load_state(path)


# The disk is full for files beyond 100 kB, of which a state is one.
_FULL = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from elastic_moe.errors import TrainingError
from elastic_moe.train.runs.loop import run_steps
from tests.train.tiny import trainer

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    run_steps(trainer(), Path(sys.argv[1]))
except TrainingError as error:
    print(error)
"""


def test_a_full_disk_ends_the_run_in_words_and_leaves_the_old_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder)
    state = folder / STATE
    (folder / "other").write_bytes(b"")
    assert state.stat().st_mode == (folder / "other").stat().st_mode  # as any new file
    before = state.read_bytes()
    assert len(before) > 100_000
    command = [sys.executable, "-c", _FULL.format(root=str(ROOT)), str(folder)]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    assert done.stdout.startswith(f"{state} cannot be written: ")
    assert "The state before it is kept. Make room" in done.stdout
    assert state.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [LOCK, "log.jsonl", "other", STATE]
    run_steps(trainer(), folder)
    assert load_state(state)[1]["step"] == 14
    assert logged_steps(folder) == list(range(8, 15))


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "empty"])
def test_a_torn_state_is_refused_in_words_and_left_as_it_is(share: float, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder)
    state = folder / STATE
    torn = state.read_bytes()[: int(share * state.stat().st_size)]
    state.write_bytes(torn)
    with pytest.raises(TrainingError) as caught:
        run_steps(trainer(), folder)
    assert str(caught.value).startswith(f"{state} cannot be read: ")
    assert "Put a whole copy in its place. Without it, the same command starts" in str(caught.value)
    assert state.read_bytes() == torn
    state.unlink()
    run_steps(trainer(), folder, max_seconds=0)
    assert load_state(state)[1]["step"] == 0


# Kills itself, as the kernel would: no `finally` runs, no buffer is written.
_CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from elastic_moe.train.runs import loop
from elastic_moe.train.step import state
from tests.train.tiny import trainer

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def while_writing_step_6(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if '"step": 6' in metadata["elastic_moe_training"]:
        os.truncate(path, os.path.getsize(path) // 2)
        kill()

class AfterStep8(loop.Progress):
    def step_done(self, record):
        if record["step"] == 8:
            kill()

save_file = state.save_file
if sys.argv[2] == "while-writing":
    state.save_file = while_writing_step_6
else:
    loop.Progress = AfterStep8
loop.run_steps(trainer(), Path(sys.argv[1]))
"""


def test_a_killed_run_becomes_bit_for_bit_the_run_that_was_not(tmp_path: Path) -> None:
    run_steps(trainer(), tmp_path / "straight")
    killed = tmp_path / "killed"
    for moment, saved, logged in (("while-writing", 3, 6), ("between", 6, 8)):
        command = [sys.executable, "-c", _CHILD.format(root=str(ROOT)), str(killed), moment]
        done = subprocess.run(command, check=False, timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert load_state(killed / STATE)[1]["step"] == saved
        assert logged_steps(killed) == list(range(1, logged + 1))
    run_steps(trainer(), killed)
    assert_same_states(killed / STATE, tmp_path / "straight" / STATE)
    assert logged_steps(killed) == list(range(1, 15))
    assert sorted(p.name for p in killed.iterdir()) == [LOCK, "log.jsonl", "plan.json", STATE]


def test_kills_at_random_moments_lose_no_more_than_one_interval(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.runs.kills", str(tmp_path), "20"]
    out = subprocess.run(command, cwd=ROOT, check=True, timeout=240, stdout=subprocess.PIPE).stdout
    kills = [json.loads(line) for line in out.splitlines()]
    assert len(kills) == 20
    for one in kills:
        assert one["before"] <= one["after"] <= one["logged"]  # the last state is never lost
        assert one["logged"] - one["after"] <= SAVE_EVERY
    assert any(one["logged"] > one["after"] for one in kills)  # some did undo steps
    assert_same_states(tmp_path / "killed" / STATE, tmp_path / "straight" / STATE)
    steps = logged_steps(tmp_path / "straight")
    assert logged_steps(tmp_path / "killed") == steps == list(range(1, steps[-1] + 1))
    names = [LOCK, "log.jsonl", "plan.json", STATE]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == names
