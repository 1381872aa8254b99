"""The README: short, plain, and its output that of the committed sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.sweep import show
from tests.docs.pages import RESULTS, read

README = read("README.md")
SWEEP: dict[str, Any] = json.loads(
    (RESULTS / "sweep-elastic-mini.json").read_text(encoding="utf-8")
)
OPENING = re.compile(r"(?:^|[.!?:]\s+|\|\s*|[-*]\s+|\d\.\s+|#\s+)(What|Where|Of)\b", re.MULTILINE)


def test_the_readme_has_the_two_set_up_commands_first() -> None:
    commands = [c for block in README.blocks if block.kind == "sh" for c in block.commands]
    assert commands[:2] == ["make sweep", "make test"]


def test_it_has_700_to_1000_words() -> None:
    """As `wc -w` counts them, code and tables included."""
    assert 700 <= len(README.text.split()) <= 1000


def test_it_names_the_three_uses_in_its_first_lines() -> None:
    first = " ".join(README.text.splitlines()[:16])
    for use in ("trade-offs offline", "in CI without credentials", "Microbenchmark routing"):
        assert use in first


def test_no_sentence_opens_with_what_where_or_of() -> None:
    assert OPENING.findall(README.prose) == []


@pytest.mark.parametrize(
    "text", ["Fine. Of all words", "What runs", "- Where it is", "| What |", "# Of x", "a:\nWhat b"]
)
def test_such_openings_are_found(text: str) -> None:
    assert OPENING.findall(text)


def test_the_output_it_shows_is_that_of_the_committed_sweep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(SWEEP, Path("sweep-out"))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    (block,) = [block.text for block in README.blocks if block.kind == "text"]
    assert block.splitlines() == printed


def test_it_names_the_source_of_its_figures() -> None:
    assert f"{SWEEP['model']['total_params'] / 1e6:.1f} M-parameter" in README.text
    machine = SWEEP["machine"]
    words = {1: "one core", 2: "two cores", 4: "four cores"}[machine["cores"]]
    assert f"{words} of an `{machine['cpu']}`" in README.flat
    assert SWEEP["settings"]["dtype"] == "bfloat16"
    assert ", bf16." in README.flat
    assert "benchmarks/results/sweep-elastic-mini.json" in README.text
