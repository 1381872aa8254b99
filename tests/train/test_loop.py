"""Training learns and grows; a step runs what was drawn, at the rate that the plan says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.errors import CorpusError, TrainingError
from elastic_moe.routing import resolve
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.plan import parse_stages
from elastic_moe.train.progress import clock
from elastic_moe.train.sampling import SamplingPlan
from elastic_moe.train.tokens import TokenStream
from tests.train.small import CONFIG, PLAN, parameters, stream, trainer

ALWAYS_REDUCED = {"full": 0.0, "top_k": 0.0, "pool": 0.0, "threshold": 0.0}


def test_layers_that_have_not_grown_yet_neither_run_nor_change() -> None:
    it = trainer(replace(PLAN, sampling=SamplingPlan(full=1.0)))
    before = parameters(it)
    for _ in range(6):
        it.train_step()
    after = parameters(it)
    for name in before:
        late = name.startswith(("layers.1.", "layers.2.", "layers.4.", "layers.5."))
        assert torch.equal(before[name], after[name]) == late, name
    ids = torch.arange(20).unsqueeze(0)
    shape = CONFIG.shape
    grown = it.model(ids, resolve(shape))  # an untrained layer is the identity
    torch.testing.assert_close(grown, it.model(ids, resolve(shape, active_layers=[0, 3])))


def awake(plan_changes: dict) -> Trainer:
    """A trainer whose every parameter has a gradient: none starts at zero, nothing decays."""
    stages = parse_stages("6x4x1x128")
    it = trainer(replace(PLAN, stages=stages, weight_decay=0.0, **plan_changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in it.model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2, generator=generator)
    return it


def test_a_step_changes_no_layer_beyond_the_depth_that_was_drawn() -> None:
    it = awake({"sampling": SamplingPlan(**ALWAYS_REDUCED, depth=1.0, width=0.0, prefix=1.0)})
    depth = it.plan.subnet(CONFIG.shape, 0).depth
    assert 1 <= depth < 6
    before = parameters(it)
    assert it.train_step()["subnet"] == f"L{depth}"
    after = parameters(it)
    for layer in range(6):
        name = f"layers.{layer}.self_attn.o_proj.weight"
        assert torch.equal(before[name], after[name]) == (layer >= depth), name


def test_a_step_changes_no_channel_beyond_the_width_that_was_drawn() -> None:
    it = awake({"sampling": SamplingPlan(**ALWAYS_REDUCED, depth=0.0, width=1.0)})
    width = it.plan.subnet(CONFIG.shape, 0).uniform("width")
    assert 1 <= width < 4
    channels = width * CONFIG.shape.channels_per_granule
    before = parameters(it)
    it.train_step()
    after = parameters(it)
    for name, channel_axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
        full = f"layers.0.mlp.experts.{name}"
        change = (after[full] - before[full]).abs().movedim(channel_axis, 0).flatten(1).amax(1)
        assert (change[:channels] > 0).all(), name
        assert (change[channels:] == 0).all(), name


def test_the_balance_loss_reaches_the_routers() -> None:
    routers = []
    for balance in (0.0, 1.0):
        it = trainer(replace(PLAN, balance=balance, sampling=SamplingPlan(full=1.0)))
        it.train_step()
        routers.append(parameters(it)["layers.0.mlp.gate.weight"])
    assert not torch.equal(*routers)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_rates_follow_the_schedule_of_the_plan(factor: float) -> None:
    plan = replace(PLAN, warmup_steps=10, adam_lr=0.003 * factor, muon_lr=0.01 * factor)
    it = trainer(plan)
    for step in range(3):
        before = parameters(it)
        assert it.train_step()["lr_scale"] == pytest.approx((step + 1) / 10)
        if step == 0:  # the first step of Adam is its rate, in every weight that has a gradient
            moved = (parameters(it)["embed_tokens.weight"] - before["embed_tokens.weight"]).abs()
            assert float(moved.max()) == pytest.approx(plan.adam_lr / 10, rel=0.01)
        assert it.muon.param_groups[0]["lr"] == pytest.approx(plan.muon_lr * (step + 1) / 10)


def test_training_learns_a_rule_in_full_and_reduced_networks() -> None:
    config = replace(CONFIG, num_layers=3, num_experts=4, max_top_k=2)
    plan = replace(PLAN, stages=parse_stages("3x40x1x128"), adam_lr=0.02, decay_fraction=0.5)
    it = Trainer(config, plan, stream())
    records = [it.train_step() for _ in range(40)]
    assert records[0]["loss"] > 3.5  # log 64 is 4.16
    last = records[-12:]
    full = [record["loss"] for record in last if record["subnet"] == "full"]
    reduced = [record["loss"] for record in last if record["subnet"] != "full"]
    assert max(full) < 1.0
    assert sum(reduced) / len(reduced) < 2.0


def test_an_exploding_loss_stops_the_run_and_names_the_option_that_helps() -> None:
    it = trainer()
    with torch.no_grad():
        it.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan\. .*smaller --lr-scale"):
        it.train_step()


def test_what_a_model_cannot_do_is_refused_before_the_first_step() -> None:
    with pytest.raises(TrainingError, match=r"stage 1: layers must be in \[1, 6\], got 7"):
        trainer(replace(PLAN, stages=parse_stages("6x1x1x128,7x1x1x128")))
    with pytest.raises(TrainingError, match="tied_embeddings must be True, got False"):
        Trainer(replace(CONFIG, tied_embeddings=False), PLAN, stream())
    with pytest.raises(CorpusError, match="the stream has 100 tokens, a piece needs 512"):
        TokenStream(stream().tokens[:100], bos=63, seed=0)


def test_a_run_can_begin_with_given_weights_and_says_so(tmp_path: Path) -> None:
    weights = {name: p.bfloat16() for name, p in parameters(awake({})).items()}
    it = trainer()
    it.adopt(weights, parent="1234abcd")
    for name, p in parameters(it).items():
        assert torch.equal(p, weights[name].float()), name
    lines: list[str] = []
    run(it, tmp_path, report=lines.append)
    assert lines[0] == "begins with the weights of 1234abcd; the optimisers start anew"
    assert load_state(tmp_path / "state.safetensors")[1]["parent"] == "1234abcd"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record.get("parent") for record in log] == ["1234abcd"] + [None] * 13


def test_adopted_weights_must_be_the_models() -> None:
    whole = parameters(awake({}))
    name = "layers.3.self_attn.q_proj.weight"
    less = {key: p for key, p in whole.items() if key != name}
    for weights, message in (
        (less, f"parameter {name!r} is missing from the weights of 'x'"),
        ({**whole, "lm_head.weight": whole[name]}, "'lm_head.weight' is unknown, but among"),
        ({**whole, name: whole[name][:4]}, rf"{name!r} must have shape \(32, 32\), got \(4, 32\)"),
    ):
        it = trainer()
        before = parameters(it)
        with pytest.raises(TrainingError, match=message):
            it.adopt(weights, parent="x")
        assert all(torch.equal(p, before[key]) for key, p in parameters(it).items())
    it.train_step()
    with pytest.raises(TrainingError, match="before the first step, got step 1"):
        it.adopt(whole, parent="x")


def test_progress_is_reported_in_plain_lines_that_end_in_what_to_do(tmp_path: Path) -> None:
    lines: list[str] = []
    it = trainer()
    run(it, tmp_path, report=lines.append, report_seconds=0.0)
    assert len(lines) == 14 + 2
    assert lines[0].startswith("step 1 of 14, loss 4.")
    assert " tokens/s, 0:00:" in lines[0]
    assert lines[13].endswith(" tokens/s, 0:00:00 left")
    assert lines[14] == f"step 14 of 14 saved to {tmp_path / 'state.safetensors'}"
    assert f"python -m elastic_moe.train.export {tmp_path} FOLDER" in lines[15]
    lines.clear()
    run(trainer(), tmp_path / "quiet", report=lines.append, report_seconds=1000.0)
    assert [line.split(",")[0] for line in lines[:2]] == ["step 1 of 14", "step 14 of 14"]
    assert [clock(0), clock(61), clock(5025)] == ["0:00:00", "0:01:01", "1:23:45"]


def test_a_run_stops_when_its_time_is_up(tmp_path: Path) -> None:
    lines: list[str] = []
    it = trainer()
    run(it, tmp_path, max_seconds=0, report=lines.append)
    assert it.step == 0
    assert lines[-1] == "next: the same command goes on from there"
    began = time.monotonic()
    slow = trainer(replace(PLAN, stages=parse_stages("2x100000x1x128")))
    run(slow, tmp_path / "slow", max_seconds=0.2)
    assert 1 <= slow.step < 1000
    assert time.monotonic() - began < 30
