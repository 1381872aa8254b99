"""A folder that training writes to: its own run goes on, whatever else is there stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from elastic_moe.train import session
from tests.train.commands import SIZES, error, state, train

SHORT = ("--tokens", 1024, "--batch-tokens", 512, "--length", 128)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def olmoe(folder: Path, **changes: object) -> Path:
    """config.json of an OLMoE whose sizes are those of the tests' model."""
    raw = {
        "model_type": "olmoe",
        "vocab_size": SIZES["--vocab-size"],
        "hidden_size": SIZES["--hidden"],
        "num_hidden_layers": SIZES["--layers"],
        "num_attention_heads": SIZES["--heads"],
        "num_key_value_heads": SIZES["--kv-heads"],
        "max_position_embeddings": 4096,
        "intermediate_size": SIZES["--expert-hidden"],
        "num_experts": SIZES["--experts"],
        "num_experts_per_tok": SIZES["--top-k"],
        "tie_word_embeddings": True,
        "elastic_moe": {"format": 1, "width_granules": SIZES["--granules"]},
        **changes,
    }
    path = folder / "olmoe.json"
    path.write_text(json.dumps(raw))
    return path


def test_a_configuration_that_is_refused_leaves_no_trace(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, length=SHORT) == 0
    before = contents(root / "run")
    refused = ("--config", olmoe(root))
    assert train(root, *refused, length=SHORT, model=()) == 2
    reported = f"--config: the run in {root / 'run'} was started without"
    assert error(capsys).startswith(f"{reported} it, got olmoe sha256:")
    (root / "run" / "options.json").unlink()  # what the state says is still compared
    assert train(root, *refused, length=SHORT, model=()) == 2
    assert error(capsys).startswith(f"{reported} one. Repeat the command")
    del before["options.json"]
    assert contents(root / "run") == before
    assert train(root, "--json", length=SHORT) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"]


def test_a_configuration_is_asked_for_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ("--config", olmoe(root))
    assert train(root, *config, "--minutes", 0, length=SHORT, model=()) == 0
    assert state(root)["model"]["model_type"] == "olmoe"
    recorded = json.loads((root / "run" / "options.json").read_text())["config"]
    assert recorded.startswith("olmoe sha256:")
    raw = json.loads((root / "olmoe.json").read_text())
    (root / "olmoe.json").write_text(
        json.dumps(dict(reversed(raw.items())))
    )  # the same, written otherwise
    again = ("--config", root / "olmoe.json")
    assert train(root, *again, "--minutes", 0, length=SHORT, model=()) == 0
    assert train(root, length=SHORT) == 2  # of equal sizes
    assert f"was started with {recorded}, got none" in error(capsys)
    assert train(root, "--config", olmoe(root, rms_norm_eps=1e-4), length=SHORT, model=()) == 2
    assert f"was started with {recorded}, got olmoe sha256:" in error(capsys)
    (root / "run" / "options.json").unlink()
    assert train(root, length=SHORT) == 2
    assert "config.json says what the run in" in error(capsys)
    assert train(root, "--config", olmoe(root, rms_norm_eps=1e-4), length=SHORT, model=()) == 2
    assert "was started with another configuration" in error(capsys)
    assert train(root, "--config", olmoe(root), length=SHORT, model=()) == 0


def test_a_run_that_an_earlier_version_started_resumes(root: Path) -> None:
    assert train(root, "--config", olmoe(root), "--minutes", 0, length=SHORT, model=()) == 0
    path = root / "run" / "options.json"
    options = json.loads(path.read_text())
    for later in (
        "config",
        "balance",
        "full_share",
        "prefix_share",
        "per_layer_share",
        "reduce_pool",
    ):
        del options[later]
    path.write_text(json.dumps(options))
    assert train(root, "--config", olmoe(root), length=SHORT, model=()) == 0


def test_a_run_of_minutes_does_not_go_on_as_one_of_tokens(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recorded(*length: object) -> bool:
        train(root, *length, length=("--batch-tokens", 512, "--length", 128))
        return json.loads((root / "run" / "options.json").read_text())["minutes"]

    assert recorded("--minutes", 0) is True
    capsys.readouterr()
    assert train(root, length=SHORT) == 2
    assert "was started without it, got 1024. Repeat" in error(capsys)
    shutil.rmtree(root / "run")
    assert train(root, "--sandwich", "--minutes", 0, length=SHORT) == 0
    assert train(root, length=SHORT) == 2
    said = error(capsys)
    assert "--sandwich: " in said
    assert "started with it, got none" in said
    shutil.rmtree(root / "run")
    assert recorded("--minutes", 0, "--tokens", 1024) is False


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "log.csv", "data/mine.txt", "x"])
def test_a_folder_of_something_else_is_left_as_it_is(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "mine"}\n')
    before = contents(root / "run")
    assert train(root, length=SHORT) == 2
    assert f"holds something else than a run ({name.split('/')[0]})" in error(capsys)
    assert contents(root / "run") == before


def test_a_file_is_no_folder_of_a_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "run").write_text("mine")
    assert train(root, length=SHORT) == 2
    assert error(capsys) == f"--out {root / 'run'} is no folder. Name a new one, or that of a run."


def test_what_a_stopped_start_left_is_no_hindrance(root: Path) -> None:
    (root / "run" / "data").mkdir(parents=True)
    for name in (".lock", "data/tokenizer.json", "data/train.npy", "data/.train.npy.7.part"):
        (root / "run" / name).write_text("half")
    assert train(root, "--minutes", 0, length=SHORT) == 0


def test_text_may_be_added_where_there_was_too_little(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "a.txt").write_text("hello world")
    texts = ("--corpus", root / "mine", "--minutes", 0)
    assert train(root, *texts, length=SHORT) == 1
    assert "Add text, and repeat the command" in error(capsys)
    (root / "mine" / "b.txt").write_text("It was the best of times. " * 1000)
    assert train(root, *texts, length=SHORT) == 0


def test_a_foreign_checkpoint_folder_is_found_before_the_first_step(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0, length=SHORT) == 0
    (root / "run" / "checkpoint").mkdir()
    (root / "run" / "checkpoint" / "mine.txt").write_text("mine")
    assert train(root, length=SHORT) == 2
    assert "exists and is no checkpoint of a training run" in error(capsys)
    assert state(root)["step"] == 0


def test_a_training_whose_checkpoint_cannot_be_written_fails(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*_args: object, **_kwargs: object) -> str:
        (root / "run" / "checkpoint").mkdir()
        (root / "run" / "checkpoint" / "mine.txt").write_text("mine")
        return "plan"

    steps = session._train
    monkeypatch.setattr(session, "_train", lambda *args: (steps(*args), spoil())[0])
    assert train(root, length=SHORT) == 1
    assert "exists and is no checkpoint of a training run" in error(capsys)
    assert (root / "run" / "log.csv").read_text().count("\n") == 3  # what there is to see of it
