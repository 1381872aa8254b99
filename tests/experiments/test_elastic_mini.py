"""The bundled super-network is trained, elastic on every axis, and what its card says it is."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe.engine import Engine
from elastic_moe.lab.provenance import describe_commit
from elastic_moe.lab.sweeps.text import evaluation_set, language_reference
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text.prepare import Mixture, open_stream, prepare
from experiments.elastic_mini import measure as elastic_mini
from experiments.elastic_mini import model_card
from experiments.elastic_mini import opponents as mini_opponents
from experiments.elastic_mini.bigram import Bigram, fit_bigram
from experiments.elastic_mini.ngram import KneserNey, fit_kneser_ney
from experiments.science.measuring import AUTHORS, REFERENCE, measure
from tests.train.tiny import CONFIG, PLAN, library

ROOT = Path(__file__).resolve().parents[2]
FOLDER = BUNDLED / "elastic-mini"
FIRST = elastic_mini.read_lines(elastic_mini.FIRST)


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, Any]]:
    """The committed measurements, by text."""
    return elastic_mini.read_lines(ROOT / "benchmarks" / "results" / "elastic-mini.jsonl")


@pytest.mark.parametrize("text", [REFERENCE, AUTHORS])
def test_the_committed_measurement_is_of_these_weights_and_meets_every_bar(
    mini: Engine, committed: dict[str, dict[str, Any]], text: str
) -> None:
    line = committed[text]
    assert line["weights_sha256"] == mini.weights_sha256
    assert line["corpus"]["scored_tokens"] >= 20_000
    assert line["bars"] == elastic_mini.judge(line, FIRST[text])
    assert [bar for bar in line["bars"] if not bar["met"]] == []
    # Both n-grams are of the training tokens, which the first version's data would be needed for.
    if line["weights_sha256"] != FIRST[text]["weights_sha256"]:
        assert line["bigram_nats_per_token"] is not None


def test_the_first_version_was_measured_on_the_same_texts(
    committed: dict[str, dict[str, Any]],
) -> None:
    assert set(FIRST) == set(committed) == {REFERENCE, AUTHORS}
    for text, line in FIRST.items():
        assert line["corpus"] == committed[text]["corpus"]


def test_quality_falls_along_every_axis_and_stays_within_its_limits(mini: Engine) -> None:
    text = evaluation_set(language_reference(), mini.tokenizer, 3_072)
    line = elastic_mini.record(mini, text, measure(mini, text, elastic_mini.BUNDLES))
    bars = elastic_mini.judge_any(line | elastic_mini.NO_OPPONENTS)
    assert len(bars) == 8 + 5 + 3
    assert [bar for bar in bars if not bar["met"]] == []


def test_the_model_card_is_up_to_date() -> None:
    assert (FOLDER / "README.md").read_text() == model_card.card()


def test_a_card_names_the_ngrams_that_were_measured_and_no_others(
    committed: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = committed[REFERENCE] | elastic_mini.NO_OPPONENTS

    def card(**opponents: float) -> str:
        monkeypatch.setattr(model_card, "newest_results", lambda _sha256: [line | opponents])
        return " ".join(model_card.card().split())

    assert "gram" not in card().partition("Held-out quality")[2]
    bigram = {"bigram_nats_per_token": 5.5, "bigram_k": 0.1}
    reported = card(**bigram)
    assert "bigram over the same training tokens has 5.500 nats per token." in reported
    assert "Kneser-Ney" not in reported
    reported = card(**bigram, ngram_nats_per_token=4.75, ngram_order=3)
    assert (
        "5.500 nats per token, the best interpolated n-gram (Kneser-Ney, n = 3) 4.750." in reported
    )


def test_benchmarks_name_the_commit_of_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert describe_commit() == (head or None)


def test_the_ngrams_read_the_steps_that_were_done_not_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Engine
) -> None:
    prepare(tmp_path / "data", library(tmp_path), [], Mixture(), vocab_size=300)
    config = dataclasses.replace(CONFIG, vocab_size=300)
    trainer = Trainer(config, PLAN, open_stream(tmp_path / "data", PLAN.seed))
    for _ in range(3):
        trainer.train_step()
    training = mini_opponents.Training(PLAN, trainer.step, trainer.tokens, 0, "0" * 64, 10**6)
    text = evaluation_set(language_reference(), mini.tokenizer, 1024)
    fitted: dict[str, Any] = {}

    def fit(*args: Any) -> Bigram:
        fitted["bigram"] = fit_bigram(*args)
        return fitted["bigram"]

    def fit_longer(*args: Any) -> KneserNey:
        fitted["ngram"], fitted["steps"] = fit_kneser_ney(*args), args[2]
        return fitted["ngram"]

    monkeypatch.setattr(mini_opponents, "fit_bigram", fit)
    monkeypatch.setattr(mini_opponents, "fit_kneser_ney", fit_longer)
    size = mini.config.vocab_size
    found = elastic_mini.opponents(tmp_path / "data", training, text, size)
    assert int(fitted["bigram"].counts.sum()) == trainer.tokens == 3 * 512
    assert fitted["steps"] == 3

    # The best order, on scored tokens alone: the second half of every window but the first.
    def nats(order: int) -> float:
        losses = []
        for window in text.windows:
            inputs, targets = [window.inputs], [window.targets]
            of_all = fitted["ngram"].losses(np.array(inputs), np.array(targets), order)[0]
            losses += list(of_all[window.first_scored :])
        assert len(losses) == text.scored_tokens
        return float(np.mean(losses))

    assert found["ngram_nats_per_token"] == pytest.approx(min(map(nats, range(1, 6))))
    assert found["ngram_nats_per_token"] == pytest.approx(nats(found["ngram_order"]))
    assert found["bigram_nats_per_token"] > 0
    assert found.keys() == elastic_mini.NO_OPPONENTS.keys()


def test_the_checkpoint_is_small_enough_to_ship() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 45e6


def test_answers_end_by_themselves(mini: Engine) -> None:
    from elastic_moe import SamplingParams

    prompts = [
        mini.tokenizer.render_chat([{"role": "user", "content": f"What does {name} do?"}])
        for name in ("textwrap.dedent", "os.path.join", "json.loads")
    ]
    answers = mini.generate(prompts, None, SamplingParams(max_tokens=200, temperature=0.7, seed=1))
    assert [a.finish_reason for a in answers].count("stop") >= 2
    assert all(a.text.strip() for a in answers)
