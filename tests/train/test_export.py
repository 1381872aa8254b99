"""The exported checkpoint is the run: its weights, and the steps that were done."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elastic_moe.errors import TrainingError
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.saving import Item, _share_out
from elastic_moe.model.config import ElasticBlock
from elastic_moe.model.families import parameter_shapes
from elastic_moe.model.reference.loading import load_model
from elastic_moe.sizes import parse_size
from elastic_moe.train import export as export_module
from elastic_moe.train.export import export, main, trained_axes
from elastic_moe.train.ledger import replay
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.prepare import Mixture, open_stream, prepare
from tests.train.tiny import CONFIG, PLAN, library

MODEL = replace(CONFIG, vocab_size=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has its data and no state yet."""
    root = tmp_path_factory.mktemp("export")
    prepare(root / "run" / "data", library(root), [], Mixture(), vocab_size=300)
    return root / "run"


def trained(
    data: Path, folder: Path, stages: str, steps: int, plan: TrainingPlan = PLAN
) -> Trainer:
    """A run of `stages` that was stopped after some steps; its data lie in `folder`."""
    folder.mkdir()
    (folder / "data").symlink_to(data / "data")
    plan = replace(plan, stages=parse_stages(stages))
    trainer = Trainer(MODEL, plan, open_stream(folder / "data", plan.seed))
    for _ in range(steps):
        trainer.train_step()
    trainer.save(folder / "state.safetensors")
    return trainer


def test_an_exported_checkpoint_has_the_weights_of_the_run_and_tells_the_steps_done(
    data: Path, tmp_path: Path
) -> None:
    trainer = trained(data, tmp_path / "run", "6x14x1x128", 3)
    ledger = export(tmp_path / "run", tmp_path / "out")
    assert ledger == replay(trainer.plan, MODEL.shape, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = load_model(tmp_path / "out")
    expected = dict(trainer.model.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(found[name].bfloat16(), p.detach().bfloat16()), name
    training = json.loads((tmp_path / "out" / "manifest.json").read_text())["training"]
    assert training["steps"] == 3
    assert training["tokens"] == trainer.tokens == 3 * 512
    assert training["draws"] == ledger.draws_to_json()
    block = config["elastic_moe"]
    assert block["tokens"] == trainer.tokens
    assert block["trained"] == {
        axis: list(values) for axis, values in trained_axes(ledger.trained, MODEL).items()
    }
    assert block["parent"] is None


@pytest.mark.parametrize("steps", [0, 2])
def test_a_network_that_never_had_all_its_layers_is_not_exported(
    steps: int, data: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "run", "2x2x1x128,6x2x1x128", steps)
    with pytest.raises(TrainingError, match=rf"is at step {steps} of 4, and no step .* 6 layers"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_is_not_exported_with_other_data(data: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    (tmp_path / "run" / "data").unlink()
    prepare(tmp_path / "run" / "data", library(tmp_path, 200), [], Mixture(), vocab_size=300)
    with pytest.raises(TrainingError, match="another data: source"):
        export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("sampling", "axes"),
    [
        ({"fixed": "full"}, set()),
        ({"fixed": "L4"}, {"depth"}),
        ({"depth": 1.0, "top_k": 0.0, "pool": 0.0, "width": 0.0, "threshold": 0.0}, {"depth"}),
        ({"depth": 0.0, "top_k": 1.0, "pool": 1.0, "width": 0.0}, {"top_k", "pool", "threshold"}),
    ],
    ids=["inelastic", "specialist", "depth-alone", "no-depth-no-width"],
)
def test_the_checkpoint_claims_the_axes_that_were_reduced_and_no_other(
    sampling: dict, axes: set, data: Path, tmp_path: Path
) -> None:
    plan = replace(PLAN, sampling=SamplingPlan(**{"threshold": 0.5, **sampling}))
    trained(data, tmp_path / "run", "6x40x1x128", 40, plan)
    export(tmp_path / "run", tmp_path / "out")
    assert set(load_config(tmp_path / "out").elastic.trained) == axes


def test_what_the_parent_was_trained_for_is_claimed_where_it_was_kept_up() -> None:
    parent = ElasticBlock(width_granules=4, trained={"depth": (2, 6), "width": (1, 4)})
    config = replace(MODEL, elastic=parent)
    drawn = {"depth": {6, 3}, "width": {4}, "top_k": {3}, "threshold": {0.0, 0.5}}
    assert trained_axes(drawn, config) == {"depth": (2, 3, 6), "threshold": (0.0, 0.5)}


def test_weights_are_split_where_they_may_not_be_large(data: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--max-shard-size", "60KB"]) == 0
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 4
    assert shards[0].name == "model-00001-of-00004.safetensors"
    whole = sum(p.numel() for p in load_model(tmp_path / "out").parameters()) * 2
    assert max(shard.stat().st_size for shard in shards) < 60_000 + 20_000  # and a header
    assert whole > 3 * 60_000


def test_elastic_mini_comes_in_three_shards_under_16_mib() -> None:
    """By the sizes of its tensors, of which the headers say names and places."""
    sizes = [
        (name, 2 * math.prod(shape) // (shape[0] if len(shape) == 3 else 1))
        for name, shape in parameter_shapes(ELASTIC_MINI)
        for _ in range(shape[0] if len(shape) == 3 else 1)
    ]
    limit = parse_size("15MiB")
    shards = _share_out([Item(n, (b // 2,), "bfloat16", np.empty(0).copy) for n, b in sizes], limit)
    assert len(shards) == 3
    for shard in shards:
        headers = 170 * len(shard)
        assert sum(item.nbytes for item in shard) + headers < 16 << 20


def test_an_earlier_checkpoint_is_replaced_as_a_whole_and_its_card_is_kept(
    data: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    out = tmp_path / "out"
    export(tmp_path / "run", out, max_shard_bytes=60_000)
    (out / "README.md").write_text("a card")
    (out / "results.json").write_text("{}")
    (out / "lora.safetensors").write_text("mine")
    (out / "sweep" / "plots").mkdir(parents=True)
    (out / "sweep" / "plots" / "a.png").write_bytes(b"plot")
    (out / "link").symlink_to("README.md")
    export(tmp_path / "run", out)
    assert (out / "sweep" / "plots" / "a.png").read_bytes() == b"plot"
    assert (out / "link").is_symlink()
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "link",
        "lora.safetensors",
        "manifest.json",
        "model.safetensors",
        "results.json",
        "sweep",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_folder_of_other_things_is_left_alone(data: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(TrainingError, match=r"is no checkpoint of a training run\. Name a new"):
        export(tmp_path / "run", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(TrainingError, match="is no checkpoint of a training run"):
        export(tmp_path / "run", tmp_path / "mine" / "thesis.txt")


CUT_OUT = '{"corpus": {}, "training": {}, "extracted": {}}'


@pytest.mark.parametrize("manifest", ['{"name": "my web app"}', "[]", "{", "\xff", CUT_OUT])
def test_a_folder_whose_manifest_tells_of_something_else_is_left_alone(
    manifest: str, data: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(TrainingError, match="is no checkpoint of a training run"):
        export(tmp_path / "run", tmp_path / "web")
    assert (tmp_path / "web" / "manifest.json").read_text(encoding="latin-1") == manifest


def test_a_failed_export_leaves_the_earlier_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(data, tmp_path / "run", "6x2x1x128", 1)
    export(tmp_path / "run", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "tokenizer_config", full)
    with pytest.raises(TrainingError, match=r"out cannot be written: disk full\. The state of the"):
        export(tmp_path / "run", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_state_of_the_version_before_is_exported(data: Path, tmp_path: Path) -> None:
    """Its plan says nothing of fields that came later, nor does it say a parent."""
    it = trained(data, tmp_path / "run", "6x4x1x128", 2)
    state = tmp_path / "run" / "state.safetensors"
    tensors, progress = load_state(state)
    later = {"distill", "sandwich", "split", "bias_rate", "dtype"}
    plan = {key: value for key, value in progress["plan"].items() if key not in later}
    del plan["sampling"]["fixed"], progress["parent"]
    save_file(
        tensors,
        state,
        {"elastic_moe_training": json.dumps({**progress, "plan": plan, "format": 2})},
    )
    export(tmp_path / "run", tmp_path / "out")
    assert load_config(tmp_path / "out").elastic.tokens == it.tokens


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
    run_steps(
        Trainer(MODEL, plan, open_stream(folder / "data", 0)),
        folder,
        report=lambda event: lines.append(str(event)),
    )
    assert f"python -m elastic_moe.train.export {folder} FOLDER" in lines[-1]
    export(folder, tmp_path / "out")
    assert load_model(tmp_path / "out").config.num_layers == 6
