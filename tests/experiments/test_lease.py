"""What travels to a lent machine and back: the same text, a state that goes on, whole weights."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_moe.errors import CheckpointError, CorpusError, TrainingError
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state
from elastic_moe.train.text.prepare import Mixture, open_stream, prepare
from experiments import lease
from experiments.science import runs
from experiments.science import train as science
from tests.train.tiny import CONFIG, library, novels

TINY = replace(CONFIG, vocab_size=400)
PLAN = TrainingPlan(
    stages=parse_stages("6x6x1x128"), sampling=SamplingPlan(), warmup_steps=40, save_every_steps=2
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    prepare(folder, library(tmp_path), novels(tmp_path), Mixture(), vocab_size=400)
    return folder


def train(tmp_path: Path, state: str, seconds: float, packed: str = "lease") -> Path:
    return lease.train_mini(
        tmp_path / packed,
        tmp_path / state,
        tmp_path / f"out-{state}",
        PLAN,
        seconds=seconds,
        device="cpu",
        config=TINY,
    )


def test_the_text_arrives_as_it_left_and_smaller(data: Path, tmp_path: Path) -> None:
    size = lease.pack(data, tmp_path / "lease")
    assert size < (data / "train.npy").stat().st_size
    assert not list((tmp_path / "lease").glob("*.npy"))
    lease.unpack(tmp_path / "lease", tmp_path / "there")
    here, there = open_stream(data, 0), open_stream(tmp_path / "there", 0)
    assert np.array_equal(here.tokens, there.tokens)
    assert here.source == there.source


def test_text_that_was_damaged_on_the_way_is_refused(data: Path, tmp_path: Path) -> None:
    lease.pack(data, tmp_path / "lease")
    tokens = np.load(data / "train.npy")
    tokens[5] += 1
    np.save(data / "train.npy", tokens)
    lease.pack(data, tmp_path / "lease")
    for _ in range(2):  # what the first call left is not taken for whole by the second
        with pytest.raises(CorpusError, match=r"stream_sha256 .* pack the text again"):
            lease.unpack(tmp_path / "lease", tmp_path / "there")


def test_another_text_than_the_run_was_started_with_is_refused(data: Path, tmp_path: Path) -> None:
    lease.pack(data, tmp_path / "lease")
    lease.unpack(tmp_path / "lease", tmp_path / "there")
    lease.unpack(tmp_path / "lease", tmp_path / "there")
    other = tmp_path / "other"
    (tmp_path / "shorter").mkdir()
    prepare(other, library(tmp_path / "shorter", 100), [], Mixture(), vocab_size=400)
    lease.pack(other, tmp_path / "lease")
    with pytest.raises(CorpusError, match="a run goes on with the text of its start"):
        lease.unpack(tmp_path / "lease", tmp_path / "there")


def test_tokens_that_are_none_are_refused(data: Path, tmp_path: Path) -> None:
    (data / "train.npy").write_bytes(b"half")
    with pytest.raises(CorpusError, match=r"train.npy cannot be read: .* Prepare it again"):
        lease.pack(data, tmp_path / "lease")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error_of_one_line(
    device: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease.pack(data, tmp_path / "lease")
    arguments = ["--packed", str(tmp_path / "lease"), "--state", str(tmp_path / "state")]
    arguments += ["--out", str(tmp_path / "out"), "--device", device, "--science"]
    assert lease.main(["train", *arguments]) == 1
    assert f"error: --device {device} cannot be used here: " in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "half a token"])
def test_text_that_cannot_be_unpacked_is_refused(
    data: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lease.pack(data, tmp_path / "lease")
    path = tmp_path / "lease" / lease.PACKED_TOKENS
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-9],
        "flipped": whole[:40] + bytes([whole[40] ^ 255]) + whole[41:],
        "half a token": lzma.compress(b"123"),
    }
    path.write_bytes(broken[damage])
    with pytest.raises(CorpusError, match=r"tokens.xz cannot be unpacked: .* damaged on the way"):
        lease.unpack(tmp_path / "lease", tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert train_science(tmp_path, "state") == 1
    assert "error: " in capsys.readouterr().err


def test_more_than_may_travel_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MOST_PACKED_BYTES", 1000)
    with pytest.raises(TrainingError, match="at most 1,000 may travel"):
        lease.pack(data, tmp_path / "lease")


def test_calls_of_one_lease_go_on_and_a_later_lease_begins_with_the_weights(
    data: Path, tmp_path: Path
) -> None:
    lease.pack(data, tmp_path / "lease")
    train(tmp_path, "state", 0.0)
    state = tmp_path / "state" / "mini" / "state.safetensors"
    assert load_state(state)[1]["step"] == 0
    back = train(tmp_path, "state", 60.0)
    assert load_state(state)[1]["step"] == 6
    assert load_state(state)[1]["plan"]["warmup_steps"] == 40
    assert len((back / "log.jsonl").read_text().splitlines()) == 6

    (taken,) = lease.take(tmp_path / "out-state", tmp_path / "here")
    assert taken == tmp_path / "here" / "mini" / "checkpoint"
    lease.pack(data, tmp_path / "second", weights=taken)
    for seconds in (0.0, 60.0):  # stopped at once, then to its end
        back = train(tmp_path, "later", seconds, packed="second")
    progress = load_state(tmp_path / "later" / "mini" / "state.safetensors")[1]
    assert progress["plan"]["warmup_steps"] == lease.REWARM_STEPS
    assert progress["parent"] == f"sha256:{Checkpoint(taken).files.sha256()}"
    manifest = json.loads((back / "checkpoint" / "manifest.json").read_text())
    assert progress["parent"] in json.dumps(manifest)
    before, after = Checkpoint(taken), Checkpoint(back / "checkpoint")
    name = "layers.0.self_attn.q_proj.weight"
    moved = after.read(name, "float32") - before.read(name, "float32")
    assert 0 < np.abs(moved).mean() < np.abs(before.read(name, "float32")).mean()


def train_science(tmp_path: Path, state: str, *more: str) -> int:
    command = ["train", "--science", "--packed", str(tmp_path / "lease"), "--device", "cpu"]
    command += ["--state", str(tmp_path / state), "--out", str(tmp_path / f"out-{state}")]
    return lease.main([*command, "--tokens", "4096", *more])


@pytest.fixture
def tiny_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed text, and networks of the experiment that train in a second."""
    small = replace(runs.CONFIG, vocab_size=400, hidden_size=16, expert_hidden=8, head_dim=8)
    monkeypatch.setattr(science, "CONFIG", small)
    lease.pack(data, tmp_path / "lease")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small to share, and slow where cores are busy
    yield
    torch.set_num_threads(threads)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.usefixtures("tiny_runs")
def test_a_second_lease_trains_the_runs_that_are_named_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_science(tmp_path, "first", "--only", "elastic-0,pool8-0") == 0
    assert names_in(tmp_path / "first" / "science") == ["elastic-0", "pool8-0"]
    assert names_in(tmp_path / "out-first" / "science") == ["elastic-0", "pool8-0"]
    assert train_science(tmp_path, "second", "--only", "inelastic-1") == 0  # nothing is there
    assert names_in(tmp_path / "second" / "science") == ["inelastic-1"]
    back = tmp_path / "out-second" / "science"
    assert names_in(back) == ["inelastic-1"]
    assert names_in(back / "inelastic-1") == ["checkpoint", "log.jsonl", "sittings.jsonl"]
    manifest = json.loads((back / "inelastic-1" / "checkpoint" / "manifest.json").read_text())
    assert manifest["training"]["tokens"] == 4096
    plan = manifest["training"]["plan"]
    assert (plan["seed"], plan["dtype"], plan["sampling"]["fixed"]) == (1, "float32", "full")
    # The same lease goes on, and what is finished comes back without another step.
    shutil.rmtree(tmp_path / "out-first")
    capsys.readouterr()
    assert train_science(tmp_path, "first", "--only", "pool8-0") == 0
    assert "pool8-0: finished before" in capsys.readouterr().out
    assert names_in(tmp_path / "out-first" / "science") == ["pool8-0"]


@pytest.mark.usefixtures("tiny_runs")
def test_runs_have_the_dtype_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--only", "elastic-0", "--dtype"]
    assert train_science(tmp_path, "state", *command, "bfloat16", "--minutes", "0") == 0
    assert names_in(tmp_path / "out-state") == []
    assert train_science(tmp_path, "state", *command, "bfloat16") == 0
    manifest = tmp_path / "out-state" / "science" / "elastic-0" / "checkpoint" / "manifest.json"
    assert json.loads(manifest.read_text())["training"]["plan"]["dtype"] == "bfloat16"
    assert train_science(tmp_path, "state", *command, "float32") == 1
    assert "finished with another plan: dtype = 'bfloat16', got 'float32'" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("tiny_runs")
def test_an_unknown_run_is_refused_before_anything_is_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_science(tmp_path, "state", "--only", "elastic") == 1
    assert "no run 'elastic'; there are elastic-0" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "option", [["--only", "elastic-0"], ["--dtype", "float32"], ["--tokens", "4096"]]
)
def test_options_of_the_science_are_not_ignored_with_a_plan(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--packed", "x", "--state", "x", "--out", "x"]
    with pytest.raises(SystemExit) as error:
        lease.main(["train", "--plan", "plan.json", *folders, *option])
    assert error.value.code == 2
    assert f"{option[0]} is for --science" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"stages": [{"x": 1}], "sampling": {}}'])
def test_a_plan_that_is_none_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(text)
    command = ["train", "--plan", str(tmp_path / "plan.json"), "--packed", "x", "--state", "x"]
    assert lease.main([*command, "--out", "x"]) == 1
    assert "plan.json is no plan of a training run" in capsys.readouterr().err


def test_weights_come_back_in_few_small_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease.pack(data, tmp_path / "lease")
    monkeypatch.setattr(lease, "SHARD_BYTES", 100_000)
    back = train(tmp_path, "state", 60.0)
    assert 1 < len(list((back / "checkpoint").glob("*.safetensors"))) <= 3
    monkeypatch.setattr(lease, "SHARD_BYTES", 10_000)
    with pytest.raises(TrainingError, match="1 to 3 files below 16 MiB"):
        train(tmp_path, "state", 60.0)


def test_what_is_not_whole_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no checkpoint"):
        lease.take(tmp_path, tmp_path / "here")
    (tmp_path / "mini" / "checkpoint").mkdir(parents=True)
    (tmp_path / "mini" / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match="1 to 3 files"):
        lease.take(tmp_path, tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("damage", ["cut", "not a number", "no header"])
def test_damaged_weights_are_refused_and_nothing_is_taken(
    tmp_path: Path, tiny_folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b"):
        shutil.copytree(tiny_folder, tmp_path / "back" / run / "checkpoint")
    path = tmp_path / "back" / "b" / "checkpoint" / "model.safetensors"
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-10],
        "not a number": whole[:-2] + b"\xff\x7f",
        "no header": b"\xff" * 100,
    }
    path.write_bytes(broken[damage])
    with pytest.raises(CheckpointError, match=r"b/checkpoint/model.safetensors"):
        lease.take(tmp_path / "back", tmp_path / "here")
    assert lease.main(["take", str(tmp_path / "back"), "--into", str(tmp_path / "here")]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_what_is_taken_replaces_all_of_an_older_checkpoint(
    tmp_path: Path, tiny_folder: Path
) -> None:
    back, here = tmp_path / "back", tmp_path / "here"
    shutil.copytree(tiny_folder, back / "a" / "checkpoint")
    (back / "a" / "log.jsonl").write_text("new")
    (here / "a" / "checkpoint").mkdir(parents=True)
    (here / "a" / "checkpoint" / "model-00001-of-00002.safetensors").write_text("old")
    (here / "a" / "plan.json").write_text("kept")
    assert lease.take(back, here) == [here / "a" / "checkpoint"]
    assert names_in(here / "a" / "checkpoint") == names_in(tiny_folder)
    assert names_in(here / "a") == ["checkpoint", "log.jsonl", "plan.json"]
    assert (here / "a" / "plan.json").read_text() == "kept"
    with pytest.raises(TrainingError, match="is a checkpoint itself"):
        lease.take(back / "a" / "checkpoint", here)
