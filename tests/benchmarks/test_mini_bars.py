"""The bars of elastic-mini turn red when they should; nothing is measured here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.elastic_mini import FIRST, judge, read_lines
from benchmarks.science.measuring import REFERENCE

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


def test_another_text_is_no_comparison_with_the_first_version(first: Line, later: Line) -> None:
    later["corpus"]["sha256"] = "1" * 64
    bar = next(b for b in judge(later, first) if "first version" in b["what"])
    assert (bar["value"], bar["met"]) == (None, None)
