"""The bars of elastic-mini turn red when they should, and n-grams count what it has read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import BenchmarkError
from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.text.prepare import Mixture, prepare
from experiments.elastic_mini import measure as elastic_mini
from experiments.elastic_mini.measure import FIRST, Bars, check_out, judge, read_lines
from experiments.elastic_mini.opponents import choose_training, read_trainings
from experiments.science.measuring import AUTHORS, REFERENCE
from tests.train.tiny import library

Line = dict[str, Any]


@pytest.fixture
def first() -> Line:
    return read_lines(FIRST)[REFERENCE]


@pytest.fixture
def later(first: Line) -> Line:
    """Other weights that meet every bar, the new ones by little."""
    line = copy.deepcopy(first)
    line |= {"weights_sha256": "0" * 64, "ngram_nats_per_token": 4.6 / 0.929, "ngram_order": 4}
    line["points"]["full"] |= {
        "nats_per_token": 4.6,
        "bits_per_byte": 0.969 * first["points"]["full"]["bits_per_byte"],
    }
    for name, lost in {"k2": 0.049, "L36": 0.249, "L12": 0.101, "p8": 0.349}.items():
        line["points"][name]["nats_lost"] = lost
    return line


def missed(line: Line, first: Line | None) -> list[str]:
    return [f"{bar['what']} {bar['needed']}" for bar in judge(line, first) if not bar["met"]]


def test_the_first_version_is_held_against_its_own_bars_alone(first: Line) -> None:
    assert missed(first, first) == []
    assert len(judge(first, first)) == 1 + 8 + 5 + 3
    assert not any("first version" in bar["what"] for bar in judge(first, first))


def test_weights_after_it_have_more_bars(first: Line, later: Line) -> None:
    assert missed(later, first) == []
    assert len(judge(later, first)) == 1 + 8 + 5 + 3 + 2 + 3 + 1


def point(name: str, key: str, value: float) -> Callable[[Line], None]:
    return lambda line: line["points"][name].update({key: value})


def step(better: str, errors: float) -> Callable[[Line], None]:
    def change(line: Line) -> None:
        one = next(s for s in line["steps"] if s["better"] == better)
        one["nats"] = errors * one["standard_error"]

    return change


@pytest.mark.parametrize(
    ("change", "bar"),
    [
        (point("full", "bits_per_byte", 1.97), "bits per byte over the first version's <= 0.97"),
        (
            lambda line: line.update(ngram_nats_per_token=4.6 / 0.931),
            "bits per byte over the best n-gram's <= 0.93",
        ),
        (point("k2", "nats_lost", 0.0501), "nats lost by k2 <= 0.05"),
        (point("L36", "nats_lost", 0.251), "nats lost by L36 <= 0.25"),
        (point("p8", "nats_lost", 0.351), "nats lost by p8 <= 0.35"),
        (point("w4", "nats_lost", 0.401), "nats lost by w4 <= 0.4"),
        (point("L24", "nats_lost", 1.21), "nats lost by L24 <= 1.2"),
        (point("L12", "nats_lost", 0.099), "nats lost by L12 >= 0.1"),
        (point("full", "kl_to_full", 1e-6), "KL of full to full <= 0"),
        (point("full", "top1_agreement", 0.9999), "agreement of full with full >= 1"),
        (
            lambda line: line.update(bigram_nats_per_token=4.8),
            "nats better than the bigram >= 0.3",
        ),
        (step("w4", 2.9), "w4 > w2, in standard errors > 3"),
        (step("k2", -5.0), "k2 > k1, in standard errors > 3"),
    ],
)
def test_each_bar_is_missed_by_little(
    first: Line, later: Line, change: Callable[[Line], None], bar: str
) -> None:
    change(later)
    assert missed(later, first) == [bar]


def test_what_was_not_measured_is_not_met(first: Line, later: Line) -> None:
    later["ngram_nats_per_token"] = None
    assert missed(later, first) == ["bits per byte over the best n-gram's <= 0.93"]
    assert missed(later, None)[0] == "bits per byte over the first version's <= 0.97"


def test_one_window_of_text_decides_no_step(first: Line, later: Line) -> None:
    one = later["steps"][0]
    one["standard_error"] = None
    what = f"{one['better']} > {one['worse']}, in standard errors > 3"
    assert missed(later, first) == [what]


def test_another_text_is_no_comparison_with_the_first_version(first: Line, later: Line) -> None:
    later["corpus"]["sha256"] = "1" * 64
    bar = next(b for b in judge(later, first) if "first version" in b["what"])
    assert (bar["value"], bar["met"]) == (None, None)


# --- what it has read, and what n-grams count of it


def manifest(
    sha256: str, steps: int, stream_tokens: int, before: Line | None = None, untold: int = 0
) -> Line:
    """As the export of a training writes it: steps of one piece, planned for two more."""
    plan = TrainingPlan(stages=parse_stages(f"6x{steps + 2}x1x512"))
    training = {"plan": plan.to_json(), "steps": steps, "tokens": 512 * steps}
    training["tokens_before"] = untold + (before["training"]["tokens"] if before else 0)
    reported = {"corpus": {"stream_sha256": sha256, "stream_tokens": stream_tokens}}
    return reported | {"training": training} | ({"before": before} if before else {})


def write(path: Path, value: Line) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path.parent


def prepared(folder: Path, sha256: str) -> Path:
    keys = ("seed", "files", "stream_tokens", "tokenizer_sha256", "tokenizer_given")
    return write(folder / "manifest.json", dict.fromkeys(keys, 0) | {"stream_sha256": sha256})


# Read twice over: 10,000 tokens hold 19 pieces. The later text is longer, and less of it was read.
CHAIN = manifest("b", 12, 90_000, before=manifest("b", 7, 90_000, before=manifest("a", 40, 10_000)))


def test_a_chain_of_trainings_is_read_from_the_first_one(tmp_path: Path) -> None:
    assert read_trainings(tmp_path) == []
    found = read_trainings(write(tmp_path / "manifest.json", CHAIN))
    assert [(one.stream_sha256, one.steps, one.tokens) for one in found] == [
        *(("a", 40, 40 * 512), ("b", 7, 7 * 512), ("b", 12, 12 * 512))
    ]
    assert found[0].plan.total_steps == 42
    assert [one.different_tokens for one in found] == [19 * 512, 7 * 512, 12 * 512]


@pytest.mark.parametrize("spoilt", [{"training": 1}, {"corpus": {}}, {"before": {"training": {}}}])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, spoilt: Line) -> None:
    write(tmp_path / "manifest.json", CHAIN | spoilt)
    with pytest.raises(BenchmarkError, match=r"must hold 'corpus' and 'training'"):
        read_trainings(tmp_path)


def test_the_ngrams_are_of_the_training_that_read_the_most(tmp_path: Path) -> None:
    trainings = read_trainings(write(tmp_path / "manifest.json", CHAIN))
    assert choose_training(trainings, prepared(tmp_path / "first", "a")) is trainings[0]
    reported = r"the run of 40 steps that read the most, 9,728: .* stream_sha256 is a\."
    with pytest.raises(BenchmarkError, match=rf"\(stream_sha256 b\) .* read 6,144 .* {reported}"):
        choose_training(trainings, prepared(tmp_path / "later", "b"))
    with pytest.raises(BenchmarkError, match=rf"\(stream_sha256 c\) .* read 0 .* {reported}"):
        choose_training(trainings, prepared(tmp_path / "other", "c"))


def test_what_was_read_and_is_not_told_cannot_be_counted(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", "a")
    with pytest.raises(BenchmarkError, match=r"tells of the tokens that it has read"):
        choose_training([], data)
    write(tmp_path / "manifest.json", manifest("a", 40, 10_000, untold=5_000))
    with pytest.raises(BenchmarkError, match="tells of 5,000 of the tokens"):
        choose_training(read_trainings(tmp_path), data)
    older = manifest("a", 40, 10_000)
    del older["corpus"]["stream_sha256"]
    write(tmp_path / "manifest.json", older)
    found = read_trainings(tmp_path)
    assert found[0].stream_sha256 is None
    with pytest.raises(BenchmarkError, match=r"tells of the tokens that it has read"):
        choose_training(found, data)


# --- the file of results


def test_a_file_is_not_replaced_by_lines_that_say_less(tmp_path: Path, first: Line) -> None:
    out = tmp_path / "x.jsonl"
    check_out(out, [REFERENCE], with_ngrams=False)
    with pytest.raises(BenchmarkError, match="is no folder"):
        check_out(tmp_path / "nowhere" / "x.jsonl", [REFERENCE], with_ngrams=False)
    lines = [first, copy.deepcopy(first)]
    lines[1]["corpus"]["name"] = AUTHORS
    lines[0] |= dict.fromkeys(("bigram_nats_per_token", "bigram_k"))
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    check_out(out, [REFERENCE], with_ngrams=False)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BenchmarkError, match=f"has the line of {AUTHORS}, .* Give --novels"):
        check_out(out, [REFERENCE], with_ngrams=True)
    with pytest.raises(BenchmarkError, match=f"has n-grams on {AUTHORS}, .* Give --run"):
        check_out(out, [REFERENCE, AUTHORS], with_ngrams=False)
    check_out(out, [REFERENCE, AUTHORS], with_ngrams=True)
    out.write_text('{"case": "another benchmark"}\n')
    with pytest.raises(BenchmarkError, match="holds no results of this benchmark"):
        check_out(out, [REFERENCE, AUTHORS], with_ngrams=True)


def test_a_line_says_what_was_trained_on_and_what_was_counted(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(elastic_mini, "BUNDLES", {"full": (6, 4)})
    monkeypatch.setattr(elastic_mini, "LADDERS", {"depth": ("full", "L4")})
    monkeypatch.setattr(elastic_mini, "judge", lambda *_: Bars())
    model, data, out = tmp_path / "model", tmp_path / "run" / "data", tmp_path / "x.jsonl"
    shutil.copytree(tiny_folder, model)
    data.parent.mkdir()
    stream = prepare(data, library(tmp_path), [], Mixture(), vocab_size=300)
    sha256, size = stream["stream_sha256"], stream["stream_tokens"]
    chain = manifest("later", 1, 90_000, before=manifest(sha256, 3, size))
    write(model / "manifest.json", chain)

    command = [str(model), "--tokens", "512", "--out", str(out)]
    assert elastic_mini.main([*command, "--run", str(data.parent)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    counted = {"steps": 3, "tokens": 1536, "different_tokens": 1536, "stream_sha256": sha256}
    later = {"steps": 1, "tokens": 512, "different_tokens": 512, "stream_sha256": "later"}
    assert (line["trainings"], line["ngrams_counted"]) == ([counted, later], counted)
    assert min(line["bigram_nats_per_token"], line["ngram_nats_per_token"]) > 0

    before = out.read_text()
    assert elastic_mini.main(command) == 1
    assert "which would be lost. Give --run" in capsys.readouterr().err
    assert out.read_text() == before


def test_what_cannot_be_measured_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert elastic_mini.main(["nosuch"]) == 1
    assert "error: no checkpoint at 'nosuch'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        elastic_mini.main(["--run", str(tmp_path), "--data", str(tmp_path)])
    assert error.value.code == 2
