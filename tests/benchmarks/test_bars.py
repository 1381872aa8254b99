"""The bars of the comparison with peers turn red when they should; nothing is measured here."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.peers.bars import (
    ALL_BARS,
    BARS,
    LLAMA,
    REFERENCE,
    TRANSFORMERS_SMALL,
    ZENTORCH,
    Bar,
    Round,
    judge,
    saving,
)
from benchmarks.peers.run import STAGES, ceiling

B, M = 30e9, 400e9


def good_round(case: str) -> Round:
    """A round in which every goal of a case is met with room to spare, but not twice as much."""
    touched, flops = 300e6, 0.3e9
    if case.endswith("prefill512"):
        touched, flops = 300e6, 140e9
        seconds = flops / M / 0.9
    elif case.endswith("layer512"):
        touched, flops = 200e6, 13e9
        seconds = flops / M / 0.9
    elif case == "mini":
        seconds = touched / B / 0.9
    else:
        seconds = touched / B / 0.97
    others = dict.fromkeys(TRANSFORMERS_SMALL, (20 if case == "mini" else 1.8) * seconds)
    others |= {LLAMA: (2.6 if "prefill" in case else 1.45) * seconds, ZENTORCH: 1.2 * seconds}
    if case == "mini":
        others[REFERENCE] = 25 * seconds
    other = {"outside seconds": 60e-6, "full seconds": seconds, "full bytes": touched}
    for name in ("L4", "k4", "w4", "default", "production", "deterministic"):
        other |= {f"{name} seconds": 0.61 * seconds, f"{name} bytes": 0.6 * touched}
    return Round({"ours": seconds, **others}, touched, flops, B, M, other)


def slower(r: Round, times: float) -> Round:
    """Our side takes so many times as long, sub-networks as much longer as the full network."""
    seconds = {**r.seconds, "ours": times * r.seconds["ours"]}
    other = {
        name: value + (times - 1) * r.seconds["ours"] if name.endswith("seconds") else value
        for name, value in r.other.items()
    }
    return dataclasses.replace(r, seconds=seconds, other=other)


@pytest.mark.parametrize("case", BARS)
def test_bars_and_goals_are_met_by_a_good_round(case: str) -> None:
    verdicts = [judge(bar, [good_round(case)] * 9) for bar in BARS[case]]
    assert verdicts
    for verdict in verdicts:
        assert verdict.met is True, str(verdict)
        assert verdict.goal_met in (True, None), str(verdict)


@pytest.mark.parametrize("case", BARS)
def test_a_kernel_that_takes_twice_its_time_turns_a_bar_red(case: str) -> None:
    rounds = [slower(good_round(case), 2.0)] * 9
    assert any(judge(bar, rounds).met is False for bar in BARS[case])


def test_the_median_counts_and_extremes_are_told() -> None:
    bar = Bar("x", lambda r: r.touched_bytes, 2.0, 3.0)
    rounds = [dataclasses.replace(good_round("decode1"), touched_bytes=n) for n in (1.0, 2.5, 9.0)]
    verdict = judge(bar, rounds)
    assert (verdict.median, verdict.least, verdict.most) == (2.5, 1.0, 9.0)
    assert (verdict.met, verdict.goal_met) == (True, False)
    assert "2.500 (1.000 to 9.000 in 3 rounds), bar >= 2, goal 3 MISSED" in str(verdict)


def test_a_goal_of_every_round_is_missed_by_one() -> None:
    (bar,) = [bar for bar in BARS["decode1"] if bar.goal_in_every_round]
    fast = good_round("decode1")
    slow = dataclasses.replace(fast, seconds={**fast.seconds, LLAMA: 0.99 * fast.seconds["ours"]})
    assert judge(bar, [fast] * 9).goal_met is True
    assert judge(bar, [fast] * 8 + [slow]).goal_met is False
    assert judge(bar, [fast] * 8 + [slow]).met is True


def test_of_two_alternatives_one_is_enough() -> None:
    """decode1: at least min(llama.cpp, 0.95 B)."""
    (bar,) = [bar for bar in BARS["decode1"] if bar.name.startswith("over min")]
    fast = good_round("decode1")  # 0.97 B
    behind_llama = dataclasses.replace(
        fast, seconds={**fast.seconds, LLAMA: 0.9 * fast.seconds["ours"]}
    )
    assert judge(bar, [behind_llama] * 9).met is True
    both = dataclasses.replace(behind_llama, read_bytes_per_second=1.1 * B)
    assert judge(bar, [both] * 9).met is False


def test_an_upper_bar_is_missed_from_above() -> None:
    (bar,) = [bar for bar in BARS["mini"] if bar.at_most and bar.bar == 80]
    good = good_round("mini")
    bad = dataclasses.replace(good, other={**good.other, "outside seconds": 81e-6})
    assert judge(bar, [good]).met is True
    assert judge(bar, [bad]).met is False


@pytest.mark.parametrize("name", [LLAMA, ZENTORCH, *TRANSFORMERS_SMALL])
def test_without_a_contestant_nothing_is_claimed(name: str) -> None:
    undecided = 0
    for case, bars in BARS.items():
        full = good_round(case)
        left = {who: s for who, s in full.seconds.items() if who != name}
        rounds = [dataclasses.replace(full, seconds=left)] * 9
        for bar in bars:
            verdict = judge(bar, rounds)
            assert verdict.met in (True, None)
            undecided += verdict.met is None
            assert ("not measured" in str(verdict)) == (verdict.met is None)
    assert undecided


@pytest.mark.parametrize(("seconds", "expected"), [(0.6, 1.0), (0.64, 0.9), (0.8, 0.5), (1.0, 0.0)])
def test_saving_is_time_saved_over_bytes_saved(seconds: float, expected: float) -> None:
    other = {"full seconds": 1.0, "full bytes": 10.0, "k4 seconds": seconds, "k4 bytes": 6.0}
    r = dataclasses.replace(good_round("saving"), other=other)
    assert saving("k4")(r) == pytest.approx(expected)


def test_every_case_has_bars_and_every_bar_a_case() -> None:
    assert {case for _, cases in STAGES.values() for case in cases} == set(ALL_BARS)
    assert [case for case, bars in ALL_BARS.items() if not bars] == ["load"]


def test_the_ceiling_is_the_nearer_limit() -> None:
    assert "400 GFLOP/s), weights cold, 1462.9 tokens/s" in ceiling(
        "prefill512", dataclasses.replace(good_round("prefill512"), flops=140e9)
    )
    assert "ceiling 10.000 ms (300.0 MB at B = 30.0 GB/s" in ceiling(
        "decode1", good_round("decode1")
    )
