"""The runs of the experiment are pairs, resume, and are measured as what they are."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.engine import Engine
from elastic_moe.errors import BenchmarkError, CorpusError, TrainingError
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.prepare import Mixture, open_stream, prepare
from experiments.elastic_mini.recipe import HELD_OUT_AUTHORS
from experiments.science import evaluate, report, runs, train
from experiments.science.measuring import (
    AUTHORS,
    EXCERPT_CHARACTERS,
    EXCERPT_START,
    REFERENCE,
    evaluation_texts,
    excerpts,
    held_out_authors,
)
from experiments.science.runs import CHECKPOINT, RUNS, Run, choose
from experiments.science.summary import POINTS
from tests.train.tiny import library

STEP = 4096
TINY = replace(runs.CONFIG, vocab_size=300, hidden_size=16, expert_hidden=8, head_dim=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CONFIG", TINY)
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare(tmp_path / "data", library(tmp_path), [], Mixture(), vocab_size=300)
    return tmp_path / "data"


def novels(root: Path, *authors: str) -> Path:
    folder = root / "novels"
    folder.mkdir()
    for author in authors:
        words = " ".join(f"{author} wrote {n * n} letters." for n in range(2000))
        (folder / f"{author}_Book_1900.txt").write_text(words)
    return folder


# --- what the runs are


def test_one_of_each_comes_first_then_what_the_bars_need() -> None:
    names = [run.name for run in RUNS]
    assert names[:4] == ["elastic-0", "inelastic-0", "depth9-0", "pool8-0"]
    assert names[4:8] == ["elastic-1", "inelastic-1", "elastic-2", "inelastic-2"]
    assert names[8:11] == ["frugal-0", "frugal-1", "frugal-2"]
    assert names[15:] == ["drawn-0"]
    assert len(set(names)) == 16


def test_a_run_has_as_many_whole_steps_as_its_tokens_fill() -> None:
    plan = Run("elastic", 2).plan(10_000_000)
    assert (plan.total_steps, plan.seed) == (2441, 2)
    assert plan.stages[0].step_tokens == STEP
    with pytest.raises(TrainingError, match="--tokens must be at least 4096"):
        Run("elastic", 0).plan(STEP - 1)


def test_the_elastic_run_shares_every_step_and_the_drawn_one_has_one_network_a_step() -> None:
    elastic, drawn = Run("elastic", 1).plan(), Run("drawn", 1).plan()
    for step in range(50):
        full, reduced = elastic.passes(TINY.shape, step)
        assert (full.subnet.name, full.weight, full.rows) == ("full", 0.75, slice(0, 6))
        assert (reduced.weight, reduced.rows) == (0.25, slice(6, 8))
        assert len(drawn.passes(TINY.shape, step)) == 1
    assert replace(drawn, sampling=elastic.sampling, split=0.75) == elastic


def test_the_frugal_run_has_one_sequence_of_eight_for_what_is_drawn() -> None:
    frugal, elastic = Run("frugal", 1).plan(), Run("elastic", 1).plan()
    for step in range(50):
        full, reduced = frugal.passes(TINY.shape, step)
        assert (full.subnet.name, full.weight, full.rows) == ("full", 0.875, slice(0, 7))
        assert (reduced.weight, reduced.rows) == (0.125, slice(7, 8))
    assert replace(frugal, split=0.75) == elastic


@pytest.mark.parametrize(
    ("family", "name"), [("inelastic", "full"), ("depth9", "L9"), ("pool8", "p8")]
)
def test_a_control_runs_one_network_in_every_step(family: str, name: str) -> None:
    plan = Run(family, 1).plan()
    assert {plan.subnet(TINY.shape, step).name for step in range(200)} == {name}


def test_the_elastic_run_draws_every_point_that_it_is_judged_at() -> None:
    plan = Run("elastic", 0).plan()
    trained = replay(plan, TINY.shape, plan.total_steps).trained
    assert {9, 6, 12} <= trained["depth"]
    assert {1, 2, 4} <= trained["top_k"]
    assert {4, 8} <= trained["width"]
    assert {8, 16} <= trained["pool"]


def test_runs_of_one_seed_begin_alike_and_read_alike(data: Path) -> None:
    def start(run: Run) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        trainer = Trainer(TINY, run.plan(), open_stream(data, run.seed))
        batch, _ = trainer.stream.batch(0, 8, 512)
        return {n: p.detach() for n, p in trainer.model.named_parameters()}, batch

    (first, read), (second, read_too) = start(Run("elastic", 1)), start(Run("depth9", 1))
    other, read_otherwise = start(Run("elastic", 0))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert np.array_equal(read, read_too)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert not np.array_equal(read, read_otherwise)


def test_only_takes_names_that_there_are() -> None:
    assert [run.name for run in choose("pool8-0,elastic-0")] == ["elastic-0", "pool8-0"]
    assert choose(None) == list(RUNS)
    with pytest.raises(TrainingError, match="no run 'elastic'; there are elastic-0"):
        choose("elastic")


# --- training and measuring them


def command(data: Path, out: Path, *more: str, tokens: int = STEP) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--tokens", str(tokens), *more]


def test_training_stops_in_time_goes_on_and_is_measured(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "runs"
    names = "--only=elastic-0,inelastic-0,depth9-0"
    assert train.main(command(data, out, names, "--minutes", "0")) == 0
    assert "next: run the same command again" in capsys.readouterr().out
    assert not (out / "elastic-0").exists()
    assert train.main(command(data, out, names)) == 0
    assert "next: " not in capsys.readouterr().out
    (out / "elastic-0" / runs.STATE).unlink()  # as if its checkpoint had been brought here
    assert train.main(command(data, out, names)) == 0
    assert "elastic-0: finished before" in capsys.readouterr().out
    assert not (out / "elastic-0" / runs.STATE).exists()
    assert train.main(command(data, out, names, tokens=2 * STEP)) == 1
    assert "finished with another plan: stages" in capsys.readouterr().err

    assert train.main(["--out", str(out), "--status"]) == 0
    states = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert states["depth9-0"][:4] == ["finished", "1", "/", "1"]
    assert states["pool8-0"][0] == "waiting"

    arguments = ["x", "--runs", str(out), "--tokens", "1024", "--out", str(tmp_path / "r.jsonl")]
    arguments += ["--novels", str(novels(tmp_path, *HELD_OUT_AUTHORS))]
    monkeypatch.setattr("sys.argv", arguments)
    assert evaluate.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    by_case = {line["case"]: line for line in lines}
    assert list(by_case) == ["elastic-0", "inelastic-0", "depth9-0", "summary"]
    check_lines(by_case, out)
    shown = list(report.report(tmp_path))
    assert shown == []  # it is the name of the file that counts
    (tmp_path / "science.jsonl").write_text((tmp_path / "r.jsonl").read_text())
    assert len(list(report.report(tmp_path))) == 2 * 2 + 1

    # Another day: a run whose checkpoint is gone keeps its line, what is there is not measured
    # again, and what they say together stays the same.
    for name in ("elastic-0", "depth9-0"):
        shutil.rmtree(out / name)
    monkeypatch.setattr(evaluate, "evaluate", unexpected)
    capsys.readouterr()
    assert evaluate.main() == 0
    said = capsys.readouterr().err
    assert f"elastic-0: not in {out}, its line is kept" in said
    assert "inelastic-0: measured before" in said
    again = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert again[-1].pop("date") >= lines[-1]["date"]
    assert again == [*lines[:-1], {k: v for k, v in lines[-1].items() if k != "date"}]
    monkeypatch.setattr("sys.argv", [*arguments, "--again"])
    with pytest.raises(AssertionError, match="inelastic-0 was measured"):
        evaluate.main()
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr("sys.argv", arguments)
    for change in ({"weights_sha256": "0" * 64}, {"dtype": "float16"}):
        other = [line | change if line["case"] == "inelastic-0" else line for line in lines]
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
        with pytest.raises(AssertionError, match="inelastic-0 was measured"):
            evaluate.main()


def unexpected(run: Run, *_: Any) -> Any:
    raise AssertionError(f"{run.name} was measured")


def test_what_is_measured_stays_when_a_later_run_fails(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "runs", tmp_path / "r.jsonl"
    assert train.main(command(data, out, "--only=elastic-0,inelastic-0")) == 0
    arguments = ["x", "--runs", str(out), "--tokens", "1024", "--out", str(results)]
    monkeypatch.setattr(
        "sys.argv", [*arguments, "--novels", str(novels(tmp_path, *HELD_OUT_AUTHORS))]
    )
    (out / "inelastic-0" / CHECKPOINT / "model.safetensors").write_bytes(b"torn")
    assert evaluate.main() == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["elastic-0"]
    windows = lines[0]["texts"][REFERENCE]
    counts = np.array(windows["window_tokens"])
    for reported in windows["points"].values():
        mean = float((np.array(reported["window_nats"]) * counts).sum() / counts.sum())
        assert mean == pytest.approx(reported["nats_per_token"], abs=2e-5)


def test_a_run_goes_on_with_its_own_text_alone(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "runs", tmp_path / "other"
    assert train.main(command(data, out, "--only=elastic-0")) == 0
    tmp_path.joinpath("more").mkdir()
    prepare(other, library(tmp_path / "more", 299), [], Mixture(), vocab_size=300)
    before = (out / "elastic-0" / "data" / "manifest.json").read_bytes()
    assert train.main(command(other, out, "--only=elastic-0")) == 1
    assert "elastic-0 was started on other text: its stream_sha256" in capsys.readouterr().err
    assert (out / "elastic-0" / "data" / "manifest.json").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_not_measured_under_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert (
        train.main(["--data", str(data), "--out", str(out), "--tokens", "4096", "--only=drawn-0"])
        == 0
    )
    (out / "drawn-0").rename(out / "elastic-0")
    where = ["x", "--runs", str(out), "--novels", str(novels(tmp_path, *HELD_OUT_AUTHORS))]
    monkeypatch.setattr("sys.argv", [*where, "--tokens", "1024"])
    assert evaluate.main() == 1
    assert "elastic-0 was finished with another plan: sampling = " in capsys.readouterr().err


def check_lines(by_case: dict[str, Any], out: Path) -> None:
    for case, points in (
        ("elastic-0", list(POINTS)),
        ("inelastic-0", list(POINTS)),
        ("depth9-0", ["L9"]),
    ):
        line = by_case[case]
        assert (line["kind"], line["seed"]) == ("run", 0)
        assert line["training"]["tokens"] == STEP
        assert line["training"]["seconds"] > 0
        assert len(line["data"]["stream_sha256"]) == 64
        for text in (REFERENCE, AUTHORS):
            assert line["texts"][text]["corpus"]["scored_tokens"] == 1024
            assert list(line["texts"][text]["points"]) == points
    assert by_case["depth9-0"]["texts"][AUTHORS]["points"]["L9"]["nats_lost"] is None
    summary = by_case["summary"]
    assert all(bar["met"] is None and bar["seeds"] == 1 for bar in summary["bars"])
    # What the summary says is what the checkpoint does, asked in another way.
    nine = by_case["depth9-0"]["texts"][REFERENCE]["points"]["L9"]["nats_per_token"]
    reported = summary["texts"][REFERENCE]["points"]["L9"]
    assert reported["specialist"]["mean"] == nine
    with Engine.from_pretrained(out / "depth9-0" / CHECKPOINT) as engine:
        losses = []
        for window in evaluation_texts(engine.tokenizer, None, 1024)[REFERENCE].windows:
            logprobs = torch.from_numpy(engine.score(window.inputs, "L9")).log_softmax(-1)
            nats = -logprobs.gather(1, torch.tensor(window.targets)[:, None])
            losses.append(nats[window.first_scored :])
    assert float(torch.cat(losses).mean()) == pytest.approx(nine, abs=1e-4)


def test_no_finished_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--runs", str(tmp_path), "--novels", str(tmp_path)])
    assert evaluate.main() == 1


def run_line(case: str = "elastic-0", **plan: Any) -> dict[str, Any]:
    family, _, seed = case.partition("-")
    sampling = {"fixed": "" if family == "elastic" else "full"}
    return {
        "case": case,
        "family": family,
        "data": {"stream_sha256": "a"},
        "training": {
            "steps": 9,
            "plan": {
                "stages": [{"steps": 9, "layers": 12, "pieces": 8, "length": 512}],
                "seed": int(seed),
                "muon_lr": 0.02,
                "dtype": "float32",
                "save_every_steps": 1,
                "sampling": sampling,
                **plan,
            },
        },
        "model": {"num_layers": 12},
        "texts": {AUTHORS: {"corpus": {"sha256": "c", "scored_tokens": 1024}}},
        "dtype": "bfloat16",
        "backend": "cpu",
    }


def test_runs_that_were_trained_or_measured_otherwise_are_not_compared() -> None:
    same = [run_line("elastic-0"), run_line("inelastic-0"), run_line("elastic-1")]
    evaluate.check_comparable([*same, run_line("elastic-2", save_every_steps=7)])
    evaluate.check_comparable([*same[1:2], run_line("elastic-2", split=0.5, distill=0.5)])
    evaluate.check_comparable([*same, run_line("elastic-2", split=0.0)])  # as if not said
    for what, line in (
        ("plan.muon_lr is 0.2 and 0.02", run_line("elastic-2", muon_lr=0.2)),
        ("plan.dtype is bfloat16 and float32", run_line("inelastic-1", dtype="bfloat16")),
        ("plan.split is 0.5 and 0.0", run_line("elastic-2", split=0.5)),
        ("'fixed': 'L9'} and {", run_line("elastic-2", sampling={"fixed": "L9"})),
        ("stream_sha256 is b and a", run_line("pool8-0") | {"data": {"stream_sha256": "b"}}),
        ("model.num_layers is 24 and 12", run_line("pool8-0") | {"model": {"num_layers": 24}}),
        ("dtype is float32 and bfloat16", run_line("pool8-0") | {"dtype": "float32"}),
        ("backend is reference and cpu", run_line("pool8-0") | {"backend": "reference"}),
        (
            "held-out-authors.scored_tokens is 512 and 1024",
            run_line("pool8-0")
            | {"texts": {AUTHORS: {"corpus": {"sha256": "c", "scored_tokens": 512}}}},
        ),
    ):
        with pytest.raises(BenchmarkError, match=re.escape(what)):
            evaluate.check_comparable([*same, line])
    steps = run_line("pool8-0")
    steps["training"]["steps"] = 8
    with pytest.raises(BenchmarkError, match=r"pool8-0 and elastic-0 .* steps is 8 and 9"):
        evaluate.check_comparable([*same, steps])


def test_lines_without_windows_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(run_line() | {"kind": "run"}) + "\n")
    with pytest.raises(BenchmarkError, match="the line of elastic-0 has no losses by window"):
        evaluate.read_runs(path)
    assert evaluate.read_runs(tmp_path / "none.jsonl") == evaluate.read_runs(None) == {}


def test_a_line_of_another_recipe_is_not_taken_for_one_of_its_name(tmp_path: Path) -> None:
    path, line = tmp_path / "r.jsonl", run_line("drawn-0", sampling={}) | {"kind": "run", "seed": 0}
    line["texts"][AUTHORS]["window_tokens"] = [1]
    path.write_text(json.dumps(line) + "\n")
    assert list(evaluate.read_runs(path)) == ["drawn-0"]
    line |= {"case": "elastic-0", "family": "elastic"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BenchmarkError, match=r"elastic-0 was trained with sampling = .* now \{"):
        evaluate.read_runs(path)
    line["training"]["plan"]["sampling"] = {"prefix": 1.0}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BenchmarkError, match=r"split = 0\.0, which for elastic is now 0\.75"):
        evaluate.read_runs(path)


def test_a_half_written_log_and_state_say_how_far_a_run_is(tmp_path: Path, data: Path) -> None:
    run = Run("elastic", 0)
    folder = tmp_path / run.name
    trainer = Trainer(TINY, run.plan(3 * STEP), open_stream(data, 0))
    trainer.train_step()
    folder.mkdir()
    trainer.save(folder / runs.STATE)
    (folder / "plan.json").write_text(json.dumps(trainer.plan.to_json()))
    logged = [{"step": 1, "loss": 4.0, "seconds": 2.0}, {"step": 2, "loss": 3.0, "seconds": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in logged) + '{"loss"')
    found = runs.progress_of(folder)
    assert found == runs.Progress("begun", 1, 3, 3.5, 3.0)


# --- the held-out text


def test_the_held_out_text_is_the_same_stretch_of_every_novel(tmp_path: Path) -> None:
    folder = novels(tmp_path, *HELD_OUT_AUTHORS, "Dickens")
    found = excerpts(folder)
    assert list(found) == [f"{author}_Book_1900.txt" for author in HELD_OUT_AUTHORS]
    whole = (folder / "Gissing_Book_1900.txt").read_text()
    end = EXCERPT_START + EXCERPT_CHARACTERS
    assert found["Gissing_Book_1900.txt"] == whole[EXCERPT_START:end]
    assert held_out_authors(folder).text == "\n\n".join(found.values())


def test_a_missing_author_or_a_short_novel_is_an_error(tmp_path: Path, mini: Engine) -> None:
    folder = novels(tmp_path, *HELD_OUT_AUTHORS[:3])
    with pytest.raises(CorpusError, match="no Schreiner_"):
        excerpts(folder)
    (folder / "Schreiner_Short_1900.txt").write_text("x" * 31_999)
    with pytest.raises(CorpusError, match=r"31,999 characters; the excerpt ends at 32,000"):
        excerpts(folder)
    (folder / "Schreiner_Short_1900.txt").write_text("xy zw " * 5_334)
    with pytest.raises(CorpusError, match=r"held-out-authors gives .* 100,000 are needed"):
        evaluation_texts(mini.tokenizer, folder, 100_000)
