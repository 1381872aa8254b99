"""The engine's bars turn red when they should."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.peers.bars import ENGINE_BARS, LLAMA, MIXES, REPEATED, Round, judge, mixing

B = 30e9
TOUCHED = 1.5e9


def good_round(case: str) -> Round:
    """A round in which all is met."""
    seconds = TOUCHED / B / 0.97
    other = {"one seconds": seconds / 4, "outside seconds": 200e-6}
    for name in MIXES.get(case.removeprefix("mix "), ()):
        other |= {f"{name} seconds": 0.5 * seconds, f"{name} bytes": 0.5 * TOUCHED}
    for name in REPEATED:
        other |= {f"{name} cold": 0.4, f"{name} warm": 0.05}
    return Round({"ours": seconds, LLAMA: 1.5 * seconds}, TOUCHED, 1e9, B, 4e11, other)


def verdicts(case: str, changed: Round) -> list[bool | None]:
    return [judge(bar, [changed] * 9).met for bar in ENGINE_BARS[case]]


@pytest.mark.parametrize("case", [case for case in ENGINE_BARS if case != "load"])
def test_a_good_round_meets_them(case: str) -> None:
    assert set(verdicts(case, good_round(case))) == {True}


def test_a_batch_that_takes_twice_its_time_is_red() -> None:
    good = good_round("engine16")
    slow = dataclasses.replace(good, seconds={**good.seconds, "ours": 2 * good.seconds["ours"]})
    assert verdicts("engine16", slow) == [False, False, True]
    late = dataclasses.replace(good, other={**good.other, "outside seconds": 401e-6})
    assert verdicts("engine16", late) == [True, True, False]


@pytest.mark.parametrize("axis", MIXES)
def test_a_mixed_batch_may_cost_a_tenth_more_than_its_bytes(axis: str) -> None:
    good = good_round(f"mix {axis}")
    assert mixing(MIXES[axis])(good) == pytest.approx(1)
    for times, met in ((1.09, True), (1.11, False)):
        seconds = {"ours": times * good.seconds["ours"]}
        assert verdicts(f"mix {axis}", dataclasses.replace(good, seconds=seconds)) == [met]
    # A batch that reads more than it needs is not excused by its bytes: they are counted.
    more = dataclasses.replace(good, touched_bytes=TOUCHED / 1.2)
    assert verdicts(f"mix {axis}", more) == [False]


def test_a_cached_prefix_must_make_the_first_token_five_times_as_early() -> None:
    good = good_round("prefix")
    late = {**good.other, f"{REPEATED[1]} warm": 0.081}
    assert verdicts("prefix", dataclasses.replace(good, other=late)) == [True, False]
