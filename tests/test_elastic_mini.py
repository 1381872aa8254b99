"""The bundled super-network is trained, elastic on every axis, and what its card says it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from elastic_moe.engine import Engine
from elastic_moe.lab.text import evaluation_set, language_reference
from elastic_moe.model.folder import BUNDLED

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
    text = evaluation_set(language_reference(), mini.tokenizer, 4_608)
    bigram = committed["bigram_nats_per_token"]
    bars = module.judge(module.measure(mini, text), text, bigram)
    assert [bar for bar in bars if not bar["met"]] == []


def test_the_model_card_is_up_to_date() -> None:
    assert (FOLDER / "README.md").read_text() == benchmark("model_card").card()


def test_the_checkpoint_is_small_enough_to_ship() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 45e6


def test_answers_end_by_themselves(mini: Engine) -> None:
    from elastic_moe import SamplingParams

    prompts = [
        mini.tokenizer.render_chat([{"role": "user", "content": f"What does {name} do?"}])
        for name in ("textwrap.dedent", "os.path.join", "json.loads", "random.shuffle")
    ]
    answers = mini.generate(prompts, None, SamplingParams(max_tokens=300, temperature=0.7, seed=1))
    assert [a.finish_reason for a in answers].count("stop") >= 3
    assert all(a.text.strip() for a in answers)
