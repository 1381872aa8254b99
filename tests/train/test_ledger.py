"""The ledger of a model with dense layers, some of whose sub-networks route nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from tests.train.commands import train
from tests.train.tiny import CONFIG, ERNIE


def test_a_network_of_dense_layers_alone_draws_no_value_that_a_router_has() -> None:
    shape = replace(CONFIG, dense_layers=frozenset({0, 1}), dense_hidden=64).shape
    plan = TrainingPlan(
        stages=parse_stages("6x200x1x128"),
        sampling=SamplingPlan(depth=1.0, prefix=1.0, pool=0.5),
    )
    dense = Counter(plan.subnet(shape, step).depth <= 2 for step in range(200))
    assert min(dense.values()) > 20
    ledger = replay(plan, shape, 200)
    for axis in ("top_k", "width", "pool", "threshold"):
        assert ledger.draws[axis]["none routes"] == dense[True], axis
        assert ledger.draws[axis].total() == 200
        assert all(isinstance(value, int | float) for value in ledger.trained[axis]), axis
    assert "none routes" not in ledger.draws["depth"]
    assert {1, 2} < ledger.trained["depth"]
    assert ledger.trained["pool"] > {8}


def test_a_model_with_a_dense_layer_is_trained_at_reduced_depth_to_a_checkpoint(root: Path) -> None:
    (root / "config.json").write_text(json.dumps(ERNIE))
    options = ("--config", root / "config.json", "--reduce-depth", 1)
    length = ("--tokens", 4096, "--batch-tokens", 512, "--length", 128)
    assert train(root, *options, length=length, model=()) == 0
    reported = json.loads((root / "run" / "checkpoint" / "manifest.json").read_text())["training"]
    assert reported["draws"]["pool"]["none routes"] > 0
    assert 1 in load_config(root / "run" / "checkpoint").elastic.trained["depth"]
