"""The bundled super-network is trained, elastic on every axis, and what its card says it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elastic_moe.engine import Engine
from elastic_moe.lab.record import describe_commit
from elastic_moe.lab.text import evaluation_set, language_reference
from elastic_moe.model.folder import BUNDLED
from elastic_moe.train.bigram import Bigram, fit_bigram
from elastic_moe.train.data import Mixture, open_stream, prepare
from elastic_moe.train.loop import Trainer
from tests.train.small import CONFIG, PLAN, library

ROOT = Path(__file__).resolve().parents[1]
FOLDER = BUNDLED / "elastic-mini"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> dict:
    """The committed measurement of these weights on the language reference."""
    path = ROOT / "benchmarks" / "results" / "elastic-mini.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [r for r in lines if r["corpus"]["name"] == "python-language-reference"]
    return found[-1]


def test_the_committed_measurement_is_of_these_weights_and_meets_every_bar(
    mini: Engine, committed: dict
) -> None:
    assert committed["weights_sha256"] == mini.weights_sha256
    assert committed["corpus"]["scored_tokens"] >= 20_000
    assert [bar["what"] for bar in committed["bars"] if not bar["met"]] == []
    assert len(committed["bars"]) == 1 + 8 + 5 + 3


def test_quality_falls_along_every_axis_and_stays_within_its_limits(
    mini: Engine, committed: dict
) -> None:
    module = benchmark("elastic_mini")
    text = evaluation_set(language_reference(), mini.tokenizer, 3_072)
    bigram = committed["bigram_nats_per_token"]
    bars = module.judge(module.measure(mini, text), text, bigram)
    assert [bar for bar in bars if not bar["met"]] == []


def test_the_model_card_is_up_to_date() -> None:
    assert (FOLDER / "README.md").read_text() == benchmark("model_card").card()


def test_a_card_without_a_bigram_says_nothing_of_one(
    committed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark("model_card")
    assert "bigram" in module.card()
    result = {**committed, "bigram_nats_per_token": None}
    monkeypatch.setattr(module, "newest_results", lambda _sha256: [result])
    assert "bigram" not in module.card()


def test_benchmarks_name_the_commit_of_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert describe_commit() == (head or None)


def test_the_bigram_reads_the_steps_that_were_done_not_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Engine
) -> None:
    module = benchmark("elastic_mini")
    prepare(tmp_path / "data", library(tmp_path), [], Mixture(), vocab_size=300)
    config = dataclasses.replace(CONFIG, vocab_size=300)
    trainer = Trainer(config, PLAN, open_stream(tmp_path / "data", PLAN.seed))
    for _ in range(3):
        trainer.train_step()
    trainer.save(tmp_path / "state.safetensors")
    text = evaluation_set(language_reference(), mini.tokenizer, 512)
    fitted = []

    def fit(*args: Any) -> Bigram:
        fitted.append(fit_bigram(*args))
        return fitted[0]

    monkeypatch.setattr(module, "fit_bigram", fit)
    module.bigram_nats(tmp_path, text, mini.config.vocab_size)
    assert int(fitted[0].counts.sum()) == trainer.tokens == 3 * 512


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
