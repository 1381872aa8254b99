"""A whole training step, on the C++ kernels beside PyTorch: forward, backward, optimiser.

The ceiling is that of bf16 products; a step computes in float32, of which a machine with vdpbf16ps
may do half as much.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.kernels.conftest import Report
from elastic_moe.routing import Subnet
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.step.plan import Stage, TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.tokens import TokenStream

LAYERS, PIECES = 12, 8
CONFIG = replace(ELASTIC_MINI, num_layers=LAYERS)
MAX_DIFFERENCE = 1e-3  # nats between the losses after a few steps


def make_trainer(backend: str, length: int) -> Trainer:
    tokens = np.random.default_rng(0).integers(5, 4000, 512 * 200).astype(np.uint16)
    plan = TrainingPlan(
        stages=(Stage(10_000, LAYERS, PIECES, length),), sampling=SamplingPlan(fixed="full")
    )
    return Trainer(CONFIG, plan, TokenStream(tokens, bos=0, seed=0), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("length", [256, 512])
def test_a_training_step(measure: Report, length: int, backend: str) -> None:
    losses = []
    for name in (backend, "reference"):
        trainer = make_trainer(name, length)
        assert trainer.backend == name
        losses.append([trainer.train_step()["loss"] for _ in range(2)][-1])
    assert abs(losses[0] - losses[1]) < MAX_DIFFERENCE
    trainer = make_trainer(backend, length)
    step_tokens = trainer.plan.stages[0].step_tokens

    def call() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            trainer.train_step()

    weights = sum(p.nbytes for p in trainer.model.parameters())
    measure(
        call,
        kernel="train_step",
        implementation=backend,
        rows=step_tokens,
        moved_bytes=3 * weights,  # read forward and backward, written by the optimiser
        flops=3 * Subnet.full(CONFIG.shape).flops_per_token(length // 2) * step_tokens,
        cache="warm",
        layers=LAYERS,
        length=length,
    )
