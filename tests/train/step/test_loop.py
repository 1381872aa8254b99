"""Training learns and grows; a step runs what was drawn, at the rate that the plan says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.errors import CorpusError, TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.routing import resolve
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event, Notice, clock
from elastic_moe.train.step.optim import orthogonalize
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.tokens import TokenStream
from tests.train.tiny import CONFIG, PLAN, parameters, stream, trainer

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


def awake(plan_changes: dict, config: ModelConfig = CONFIG) -> Trainer:
    """A trainer whose every parameter has a gradient: none starts at zero, nothing decays."""
    stages = parse_stages("6x4x1x128")
    plan = replace(PLAN, **{"stages": stages, "weight_decay": 0.0, **plan_changes})
    it = Trainer(config, plan, stream())
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


def change(before: dict, after: dict, name: str, axis: int) -> torch.Tensor:
    """The largest change at each index of an axis of a matrix of the first layer's experts."""
    moved = after[f"layers.0.mlp.experts.{name}"] - before[f"layers.0.mlp.experts.{name}"]
    return moved.abs().movedim(axis, 0).flatten(1).amax(1)


def test_the_first_step_changes_no_channel_beyond_the_width_that_was_drawn() -> None:
    it = awake({"sampling": SamplingPlan(**ALWAYS_REDUCED, depth=0.0, width=1.0)})
    width = it.plan.subnet(CONFIG.shape, 0).uniform("expert_width")
    assert 1 <= width < 4
    channels = width * CONFIG.shape.channels_per_granule
    before = parameters(it)
    it.train_step()
    after = parameters(it)
    for name, channel_axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
        moved = change(before, after, name, channel_axis)
        assert (moved[:channels] > 0).all(), name
        assert (moved[channels:] == 0).all(), name


def test_what_a_later_step_leaves_out_goes_on_by_its_momentum_but_layers_do_not() -> None:
    it = awake({"sampling": SamplingPlan(full=1.0), "warmup_steps": 1})
    for _ in range(2):
        it.train_step()
    it.plan = replace(it.plan, sampling=SamplingPlan(fixed="L3-w2-p4"))
    before = parameters(it)
    momenta = {name: it.muon.state[p]["momentum"].clone() for name, p in muon_parameters(it)}
    it.train_step()
    after = parameters(it)
    channels = 2 * CONFIG.shape.channels_per_granule
    for name, channel_axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
        by_channel = change(before, after, name, channel_axis)
        by_expert = change(before, after, name, 0)
        for ran, left_out in (
            (by_channel[:channels], by_channel[channels:]),
            (by_expert[:4], by_expert[4:]),
        ):
            assert left_out.min() > 0, name
            assert left_out.mean() > 0.5 * ran.mean(), name  # a step of full size
    for name, p in muon_parameters(it):
        idle = name.startswith(("layers.3.", "layers.4.", "layers.5."))
        assert torch.equal(before[name], after[name]) == idle, name
        assert torch.equal(momenta[name], it.muon.state[p]["momentum"]) == idle, name
        if "experts" in name and not idle:
            left_out = it.muon.state[p]["momentum"][4:]
            torch.testing.assert_close(left_out, 0.95 * momenta[name][4:])


def test_every_step_reads_the_pieces_after_those_of_the_step_before(tmp_path: Path) -> None:
    plan = replace(PLAN, stages=parse_stages("2x2x2x128,6x2x1x256"))

    def pieces(it: Trainer, steps: int) -> list[tuple[int, int, int]]:
        asked: list[tuple[int, int, int]] = []
        real = it.stream.batch

        def watched(first: int, count: int, length: int) -> tuple:
            asked.append((first, count, length))
            return real(first, count, length)

        it.stream.batch = watched
        reported.extend(it.train_step()["tokens"] for _ in range(steps))
        return asked

    reported: list[int] = []
    earlier, resumed = trainer(plan), trainer(plan)
    assert pieces(earlier, 3) == [(0, 2, 128), (2, 2, 128), (4, 1, 256)]
    earlier.save(tmp_path / "state.safetensors")
    resumed.load(tmp_path / "state.safetensors")
    assert pieces(resumed, 1) == [(5, 1, 256)]
    assert reported == [1024, 2048, 2560, 3072]  # a piece has 512


def muon_parameters(it: Trainer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in it.model.named_parameters() if p in it.muon.state]


def test_the_balance_loss_reaches_the_routers() -> None:
    routers = []
    for balance in (0.0, 1.0):
        it = trainer(replace(PLAN, balance=balance, sampling=SamplingPlan(full=1.0)))
        it.train_step()
        routers.append(parameters(it)["layers.0.mlp.gate.weight"])
    assert not torch.equal(*routers)


def test_the_balance_of_a_layer_is_told_whatever_their_number() -> None:
    for name in ("L1", "full"):
        it = trainer(
            replace(PLAN, stages=parse_stages("6x6x1x128"), sampling=SamplingPlan(fixed=name))
        )
        assert it.train_step()["balance"] == pytest.approx(1.0, abs=0.25)


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


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    it = trainer()
    it.train_step()
    before = parameters(it)
    it.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the norm of the gradient is (inf|nan)\. "):
        it.train_step()
    assert it.step == 1
    assert all(torch.equal(p, before[name]) for name, p in parameters(it).items())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def spoiled_after(step: int, plan: TrainingPlan, folder: Path) -> str:
        it = trainer(plan)

        def spoil(event: Event) -> None:
            if str(event).startswith(f"step {step} "):
                with torch.no_grad():
                    it.model.layers[1].self_attn.q_proj.weight[2, 3] = float("-inf")

        with pytest.raises(TrainingError) as caught:
            run_steps(it, folder, report=spoil, report_seconds=0)
        assert [p.name for p in folder.glob(".*.part")] == []
        return str(caught.value)

    state = tmp_path / "state.safetensors"
    message = spoiled_after(3, replace(PLAN, save_every_steps=1), tmp_path)
    assert message == (
        f"step 3: layers.1.self_attn.q_proj.weight has numbers that are not finite, so {state} is "
        f"left as it was. Lower the rates: start again in another folder with a smaller --lr-scale."
    )
    tensors, progress = load_state(state)
    assert progress["step"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    one = replace(PLAN, stages=parse_stages("6x1x1x128"))
    assert spoiled_after(1, one, tmp_path / "end").startswith("step 1: layers.1.self_attn.q_proj")
    assert not (tmp_path / "end" / "state.safetensors").exists()


def test_the_usual_plan_has_these_rates() -> None:
    plan = TrainingPlan(stages=parse_stages("6x1x1x128")).to_json()
    rates = {name: value for name, value in plan.items() if name not in ("stages", "sampling")}
    assert rates == {
        "seed": 0,
        "muon_lr": 0.02,
        "adam_lr": 0.0045,
        "weight_decay": 0.01,
        "warmup_steps": 100,
        "decay_fraction": 0.25,
        "final_lr": 0.04,
        "balance": 0.003,
        "clip": 1.0,
        "save_every_steps": 100,
        "distill": 0.0,
        "sandwich": False,
        "split": 0.0,
        "bias_rate": 0.0,
        "dtype": "float32",
    }


def test_only_gradients_beyond_the_clip_are_shortened_to_it() -> None:
    found = []
    for clip in (1e9, 0.01):
        it = awake({"sampling": SamplingPlan(full=1.0), "clip": clip})
        for optimizer in (it.muon, it.adam):
            optimizer.step = lambda: None
            optimizer.zero_grad = lambda **_: None
        record = it.train_step()
        norms = [
            torch.stack([p.grad.norm() for p in optimizer.param_groups[0]["params"]]).norm()
            for optimizer in (it.adam, it.muon)
        ]
        found.append((record["grad_norm"], *map(float, norms)))
    (logged, by_adam, by_muon), (logged_too, clipped, by_muon_too) = found
    assert logged == logged_too == pytest.approx(by_adam, abs=1e-3)
    assert by_adam > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert by_muon_too == by_muon  # an orthogonal update has its own size


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonal(matrix.T).T * (rows / columns) ** 0.5
    return orthogonalize(matrix.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("head_dim", [8, 16], ids=["reference", "cpu"])
def test_two_steps_are_those_of_the_formulas(head_dim: int) -> None:
    """AdamW of betas 0.9 and 0.95 without decay; Muon of momentum 0.95 with the plan's."""
    options = {"warmup_steps": 1, "decay_fraction": 0.0, "weight_decay": 2.0}
    it = awake({"sampling": SamplingPlan(full=1.0), **options}, replace(CONFIG, head_dim=head_dim))
    assert it.backend == ("cpu" if head_dim == 16 else "reference")
    names = ("embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight")
    model = dict(it.model.named_parameters())
    expected = {name: model[name].detach().clone() for name in names}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    gradients: dict[str, torch.Tensor] = {}
    real = it.muon.step

    def watched() -> None:
        gradients.update({name: model[name].grad.clone() for name in names})
        real()

    it.muon.step = watched
    assert it.adam.param_groups[0]["weight_decay"] == 0.0
    for step in (1, 2):
        it.train_step()
        for name, p in expected.items():
            g = gradients[name]
            if name.endswith("q_proj.weight"):
                first[name] = 0.95 * first[name] + 0.05 * g
                update = orthogonal(0.05 * g + 0.95 * first[name])
                p.mul_(1 - 0.02 * 2.0).sub_(update, alpha=0.02)
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g * g
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
                p.sub_(0.0045 * mean / (square.sqrt() + 1e-8))
    for name, p in expected.items():
        torch.testing.assert_close(model[name].detach(), p, rtol=2e-4, atol=2e-5, msg=name)


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
    events: list[Event] = []
    run_steps(it, tmp_path, report=events.append)
    assert str(events[0]) == "starts with the weights of 1234abcd and fresh optimisers"
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

    def report(event: Event) -> None:
        lines.append(str(event))

    it = trainer()
    run_steps(it, tmp_path, report=report, report_seconds=0.0)
    assert len(lines) == 14 + 2
    assert lines[0].startswith("step 1 of 14, loss 4.")
    assert " tokens/s, 0:00:" in lines[0]
    assert lines[13].endswith(" tokens/s, 0:00:00 left")
    assert lines[14] == f"step 14 of 14 saved to {tmp_path / 'state.safetensors'}"
    assert f"python -m elastic_moe.train.export {tmp_path} FOLDER" in lines[15]
    lines.clear()
    run_steps(trainer(), tmp_path / "quiet", report=report, report_seconds=1000.0)
    assert [line.split(",")[0] for line in lines[:2]] == ["step 1 of 14", "step 14 of 14"]
    assert [clock(0), clock(61), clock(5025)] == ["0:00:00", "0:01:01", "1:23:45"]


def test_a_run_stops_when_its_time_is_up(tmp_path: Path) -> None:
    events: list[Event] = []
    it = trainer()
    run_steps(it, tmp_path, max_seconds=0, report=events.append)
    assert it.step == 0
    assert str(events[-1]) == "next: run the same command again to resume"
    began = time.monotonic()
    slow = trainer(replace(PLAN, stages=parse_stages("2x100000x1x128")))
    run_steps(slow, tmp_path / "slow", max_seconds=0.2)
    assert 1 <= slow.step < 1000
    assert time.monotonic() - began < 30


@pytest.fixture
def clock_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 s and reading a state 5 s, whatever they really take."""
    now = [1000.0]

    def lasting(name: str, seconds: float) -> None:
        real = getattr(Trainer, name)

        def method(self: Trainer, *args: object) -> object:
            now[0] += seconds
            return real(self, *args)

        monkeypatch.setattr(Trainer, name, method)

    lasting("train_step", 10.0)
    lasting("load", 5.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])


@pytest.mark.usefixtures("clock_of_ten")
def test_a_step_begins_only_if_one_as_long_as_the_last_still_fits(tmp_path: Path) -> None:
    def steps(name: str, max_seconds: float, **options: object) -> int:
        it = trainer(replace(PLAN, stages=parse_stages("6x50x1x128")))
        run_steps(it, tmp_path / name, max_seconds=max_seconds, **options)
        return it.step

    assert steps("one", 35.0) == 3
    assert steps("two", 40.0) == 4
    assert steps("three", 9.0) == 1  # nobody knows yet how long one takes
    assert steps("four", 9.0, step_seconds=10.0) == 0
    events: list[Event] = []
    assert steps("one", 14.0, report=events.append) == 3  # 5 s to read the state, 10 s a step
    assert isinstance(events[0], Notice)
    assert str(events[0]) == "no step fits: one takes 10.0 s. Give more time."
    events.clear()
    assert steps("one", 15.0, report=events.append) == 4
    assert not any(isinstance(event, Notice) for event in events)
    assert steps("one", 0.0, report=events.append) == 4
    assert not any(isinstance(event, Notice) for event in events)
