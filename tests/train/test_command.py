"""`python -m elastic_moe.train`: every option does something, or is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.train import __main__ as command
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.data import read_manifest
from elastic_moe.train.plan import TrainingPlan
from elastic_moe.train.tokens import train_tokenizer
from tests.train.small import CONFIG, library, novels

STAGES = "2x2x1x128,6x4x1x128"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with novels and a run of a tiny model on a tiny library."""
    sources = library(tmp_path)
    novels(tmp_path)
    monkeypatch.setattr(command, "ELASTIC_MINI", replace(CONFIG, vocab_size=400))
    monkeypatch.setattr(command, "library_files", lambda: sources)
    return tmp_path


def train(root: Path, *options: object) -> int:
    return command.main(["--out", str(root / "run"), "--stages", STAGES, *map(str, options)])


def state(root: Path) -> dict:
    return load_state(root / "run" / "state.safetensors")[1]


def test_a_run_reads_the_novels_and_stops_and_goes_on(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--novels", root / "novels", "--seed", 3]
    assert train(root, *options, "--minutes", 0) == 0
    assert state(root)["step"] == 0
    manifest, _ = read_manifest(root / "run" / "data")
    assert manifest["stream_tokens_by_kind"]["novels"] > 1000
    assert [f["name"] for f in manifest["files"]] == ["numbers.py", "Dickens_X_1850.txt"]
    share = manifest["stream_tokens_by_kind"]["chat"] / manifest["stream_tokens"]
    assert share == pytest.approx(0.05, abs=0.005)
    assert manifest["seed"] == 3
    assert "preparing the text" in capsys.readouterr().out
    assert train(root, *options) == 0
    assert state(root)["step"] == 6
    assert state(root)["plan"]["seed"] == state(root)["data"]["order"] == 3
    out = capsys.readouterr().out
    assert out.startswith("step 1 of 6, loss ")
    assert "step 6 of 6, loss " in out
    assert "next: python -m elastic_moe.train.export" in out


def test_options_reach_the_plan() -> None:
    parser = command.make_parser()
    options = ["--out", "x", "--lr-scale", "0.5", "--save-every", "7", "--seed", "9"]
    plan = command.read_plan(parser.parse_args(options))
    usual = TrainingPlan(stages=plan.stages)
    assert plan == replace(
        usual, muon_lr=usual.muon_lr / 2, adam_lr=usual.adam_lr / 2, save_every_steps=7, seed=9
    )
    assert plan.total_steps == 1560


def test_a_tokenizer_of_ones_own_is_used(root: Path) -> None:
    tokenizer = train_tokenizer(["It was the best of times. " * 9], 300)
    tokenizer.save(str(root / "own.json"))
    assert train(root, "--tokenizer", root / "own.json", "--minutes", 0) == 0
    assert read_manifest(root / "run" / "data")[0]["tokenizer_given"] is True
    assert train(root, "--tokenizer", root / "own.json", "--minutes", 0) == 0
    assert train(root, "--minutes", 0) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "12x5x4"], "stage '12x5x4' must be LAYERSxSTEPSxPIECESxLENGTH"),
        (["--stages", "7x5x1x128"], "stage 0: layers must be in [1, 6], got 7"),
        (["--novels", "nowhere"], "nowhere is not a folder"),
        (["--tokenizer", "nowhere.json"], "nowhere.json is no tokenizer.json"),
        (["--lr-scale", "0"], "--lr-scale must be positive, got 0.0"),
        (["--minutes", "nan"], "--minutes must be at least 0, got nan"),
        (["--save-every", "0"], "--save-every must be at least 1 step, got 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_any_work(
    options: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not (root / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = train_tokenizer([path.read_text() for path in root.rglob("*.py")], 420)
    assert large.get_vocab_size() > 400
    large.save(str(root / "large.json"))
    assert train(root, "--tokenizer", root / "large.json") == 2
    assert "the model's vocabulary and 16 bits allow 399" in capsys.readouterr().err


def test_a_run_that_is_there_refuses_other_options(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0) == 0
    before = {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    for options, message in (
        (["--seed", 1], "error: --seed: "),
        (["--novels", root / "novels"], "error: --novels: "),
        (["--stages", "6x4x1x128"], "was trained with another plan: stages"),
        (["--lr-scale", 0.5], "was trained with another plan: adam_lr"),
    ):
        assert train(root, *options) in (1, 2)
        assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()} == before


def test_a_torn_manifest_ends_the_run_at_its_start(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0) == 0
    path = root / "run" / "data" / "manifest.json"
    path.write_text(path.read_text()[:50])
    capsys.readouterr()
    assert train(root) == 1
    assert "is torn" in capsys.readouterr().err


def test_the_help_names_the_export(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "python -m elastic_moe.train.export" in capsys.readouterr().out
