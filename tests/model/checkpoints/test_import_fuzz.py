"""Spoiled checkpoints load, or are refused with an error of ours: no crash, no hang, no flood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_moe import errors
from elastic_moe.model.checkpoints.saving import (
    Item,
    save_checkpoint,
    write_config_json,
    write_tensors,
)
from elastic_moe.model.checkpoints.weights import WEIGHTS, TensorFiles
from elastic_moe.model.families import write_config
from tests.model.checkpoints import import_fuzz
from tests.model.checkpoints.import_fuzz import KINDS
from tests.model.random_models import TINY, tiny_model

CASES = 50  # of each kind
TEXT = (
    "def f(x, y):\n    return x + y * 2 - 1  # a sum\n\nfor i in range(10):\n    print(f(i, i))\n"
)

pytestmark = pytest.mark.slow


@dataclass
class Report:
    """What came of the cases of each kind."""

    outcomes: dict[str, list[str]] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    last_begun: tuple[str, int] | None = None
    exit_status: int = 0
    stderr: str = ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small checkpoint twice: in one file, and in shards."""
    root = tmp_path_factory.mktemp("fuzz")
    tokenizer = byte_tokenizer()
    config = replace(TINY, vocab_size=tokenizer.get_vocab_size(), num_layers=2)
    model = tiny_model(
        dtype=torch.float32, vocab_size=config.vocab_size, num_layers=config.num_layers
    )
    raw = write_config(config, bos_id=0, eos_ids=[0], pad_id=0)
    good, sharded = root / "good", root / "sharded"
    save_checkpoint(good, dict(model.named_parameters()), raw)
    sharded.mkdir()
    files = TensorFiles(good)
    items = []
    for name, entry in files.entries.items():
        with files.mapped(name) as values:
            items.append(Item(name, entry.shape, files.dtype(name), values.copy))
    assert len(write_tensors(sharded, items, max_shard_bytes=files.nbytes // 3)) > 2
    write_config_json(sharded, raw)
    for folder in (good, sharded):
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"chat_template": "{{ messages }}", "tokenizer_class": "x", "eos_token": "<end>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        ids = {"bos_token_id": 0, "eos_token_id": [0], "pad_token_id": 0, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    return root


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    """Every case, run in a process of its own."""
    command = [sys.executable, "-m", import_fuzz.__name__, str(root), str(CASES)]
    repository = Path(__file__).resolve().parents[3]
    paths = [str(repository), str(repository / "kernels"), *sys.path]
    # One thread: others would take address space at moments of their own.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, cwd=repository, capture_output=True, text=True, timeout=300, check=False
    )
    report = Report(exit_status=done.returncode, stderr=done.stderr[-3000:])
    for line in done.stdout.splitlines():
        kind, number, *rest = json.loads(line)
        report.last_begun = (kind, number)
        if rest:
            report.outcomes.setdefault(kind, []).append(rest[0])
            report.slowest_seconds = max(report.slowest_seconds, rest[1])
    return report


def test_no_case_ends_the_process(report: Report) -> None:
    assert report.exit_status == 0, (
        f"{report.last_begun} ended the process with {report.exit_status} "
        f"(-14: it took more than {import_fuzz.SECONDS} s):\n{report.stderr}"
    )


def test_there_are_many_cases_and_they_are_fast(report: Report) -> None:
    assert sum(map(len, report.outcomes.values())) == CASES * len(KINDS) >= 500
    assert report.slowest_seconds < import_fuzz.SECONDS


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_checkpoint_runs_or_is_refused(kind: str, report: Report) -> None:
    outcomes = report.outcomes.get(kind, [])
    assert len(outcomes) == CASES
    allowed = {"ran"} | {
        name
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.ElasticMoEError)
    }
    wrong = {(kind, n): text for n, text in enumerate(outcomes) if text not in allowed}
    assert not wrong


# What is spoiled there may leave a model that runs, as a rule or always.
HARMLESS = {"huge-weights", "tokenizer-config-tree", "tokenizer-config-bytes"}


@pytest.mark.parametrize("kind", KINDS)
def test_cases_spoil_something(kind: str, report: Report, root: Path) -> None:
    counts = Counter(report.outcomes[kind])
    refused = CASES - counts["ran"]
    assert refused >= (0 if kind in HARMLESS else CASES // 10), counts
    files = import_fuzz.read(root / ("sharded" if kind.startswith("index") else "good"))
    changes = [import_fuzz.spoil(kind, number, files) for number in range(CASES)]
    assert changes == [import_fuzz.spoil(kind, number, files) for number in range(CASES)]
    different = {tuple(sorted(change.items())) for change in changes}
    assert len(different) > CASES // 2
    assert WEIGHTS in files or kind.startswith("index")
