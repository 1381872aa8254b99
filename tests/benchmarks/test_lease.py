"""What travels to a lent machine and back: the same text, a state that goes on, whole weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import lease
from elastic_moe.errors import CorpusError, TrainingError
from elastic_moe.model.checkpoint import Checkpoint
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.data import Mixture, open_stream, prepare
from elastic_moe.train.plan import TrainingPlan, parse_stages
from elastic_moe.train.sampling import SamplingPlan
from tests.train.small import CONFIG, library, novels

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
    with pytest.raises(CorpusError, match="stream_sha256"):
        lease.unpack(tmp_path / "lease", tmp_path / "there")


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
    moved = after.read(name, torch.float32) - before.read(name, torch.float32)
    assert 0 < float(moved.abs().mean()) < float(before.read(name, torch.float32).abs().mean())


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
