"""`python -m elastic_moe.train`: every option does something, or is refused in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.reference.loading import load_model
from elastic_moe.train import session
from elastic_moe.train.__main__ import main, make_parser
from elastic_moe.train.config import TrainConfig
from elastic_moe.train.export import export
from elastic_moe.train.options import to_config
from elastic_moe.train.settings import read_settings
from elastic_moe.train.step.plan import Stage, TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state
from elastic_moe.train.text.prepare import read_manifest
from elastic_moe.train.text.tokens import train_tokenizer
from tests.train.commands import LENGTH, STAGES, TINY, error, state, train
from tests.train.tiny import ERNIE

ONE_OF_EACH = ["--layers", "1", "--experts", "1", "--top-k", "1", "--granules", "1"]


def test_a_run_reads_the_texts_stops_and_goes_on_to_a_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--corpus", root / "novels", "--with-library", "--seed", 3]
    options += ["--hold-out", "*forster*", "--json"]
    assert train(root, *options, "--minutes", 0) == 0
    captured = capsys.readouterr()
    assert "novels: 1 files, 0.1 MB; skipped 1: 1 held out" in captured.err
    assert "no checkpoint yet" in captured.err
    stopped = json.loads(captured.out)
    assert (stopped["steps"], stopped["ended_by"], stopped["checkpoint"]) == (0, "time", None)
    manifest, _ = read_manifest(root / "run" / "data")
    assert manifest["stream_tokens_by_kind"]["texts"] > 1000
    assert [f["name"] for f in manifest["files"]] == ["numbers.py", "Dickens_X_1850.txt"]
    share = manifest["stream_tokens_by_kind"]["chat"] / manifest["stream_tokens"]
    assert share == pytest.approx(0.05, abs=0.005)
    assert manifest["seed"] == 3
    read = 3072 / manifest["stream_tokens"]

    with monkeypatch.context() as once:
        once.setattr(session, "_prepare", lambda *_: pytest.fail("prepared again"))
        assert train(root, *options) == 0
    assert state(root)["step"] == 6
    assert state(root)["plan"]["seed"] == state(root)["data"]["order"] == 3
    captured = capsys.readouterr()
    assert "model: 6 layers, 8 experts of 16 channels, 3 per token, " in captured.err
    text = f"{manifest['stream_tokens']:,}"
    assert f"plan: 6 steps, 3,072 tokens, which is {read:.2f} of the text's {text}" in captured.err
    assert "step 1 of 6, loss " in captured.err
    assert "step 6 of 6, loss " in captured.err
    summary = json.loads(captured.out)
    assert summary["checkpoint"] == str(root / "run" / "checkpoint")
    assert (summary["complete"], summary["ended_by"]) == (True, "plan")
    assert summary["tokens"] == 6 * 512
    logged = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in logged)
    assert summary["training_seconds"] == pytest.approx(seconds, abs=0.06)
    assert summary["tokens_per_second"] == pytest.approx(6 * 512 / seconds, abs=0.06)
    assert load_config(root / "run" / "checkpoint").num_layers == 6

    assert train(root, *options[:-1]) == 0  # there is nothing left to do but to say so
    out = capsys.readouterr().out
    assert out.startswith("6 of 6 steps, 3,072 tokens in 0:00:0")
    run = root / "run"
    assert out.endswith(f"sweep {run / 'checkpoint'} --quick --out {run / 'sweep'}\n")


def test_the_table_has_every_step_once(root: Path) -> None:
    assert train(root, "--sandwich") == 0
    lines = (root / "run" / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,tokens,loss,")
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4", "5", "6"]
    log = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0].split(",")[: len(log[0])] == list(log[0])
    assert " ".join(log[-1]["sandwich"]) in lines[-1]
    assert " ".join(map(str, log[-1]["sandwich_loss"])) in lines[-1]


def test_losses_of_reduced_networks_are_told_in_a_sandwich_and_without_the_full_one(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--tokens", 3072, "--batch-tokens", 512, "--length", 128)
    assert train(root, "--sandwich", "--json", length=short) == 0
    summary = json.loads(capsys.readouterr().out)
    log = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    losses = [loss for record in log for loss in record["sandwich_loss"]]
    assert len(losses) == 2 * len(log) == 12
    assert summary["reduced_loss"] == pytest.approx(sum(losses[-4:]) / 4, abs=1e-4)
    assert summary["loss"] == pytest.approx(sum(r["loss"] for r in log[-4:]) / 4, abs=1e-4)
    (root / "run").rename(root / "sandwich")
    assert train(root, "--fixed", "L3", length=short) == 0
    log = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]
    reported = capsys.readouterr().out.splitlines()[0]
    last = sum(r["loss"] for r in log[-4:]) / 4
    assert f"of reduced networks {log[0]['loss']:.3f} at first, {last:.3f} at last" in reported


def test_options_reach_the_plan(tmp_path: Path) -> None:
    options = ["--lr-scale", "0.5", "--save-every", "7", "--seed", "9", "--distill", "0.25"]
    options += ["--reduce-depth", "0.5", "--reduce-threshold", "0", "--dtype", "bfloat16"]
    options += ["--tokens", "100000", "--batch-tokens", "1024", "--length", "64"]
    options += ["--full-share", "0.5", "--prefix-share", "0.9", "--per-layer-share", "0.1"]
    options += ["--balance", "0.01"]
    args = make_parser().parse_args(["--out", str(tmp_path / "none"), *options])
    plan = read_settings(to_config(args)).plan
    usual = TrainingPlan(stages=(Stage(98, 12, 2, 64),))
    assert plan == replace(
        usual,
        muon_lr=usual.muon_lr / 2,
        adam_lr=usual.adam_lr / 2,
        save_every_steps=7,
        seed=9,
        distill=0.25,
        dtype="bfloat16",
        warmup_steps=9,
        balance=0.01,
        sampling=SamplingPlan(full=0.5, depth=0.5, threshold=0.0, prefix=0.9, per_layer=0.1),
    )
    args = make_parser().parse_args(["--out", str(tmp_path / "none"), "--fixed", "L6", *LENGTH])
    plan = read_settings(to_config(args)).plan
    assert plan.sampling == SamplingPlan(fixed="L6")


def test_without_options_a_small_elastic_model_reads_the_library(tmp_path: Path) -> None:
    found = read_settings(TrainConfig(out=tmp_path / "none"))
    assert found.plan.sampling == SamplingPlan()
    assert sum(s.steps * s.step_tokens for s in found.plan.stages) >= 3_000_000
    assert found.model.config.num_layers == 12
    assert found.config.reads_library
    assert found.config.mixture.chat_fraction == 0.05
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_of_ones_own_is_used_and_sets_the_vocabulary(root: Path) -> None:
    tokenizer = train_tokenizer(["It was the best of times. " * 9], 300)
    tokenizer.save(str(root / "own.json"))
    model, own = TINY[:-2], ("--tokenizer", root / "own.json")
    assert train(root, *own, "--minutes", 0, model=model) == 0
    assert read_manifest(root / "run" / "data")[0]["tokenizer_given"] is True
    assert state(root)["model"]["vocab_size"] == tokenizer.get_vocab_size()
    assert train(root, *own, "--minutes", 0, model=model) == 0
    assert train(root, "--minutes", 0, model=model) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "12x5x4"], "stage '12x5x4' must be LAYERSxSTEPSxPIECESxLENGTH"),
        (["--stages", "7x5x1x128"], "stage 0: layers must be in [1, 6], got 7"),
        (["--stages", "6x5x1x128", "--tokens", "9"], "leave out --tokens where --stages is given"),
        (["--corpus", "nowhere"], "nowhere is not a folder"),
        (["--tokenizer", "nowhere.json"], "nowhere.json is no tokenizer.json"),
        (["--lr-scale", "0"], "--lr-scale must be above 0 and at most 1000, got 0.0"),
        (["--lr-scale", "1e42"], "--lr-scale must be above 0 and at most 1000, got 1e+42"),
        (["--minutes", "nan"], "--minutes must be at least 0 and at most 10,000,000, got nan"),
        (["--save-every", "0"], "--save-every must be at least 1 step, got 0"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--length", "100"], "--length must divide 512, got 100"),
        (["--batch-tokens", "1000"], "--batch-tokens must be a multiple of 512, got 1000"),
        (["--reduce-depth", "1.5"], "--reduce-depth must be in [0, 1], got 1.5"),
        (["--fixed", "L2", "--reduce-pool", "0"], "leave out --reduce-pool where --fixed is given"),
        (["--fixed", "L2", "--prefix-share", "1"], "leave out --prefix-share where --fixed is"),
        (["--sandwich", "--full-share", "0.5"], "leave out --full-share where --sandwich is given"),
        (
            ["--split", "0.5", "--full-share", "0.5"],
            "leave out --full-share where --split is given",
        ),
        (["--sandwich", "--split", "0.5"], "leave out --split where --sandwich is given"),
        (
            ["--split", "0.5", "--length", "512", "--batch-tokens", "512"],
            "--split needs steps of at least 2 sequences, got --batch-tokens 512 and --length 512",
        ),
        (["--split", "1"], "--split must be in [0, 1); --fixed full leaves nothing"),
        (["--full-share", "1"], "--full-share must be in [0, 1); --fixed full runs it in every"),
        (["--per-layer-share", "2"], "--per-layer-share must be in [0, 1], got 2.0"),
        (["--balance", "-1"], "--balance must be at least 0, got -1.0"),
        (
            ["--prefix-share", "1", "--reduce-depth", "0"],
            "leave out --prefix-share where --reduce-depth is 0: no step reduces it",
        ),
        (
            ["--per-layer-share", "1", "--reduce-top-k", "0"],
            "leave out --per-layer-share where --reduce-top-k is 0",
        ),
        (
            ["--granules", "1", "--reduce-width", "1"],
            "--reduce-width must be 0 for a model of one granule, got 1.0",
        ),
        (["--layers", "1", "--stages", "1x2x1x128", "--reduce-depth", "0.5"], "one layer, got 0.5"),
        (["--top-k", "1", "--reduce-top-k", "0.5"], "for a model of one expert per token, got 0.5"),
        (["--top-k", "1", "--reduce-threshold", "0.5"], "--reduce-threshold must be 0 for a model"),
        (
            ["--top-k", "1", "--experts", "1", "--reduce-pool", "1"],
            "for a model of one expert, got",
        ),
        (
            ["--positions", "64"],
            "stage 0: length must be at most the model's 64 positions, got 256",
        ),
        (["--fixed", "L9"], "depth must be an integer in [1, 6], got 9"),
        (["--fixed", "L2", "--distill", "1"], "plan: distill = 1.0 needs reduced networks"),
        (["--bias-rate", "0.1"], "plan: bias_rate must be 0 for architecture 'qwen3_moe'"),
        (["--kv-heads", "3"], "--kv-heads must divide --heads 4, got 3"),
        (["--top-k", "9"], "--top-k must be at most --experts 8, got 9"),
        (["--hidden", "12"], "--head-dim must be even and at least 2, got 3, which is --hidden"),
        (["--heads", "32"], "--head-dim must be even and at least 2, got 1, which is --hidden"),
        (["--head-dim", "3"], "--head-dim must be even and at least 2, got 3.\n"),
        (["--granules", "3"], "--granules must divide --expert-hidden 16, got 3"),
        (["--layers", "2000"], "--layers must be in [1, 1024], got 2000"),
        (["--vocab-size", "100"], "--vocab-size must be in [300, 65536]"),
        (["--include", "*.md"], "--include is about a folder of texts, which is not read"),
        (["--corpus", ".", "--chat-fraction", "0"], "--chat-fraction is about the Python library"),
        (["--hold-out", "*"], "--hold-out is about a folder of texts, which is not read"),
        (["--hold-out-text", "x"], "--hold-out-text is about a folder of texts, which is not read"),
        (["--corpus", ".", "--hold-out-text", "nowhere"], "nowhere has no text to hold out. Name"),
        (["--with-library"], "--with-library is about a folder of texts, which is not read"),
        (["--config", "x.json"], "leave out --layers where --config is given"),
        (["--from", "elastic-mini"], "leave out --layers where --from is given"),
        (["--device", "abacus"], "--device abacus cannot be used here: "),
        (["--device", "meta"], "--device meta cannot be used here: "),
        (["--minutes", "1e307"], "--minutes must be at least 0 and at most 10,000,000, got 1e+307"),
        (
            [*ONE_OF_EACH, "--split", "0.5"],
            "plan: split = 0.5 needs reduced networks, but sampling draws none",
        ),
        (["--backend", "cpu"], "the C++ kernels cannot train this model: "),
        (["--seed", "-1"], "--seed must be in [0, 2^63 - 1], got -1"),
        (["--seed", str(2**70)], f"--seed must be in [0, 2^63 - 1], got {2**70}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_in_one_line_before_any_work(
    options: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = () if {"--stages", "--tokens"} & set(options) else ("--tokens", "2048")
    assert train(root, *options, length=length) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (root / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = train_tokenizer([path.read_text() for path in root.rglob("*.py")], 420)
    assert large.get_vocab_size() > 400
    large.save(str(root / "large.json"))
    assert train(root, "--tokenizer", root / "large.json") == 2
    assert "the model's vocabulary and 16 bits allow 399" in capsys.readouterr().err


def test_a_tokenizer_that_cuts_texts_or_fills_them_up_does_not_here(root: Path) -> None:
    whole = train_tokenizer([path.read_text() for path in root.rglob("*.py")], 400)
    whole.save(str(root / "whole.json"))
    whole.enable_truncation(16)
    whole.enable_padding(length=5000)
    whole.save(str(root / "cut.json"))
    for name in ("whole", "cut"):
        options = ["--tokenizer", root / f"{name}.json", "--minutes", 0]
        assert train(root / name, *options) == 0
    streams = [read_manifest(root / name / "run" / "data")[0] for name in ("whole", "cut")]
    assert streams[0]["stream_sha256"] == streams[1]["stream_sha256"]


def test_a_run_inside_its_corpus_goes_on(root: Path) -> None:
    texts = ["--corpus", root / "novels"]
    assert train(root / "novels", *texts, "--minutes", 0) == 0
    (root / "novels" / "run" / "log.jsonl").unlink()  # nor does it have one while text is prepared
    assert train(root / "novels", *texts) == 0
    assert state(root / "novels")["step"] == 6
    assert train(root / "novels", *texts) == 0


def test_a_sandwich_distils_unless_it_is_told_not_to(tmp_path: Path) -> None:
    def distill(*options: str) -> float:
        args = make_parser().parse_args(["--out", str(tmp_path / "none"), *options, *LENGTH])
        plan = read_settings(to_config(args)).plan
        assert plan is not None
        return plan.distill

    assert distill("--sandwich") == 1.0
    assert distill("--sandwich", "--distill", "0") == 0.0
    assert distill("--sandwich", "--distill", "0.25") == 0.25
    assert distill() == 0.0


def test_heads_share_the_hidden_size_unless_they_are_given_one(tmp_path: Path) -> None:
    def heads(*options: str) -> tuple[int, int]:
        args = make_parser().parse_args(["--out", str(tmp_path / "none"), *options, *LENGTH])
        config = read_settings(to_config(args)).model.config
        return config.num_heads, config.head_dim

    usual, channels = heads()
    assert heads("--hidden", "320") == (usual, 320 // usual)
    assert heads("--heads", "2", "--kv-heads", "1", "--hidden", "320") == (2, 160)
    assert heads("--hidden", "320", "--head-dim", "8") == (usual, 8)
    assert heads("--layers", "7") == (usual, channels)


def test_an_axis_of_one_value_is_never_drawn(tmp_path: Path) -> None:
    options = ["--top-k", "1", "--granules", "1", "--split", "0.5", *LENGTH]
    args = make_parser().parse_args(["--out", str(tmp_path / "none"), *options])
    plan = read_settings(to_config(args)).plan
    assert plan is not None
    chances = plan.sampling
    assert chances.top_k == chances.width == chances.threshold == 0.0
    assert min(chances.depth, chances.pool) > 0


def test_a_run_that_is_called_as_a_bundled_model_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(root) == 0
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    again = ["--out", "elastic-mini", "--from", str(root / "run" / "checkpoint"), *LENGTH]
    assert main(again) == 0
    assert main(again) == 0


@pytest.mark.parametrize("manifest", ['{"name": "web"}', "{", "\xff", '{"corpus": {}}'])
def test_a_manifest_of_something_else_is_none(manifest: str, root: Path) -> None:
    assert train(root) == 0
    start = root / "run" / "checkpoint"
    (start / "manifest.json").write_text(manifest, encoding="latin-1")
    assert main(["--out", str(root / "on"), "--from", str(start), *LENGTH]) == 0
    assert not (root / "on" / "parent-manifest.json").exists()


def test_a_run_that_is_there_refuses_other_options_by_their_names(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0) == 0
    before = {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()}
    for options, message in (
        (["--seed", 1], "--seed: the run in"),
        (["--corpus", root / "novels"], "--with-library: the run in"),
        (["--corpus", root / "novels", "--with-library"], "--corpus-fraction: the run in"),
        (["--chat-fraction", 0.1], "was started with 0.05, got 0.1. Repeat the command"),
        (
            ["--stages", "6x4x1x128"],
            f"--stages: the run in {root / 'run'} was started with {STAGES}",
        ),
        (["--lr-scale", 0.5], "--lr-scale: the run in"),
        (["--layers", 7], "--layers: the run in"),
        (["--sandwich"], "--sandwich: the run in"),
        (["--split", "0.5"], "--split: the run in"),
        (["--reduce-width", 0], "--reduce-width: the run in"),
    ):
        capsys.readouterr()
        assert train(root, *options) == 2
        assert message in error(capsys)
    assert {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()} == before
    assert train(root, "--save-every", 2, "--minutes", 60) == 0  # these may change


def test_a_run_of_other_texts_or_fewer_of_them_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "novels" / "Eliot.md").write_text("It was the worst of times. " * 2000)
    texts = ["--corpus", root / "novels"]
    assert train(root, *texts, "--minutes", 0) == 0
    assert train(root, *texts, "--include", "*.md", "--minutes", 0) == 2
    assert "(the first that differs: Dickens_X_1850.txt)" in error(capsys)
    (root / "novels").rename(root / "moved")
    assert train(root, "--corpus", root / "moved", "--minutes", 0) == 0  # the same, elsewhere


def test_held_out_texts_are_listed_in_the_manifest_and_asked_for_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "own.txt").write_text("The theory of the thing that the author thought through. " * 90)
    (root / "novels" / "copy.txt").write_bytes((root / "own.txt").read_bytes())
    texts = ["--corpus", root / "novels", "--minutes", 0]
    held_out = ["--hold-out", "*Forster*", "--hold-out-text", root / "own.txt"]
    assert train(root, *texts, *held_out) == 0
    assert "2 held out" in capsys.readouterr().err
    manifest, _ = read_manifest(root / "run" / "data")
    assert manifest["held_out"]["patterns"] == ["*Forster*"]
    assert [text["name"] for text in manifest["held_out"]["texts"]] == ["own.txt"]
    assert manifest["held_out"]["files"] == ["Forster_Y_1905.txt", "copy.txt"]
    assert [f["name"] for f in manifest["files"]] == ["Dickens_X_1850.txt"]
    assert train(root, *texts, *held_out) == 0
    capsys.readouterr()
    assert train(root, *texts, *held_out[2:]) == 2
    assert error(capsys).startswith("--hold-out: ")
    assert train(root, *texts, *held_out[:2]) == 2
    assert re.search(r"was prepared with own\.txt [0-9a-f]{8}, got nothing", error(capsys))
    (root / "own.txt").write_text("The other text. " * 90)
    assert train(root, *texts, *held_out) == 2
    assert error(capsys).startswith("--hold-out-text: ")


def test_a_run_of_a_version_that_held_out_some_texts_unasked_is_resumed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--corpus", root / "novels", "--minutes", 0]
    assert train(root, *texts, "--hold-out", "*forster*") == 0
    path = root / "run" / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["held_out"]
    path.write_text(json.dumps(manifest))
    (root / "run" / "state.safetensors").unlink()  # it names the manifest's sum
    assert train(root, *texts) == 0
    (root / "novels" / "Dickens_X_1850.txt").write_text("Another text. " * 2000)
    assert train(root, *texts) == 2
    assert "(the first that differs: Dickens_X_1850.txt)" in error(capsys)


def test_a_torn_manifest_ends_the_run_at_its_start(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, "--minutes", 0) == 0
    path = root / "run" / "data" / "manifest.json"
    path.write_text(path.read_text()[:50])
    assert train(root) == 1
    assert "is torn" in error(capsys)


def test_a_checkpoint_is_trained_on_and_named_as_the_parent(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(root, length=("--tokens", 2048, "--batch-tokens", 512)) == 0
    first = root / "first"
    (root / "run").rename(first)
    begin = ("--from", first / "checkpoint", "--reduce-threshold", 1, "--reduce-width", 0)
    short = ("--tokens", 512, "--batch-tokens", 512, "--length", 128)
    assert train(root, *begin, "--minutes", 0, length=short, model=()) == 0
    (parent,) = {state(root)["parent"]}
    assert parent.startswith("first sha256:")
    weights = load_state(root / "run" / "state.safetensors")[0]
    for name, p in load_model(first / "checkpoint").named_parameters():
        assert weights[f"model.{name}"].equal(p.float()), name
    (first / "checkpoint").rename(root / "gone")  # what is done no longer needs it
    first.rename(root / "moved")
    monkeypatch.chdir(root)
    begin = ("--from", "first/checkpoint", *begin[2:])  # as it might have been typed
    assert train(root, *begin, length=short, model=()) == 0
    block = load_config(root / "run" / "checkpoint").elastic
    before = load_config(root / "gone").elastic
    assert block.parent == parent
    assert block.tokens == 2048 + 512
    reported, first_told = (
        json.loads((root / where / "manifest.json").read_text())
        for where in ("run/checkpoint", "gone")
    )
    assert reported["before"] == first_told  # every file and step that led to the weights
    assert reported["training"]["tokens_before"] == 2048
    assert "before" not in first_told
    assert set(block.trained) >= {"threshold"}
    assert "width" not in block.trained  # not kept up
    assert set(block.trained["threshold"]) >= set(before.trained.get("threshold", ()))
    assert train(root, length=short, model=()) == 2


def test_a_config_json_of_another_family_is_trained_and_exported_as_it_is(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "config.json"
    path.write_text(json.dumps(ERNIE))
    options = ("--config", path, "--bias-rate", 0.01)
    assert train(root, *options, length=("--tokens", 1024), model=()) == 0
    written = json.loads((root / "run" / "checkpoint" / "config.json").read_text())
    assert {key: written[key] for key in ERNIE} == ERNIE
    assert written["eos_token_id"] == [1, 4]
    model = load_model(root / "run" / "checkpoint")
    biases = [p for name, p in model.named_parameters() if name.endswith("correction_bias")]
    assert any(bool(bias.any()) for bias in biases)
    own = root / "run" / "config.json"
    kept = own.read_bytes()
    own.write_text(json.dumps({**json.loads(kept), "rms_norm_eps": 1e-4}))
    with pytest.raises(TrainingError, match=r"config\.json is of another model than .*Restore"):
        export(root / "run", root / "out")
    own.write_bytes(kept)
    path.write_text(json.dumps({**ERNIE, "rms_norm_eps": 1e-4}))
    capsys.readouterr()
    assert train(root, *options, length=("--tokens", 1024), model=()) == 2
    assert error(capsys).startswith(
        f"--config: the run in {root / 'run'} was started with ernie4_5_moe"
    )
    path.write_text(json.dumps({**ERNIE, "tie_word_embeddings": False}))
    assert main(["--out", str(root / "other"), "--config", str(path)]) == 2
    assert "tie_word_embeddings must be true, got false" in error(capsys)


def test_it_runs_without_what_the_command_line_needs() -> None:
    """From a bare checkout: torch, numpy, safetensors and tokenizers are all there is."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'rich', 'matplotlib', 'jinja2', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "import elastic_moe.train.session, elastic_moe.train.export\n"
        "from elastic_moe.train.__main__ import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m elastic_moe.train.export" in done.stdout


def test_what_a_run_without_a_state_leaves_is_no_checkpoint(root: Path) -> None:
    assert train(root, "--minutes", 0) == 0
    with pytest.raises(TrainingError, match="no step has run with all 6 layers"):
        export(root / "run", root / "out")
