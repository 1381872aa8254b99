"""Steps on the C++ kernels are those of PyTorch, and resume to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from elastic_moe_kernels import native as kernels
from torch import Tensor

from elastic_moe.errors import TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.routing import resolve
from elastic_moe.train.experts import native
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.runs.progress import Event, Notice
from elastic_moe.train.step import loss, optim
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state
from elastic_moe.train.step.trainer import Trainer
from tests.train.tiny import CONFIG, stream

NATIVE = replace(CONFIG, head_dim=16)
PLAN = TrainingPlan(
    stages=parse_stages("2x3x1x128,6x6x1x128"),
    sampling=SamplingPlan(depth=0.5, top_k=0.5, width=0.5, pool=0.5, threshold=0.5),
    warmup_steps=2,
    save_every_steps=3,
)


def awake(backend: str, plan: TrainingPlan = PLAN, config: ModelConfig = NATIVE) -> Trainer:
    """A trainer whose every layer does something from the first step on."""
    it = Trainer(config, plan, stream(), backend=backend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in it.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return it


def test_a_model_that_the_kernels_can_train_is_trained_on_them() -> None:
    assert Trainer(NATIVE, PLAN, stream()).backend == "cpu"
    assert Trainer(NATIVE, PLAN, stream(), backend="reference").backend == "reference"
    assert Trainer(NATIVE, PLAN, stream()).muon.native
    assert not Trainer(NATIVE, PLAN, stream(), backend="reference").muon.native


@pytest.mark.parametrize(("backend", "calls"), [("cpu", 1), ("reference", 0)])
def test_a_step_runs_where_the_backend_says(
    backend: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            ran.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(native, "last_state")
    watch(loss.training, "head_loss")
    watch(optim.training, "muon_step")
    Trainer(NATIVE, PLAN, stream(), backend=backend).train_step()
    assert ran == ["last_state", "head_loss", "muon_step"] * calls


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"active_layers": [0, 2, 3], "top_k": [1, 2, 3, 1, 2, 3]},
        {"expert_width": 1, "expert_pool": 4},
        {"sparsity_threshold": 0.7, "top_k": 2},
    ],
    ids=["full", "layers-and-k", "narrow-in-a-pool", "threshold"],
)
def test_states_balance_loads_and_gradients_are_those_of_pytorch(axes: dict[str, Any]) -> None:
    subnet = resolve(NATIVE.shape, **axes)
    inputs = torch.from_numpy(stream().batch(0, 1, 128)[0])
    found: dict[str, dict[str, Tensor]] = {}
    loads = []
    for backend in ("reference", "cpu"):
        it = awake(backend)
        states, balance, own = it.forward(inputs, subnet)
        (states.square().mean() + balance).backward()
        grads = {n: p.grad for n, p in it.model.named_parameters() if p.grad is not None}
        found[backend] = {"states": states.detach(), "balance": balance.detach(), **grads}
        loads.append(own)
    assert loads[0].layers == loads[1].layers
    assert torch.equal(loads[0].counts, loads[1].counts)
    assert found["cpu"].keys() == found["reference"].keys()
    for name, plain in found["reference"].items():
        close = 2e-4 * float(plain.abs().max()) + 1e-7
        assert float((found["cpu"][name] - plain).abs().max()) <= close, name


def test_many_steps_stay_with_those_of_pytorch() -> None:
    losses = {}
    for backend in ("reference", "cpu"):
        it = Trainer(NATIVE, PLAN, stream(), backend=backend)
        losses[backend] = [it.train_step()["loss"] for _ in range(9)]
    assert losses["cpu"] == pytest.approx(losses["reference"], abs=2e-3)
    assert losses["cpu"][-1] < losses["cpu"][0] - 0.1


@pytest.mark.parametrize(
    ("change", "threads"),
    [({}, 2), ({"split": 0.5}, 2), ({"distill": 0.5}, 1), ({"sandwich": True}, 1)],
    ids=["plain", "split", "distilled", "sandwich"],
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    change: dict[str, Any], threads: int, tmp_path: Path
) -> None:
    """Plain steps on any number of threads, those with a teacher on as many as before."""
    plan = replace(PLAN, **change)
    torch.set_num_threads(threads)
    straight = Trainer(NATIVE, plan, stream())
    run_steps(straight, tmp_path / "straight")
    stopped = Trainer(NATIVE, plan, stream())
    for _ in range(4):
        stopped.train_step()
    (tmp_path / "stopped").mkdir()
    stopped.save(tmp_path / "stopped" / "state.safetensors")
    torch.set_num_threads(1)
    resumed = Trainer(NATIVE, plan, stream())
    events: list[Event] = []
    run_steps(resumed, tmp_path / "stopped", report=events.append)
    assert resumed.backend == "cpu"
    assert not any(isinstance(event, Notice) for event in events)
    for (name, p), q in zip(
        straight.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    for folder, expected in (("straight", threads), ("stopped", 1)):
        log = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        assert [json.loads(line).get("threads") for line in log][:2] == [expected, None]
        assert load_state(tmp_path / folder / "state.safetensors")[1]["threads"] == expected


@pytest.mark.parametrize(
    ("change", "backend"),
    [({"distill": 0.5}, "auto"), ({"sandwich": True, "distill": 1.0}, "auto"), ({}, "reference")],
    ids=["distilled", "sandwich", "reference"],
)
def test_steps_whose_bits_depend_on_the_threads_say_when_those_are_others(
    change: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    plan = replace(PLAN, **change)
    events: list[Event] = []
    for threads, reported in ((1, False), (2, True), (2, False)):
        torch.set_num_threads(threads)
        it = Trainer(NATIVE, plan, stream(), backend=backend)
        events.clear()
        run_steps(it, tmp_path, max_seconds=0, report=events.append)
        assert isinstance(events[0], Notice) == reported
        if reported:
            assert str(events[0]).startswith(
                "resumes with 2 threads, where it had 1: steps in PyTorch"
            )


def test_a_run_that_goes_on_with_other_kernels_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    earlier = Trainer(NATIVE, PLAN, stream(), backend="cpu")
    earlier.train_step()
    earlier.save(path)
    assert Trainer(NATIVE, PLAN, stream(), backend="cpu").load(path) is None
    note = Trainer(NATIVE, PLAN, stream(), backend="reference").load(path)
    assert note is not None
    assert note.startswith("resumes with backend reference, where it had cpu: steps then differ")


@pytest.mark.parametrize(
    ("config", "plan", "why"),
    [
        (CONFIG, PLAN, "head size must be a multiple of 16, got 8"),
        (replace(NATIVE, qk_norm="all"), PLAN, "no norms over all heads"),
        (replace(NATIVE, rope=cast("Any", "spiral")), PLAN, "they do not compute rope = 'spiral'"),
        (NATIVE, replace(PLAN, dtype="bfloat16"), "they compute in float32"),
    ],
)
def test_what_the_kernels_cannot_train_runs_in_pytorch(
    config: ModelConfig, plan: TrainingPlan, why: str
) -> None:
    assert Trainer(config, plan, stream()).backend == "reference"
    with pytest.raises(TrainingError, match=f"C\\+\\+ kernels cannot train this model: .*{why}"):
        Trainer(config, plan, stream(), backend="cpu")


@dataclass(frozen=True)
class NewTrait(ModelConfig):
    """A configuration with a field that this version of the C++ training does not have."""

    embedding_scale: float = 1.0


def test_a_trait_that_the_kernels_do_not_know_is_trained_in_pytorch() -> None:
    def config(scale: float) -> ModelConfig:
        known = {item.name: getattr(NATIVE, item.name) for item in fields(NATIVE)}
        return NewTrait(**known, embedding_scale=scale)

    assert Trainer(config(1.0), PLAN, stream()).backend == "cpu"
    assert Trainer(config(2.5), PLAN, stream()).backend == "reference"
    with pytest.raises(TrainingError, match=r"they do not compute embedding_scale = 2\.5"):
        Trainer(config(2.5), PLAN, stream(), backend="cpu")


def test_the_traits_that_the_kernels_train_are_fields() -> None:
    listed = native.KNOWN_FIELDS | native.KNOWN_VALUES.keys()
    assert listed <= {item.name for item in fields(ModelConfig)}


def test_without_the_kernels_or_on_another_device_pytorch_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "device is cuda" in str(native.refusal(NATIVE, torch.device("cuda"), "float32"))
    monkeypatch.setattr(kernels, "levels", lambda: ())
    assert Trainer(NATIVE, PLAN, stream()).backend == "reference"
    assert not native.can_step([])


def test_a_backend_that_is_none_is_refused() -> None:
    with pytest.raises(TrainingError, match="backend must be auto, reference or cpu, got 'gpu'"):
        Trainer(NATIVE, PLAN, stream(), backend="gpu")
