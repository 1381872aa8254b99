"""The exported checkpoint is the run: its weights, and the steps that were done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.errors import TrainingError
from elastic_moe.model.checkpoint import load_model
from elastic_moe.train.data import Mixture, open_stream, prepare
from elastic_moe.train.export import export, main
from elastic_moe.train.ledger import replay
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.plan import parse_stages
from tests.train.small import CONFIG, PLAN, library

MODEL = replace(CONFIG, vocab_size=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has its data and no state yet."""
    root = tmp_path_factory.mktemp("export")
    prepare(root / "run" / "data", library(root), [], Mixture(), vocab_size=300)
    return root / "run"


def trained(data: Path, folder: Path, stages: str, steps: int) -> Trainer:
    """A run of `stages` that was stopped after some steps; its data lie in `folder`."""
    folder.mkdir()
    (folder / "data").symlink_to(data / "data")
    plan = replace(PLAN, stages=parse_stages(stages))
    trainer = Trainer(MODEL, plan, open_stream(folder / "data", plan.seed))
    for _ in range(steps):
        trainer.train_step()
    trainer.save(folder / "state.safetensors")
    return trainer


def test_an_exported_checkpoint_has_the_weights_of_the_run_and_tells_the_steps_done(
    data: Path, tmp_path: Path
) -> None:
    trainer = trained(data, tmp_path / "run", "6x14x1x128", 3)
    export(tmp_path / "run", tmp_path / "out", MODEL)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = load_model(tmp_path / "out")
    expected = dict(trainer.model.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(found[name].bfloat16(), p.detach().bfloat16()), name
    training = json.loads((tmp_path / "out" / "manifest.json").read_text())["training"]
    ledger = replay(trainer.plan, MODEL.shape, 3)
    assert training["steps"] == 3
    assert training["tokens"] == trainer.tokens == 3 * 512
    assert training["draws"] == ledger.draws_to_json()
    block = config["elastic_moe"]
    assert block["tokens"] == trainer.tokens
    assert {axis: set(values) for axis, values in block["trained"].items()} == ledger.trained


@pytest.mark.parametrize("steps", [0, 2])
def test_a_network_that_never_had_all_its_layers_is_not_exported(
    steps: int, data: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "run", "2x2x1x128,6x2x1x128", steps)
    with pytest.raises(TrainingError, match=rf"is at step {steps} of 4, and no step .* 6 layers"):
        export(tmp_path / "run", tmp_path / "out", MODEL)
    assert not (tmp_path / "out").exists()


def test_a_state_is_not_exported_as_another_model_or_with_other_data(
    data: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    with pytest.raises(TrainingError, match="another model: max_positions = 640, got 1024"):
        export(tmp_path / "run", tmp_path / "out", replace(MODEL, max_positions=1024))
    (tmp_path / "run" / "data").unlink()
    prepare(tmp_path / "run" / "data", library(tmp_path, 200), [], Mixture(), vocab_size=300)
    with pytest.raises(TrainingError, match="another data: source"):
        export(tmp_path / "run", tmp_path / "out", MODEL)


def test_the_command_says_in_one_line_what_is_wrong(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(data), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"error: {data / 'state.safetensors'} is missing. Name the folder that --out named in "
        f"training.\n"
    )


def test_export_of_a_run_that_ended_is_what_the_run_says_comes_next(
    data: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data").symlink_to(data / "data")
    plan = replace(PLAN, stages=parse_stages("6x1x1x128"))
    run(Trainer(MODEL, plan, open_stream(folder / "data", 0)), folder, report=lines.append)
    assert f"python -m elastic_moe.train.export {folder} FOLDER" in lines[-1]
    export(folder, tmp_path / "out", MODEL)
    assert load_model(tmp_path / "out").config.num_layers == 6
