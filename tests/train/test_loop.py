"""Training learns, grows, and resumes as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_moe.errors import TrainingError
from elastic_moe.routing import resolve
from elastic_moe.train.checkpoint import load_state, save_state
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.plan import TrainingPlan, parse_stages
from elastic_moe.train.sampling import SamplingPlan
from elastic_moe.train.tokens import TokenStream
from tests.conftest import TINY

CONFIG = replace(TINY, vocab_size=64)
PLAN = TrainingPlan(
    stages=parse_stages("2x6x1x128,6x8x1x128"),
    sampling=SamplingPlan(full=0.4),
    warmup_steps=2,
    save_every_steps=3,
)


def stream() -> TokenStream:
    """A text whose next token is a fixed function of the last."""
    tokens = np.arange(512 * 40, dtype=np.uint16) * 7 % 61
    return TokenStream(tokens, bos=63, seed=0)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path: Path) -> None:
    straight = Trainer(CONFIG, PLAN, stream())
    run(straight, tmp_path / "straight")
    stopped = Trainer(CONFIG, PLAN, stream())
    for _ in range(7):
        stopped.train_step()
    stopped.save(tmp_path / "state.safetensors")
    resumed = Trainer(CONFIG, PLAN, stream())
    (tmp_path / "resumed").mkdir()
    (tmp_path / "state.safetensors").rename(tmp_path / "resumed" / "state.safetensors")
    run(resumed, tmp_path / "resumed")
    assert resumed.step == straight.step == 14
    assert resumed.tokens == straight.tokens
    for name, p in parameters(straight).items():
        assert torch.equal(p, parameters(resumed)[name]), name


def test_layers_that_have_not_grown_yet_neither_run_nor_change() -> None:
    trainer = Trainer(CONFIG, replace(PLAN, sampling=SamplingPlan(full=1.0)), stream())
    before = parameters(trainer)
    for _ in range(6):
        trainer.train_step()
    after = parameters(trainer)
    for name in before:
        late = name.startswith(("layers.1.", "layers.2.", "layers.4.", "layers.5."))
        assert torch.equal(before[name], after[name]) == late, name
    ids = torch.arange(20).unsqueeze(0)
    shape = CONFIG.shape
    grown = trainer.model(ids, resolve(shape))  # an untrained layer is the identity
    torch.testing.assert_close(grown, trainer.model(ids, resolve(shape, active_layers=[0, 3])))


def test_training_learns_a_rule_in_full_and_reduced_networks() -> None:
    stages = parse_stages("6x120x2x128")
    plan = replace(PLAN, stages=stages, adam_lr=0.01, decay_fraction=0.5)
    trainer = Trainer(CONFIG, plan, stream())
    records = [trainer.train_step() for _ in range(120)]
    assert records[0]["loss"] > 3.5
    last = records[-30:]
    full = [record["loss"] for record in last if record["subnet"] == "full"]
    reduced = [record["loss"] for record in last if record["subnet"] != "full"]
    assert max(full) < 1.0
    assert sum(reduced) / len(reduced) < 2.0


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(1)}, {"step": 1})
    tensors, progress = load_state(path)
    assert (float(tensors["a"]), progress["step"]) == (1.0, 1)
    save_state(path, {}, {"format": 99})
    with pytest.raises(TrainingError, match="format 99, this version reads 1"):
        load_state(path)


_CHILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.train.test_loop import CONFIG, PLAN, stream
from dataclasses import replace
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.plan import parse_stages
plan = replace(PLAN, stages=parse_stages("6x100000x1x128"), save_every_steps=2)
run(Trainer(CONFIG, plan, stream()), Path(sys.argv[1]))
"""


def test_a_kill_at_any_moment_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    state = tmp_path / "state.safetensors"
    last = 0
    for delay in (0.0, 0.13, 0.31):
        command = [sys.executable, "-c", _CHILD.format(root=root), str(tmp_path)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 120
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, progress = load_state(state)
        assert progress["step"] > last
        assert progress["step"] % 2 == 0
        last = progress["step"]
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in log[:-1]) <= last + 2


def test_an_exploding_loss_stops_the_run() -> None:
    trainer = Trainer(CONFIG, PLAN, stream())
    with torch.no_grad():
        trainer.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan\. Lower the rates"):
        trainer.train_step()
