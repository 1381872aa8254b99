"""Means over seeds, differences and bars of the experiment, computed here by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from experiments.science.report import science_table, science_words
from experiments.science.summary import (
    POINTS,
    Losses,
    compare,
    judge,
    losses_of,
    paired_difference,
    spread,
    summarise,
)

NAMES = ("python-language-reference", "held-out-authors")
COUNTS = (16, 8, 8, 8)
FLOPS = {
    "elastic": 8e14,
    "frugal": 9e14,
    "drawn": 7e14,
    "inelastic": 1e15,
    "depth9": 7.5e14,
    "pool8": 1e15,
}


def losses(nats: float, noise: int = 0) -> Losses:
    """Losses of this mean, scattered over windows by a seed of noise."""
    scatter = np.random.default_rng(noise).normal(size=len(COUNTS))
    scatter -= np.average(scatter, weights=COUNTS)
    return Losses(nats, tuple((nats + scatter).tolist()), COUNTS)


def run_line(family: str, seed: int, nats: dict[str, float]) -> dict[str, Any]:
    """The line of one run, the same on both texts, without what the summary does not read."""
    points = {
        point: {"nats_per_token": value, "window_nats": list(losses(value, seed).windows)}
        for point, value in nats.items()
    }
    text = {"window_tokens": list(COUNTS), "points": points}
    training = {"flops": FLOPS[family] * (1 + seed / 100)}
    return {
        "family": family,
        "seed": seed,
        "training": training,
        "texts": dict.fromkeys(NAMES, text),
    }


def runs(nats: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Family -> for each seed the nats of its points."""
    return [
        run_line(family, seed, points)
        for family, seeds in nats.items()
        for seed, points in enumerate(seeds)
    ]


def everywhere(full: float, lost: dict[str, float]) -> dict[str, float]:
    return {point: full + lost.get(point, 0.0) for point in POINTS}


ELASTIC = {"k2": 0.05, "k1": 0.2, "L9": 0.1, "L6": 0.3, "p8": 0.2, "w4": 0.1}
INELASTIC = {"k2": 0.04, "k1": 0.3, "L9": 0.5, "L6": 2.0, "p8": 0.9, "w4": 0.6}
THREE = runs(
    {
        "elastic": [everywhere(4.52 + e, ELASTIC) for e in (0.0, 0.01, 0.02)],
        "inelastic": [everywhere(4.50 + e, INELASTIC) for e in (0.0, 0.02, 0.01)],
        "depth9": [{"L9": 4.55}],
    }
)


def summary(found: Sequence[dict[str, Any]] = tuple(THREE)) -> dict[str, Any]:
    return summarise(found)


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == {"n": 3, "mean": 2.33333, "sd": 1.52753}
    assert spread([1.5]) == {"n": 1, "mean": 1.5, "sd": None}
    assert spread([]) is None


def test_a_comparison_pairs_the_seeds_that_both_have() -> None:
    a = {0: losses(5.0, 1), 1: losses(5.2, 2), 2: losses(5.1, 3), 7: losses(9.0)}
    b = {0: losses(4.6, 4), 1: losses(4.7, 5), 2: losses(4.5, 6)}
    found = compare(a, b)
    assert found is not None
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(0.5, abs=1e-4)
    assert found["sd"] == pytest.approx(statistics.stdev([0.4, 0.5, 0.6]), abs=1e-4)
    seed_sd = math.sqrt(statistics.variance([5.0, 5.2, 5.1]) + statistics.variance([4.6, 4.7, 4.5]))
    assert found["seed_sd"] == pytest.approx(seed_sd, abs=1e-4)
    assert found["in_seed_sds"] == pytest.approx(0.5 / seed_sd, abs=1e-2)
    mean, error = paired_difference(a[1], b[1])
    assert found["pairs"][1] == {
        "seed": 1,
        "nats": pytest.approx(mean, abs=1e-5),
        "standard_error": pytest.approx(error, abs=1e-5),
    }


def test_a_pair_differs_by_windows_that_count_by_their_tokens() -> None:
    a = Losses(0.0, (5.0, 4.0, 6.0), (4, 2, 2))
    b = Losses(0.0, (4.0, 4.5, 4.5), (4, 2, 2))
    mean = (4 * 1.0 + 2 * -0.5 + 2 * 1.5) / 8
    squares = [(c * (d - mean)) ** 2 for c, d in ((4, 1.0), (2, -0.5), (2, 1.5))]
    error = math.sqrt(3 / 2 * sum(squares)) / 8
    assert paired_difference(a, b) == pytest.approx((mean, error))
    one = Losses(5.0, (5.0,), (4,))
    assert paired_difference(one, one) == (0.0, None)


def test_a_point_that_was_not_measured_has_no_losses() -> None:
    line = run_line("depth9", 0, {"L9": 4.5})
    assert losses_of(line, NAMES[0], "full") is None
    found = losses_of(line, NAMES[1], "L9")
    assert found is not None
    assert (found.nats_per_token, found.counts) == (4.5, COUNTS)


def test_compute_is_the_mean_of_each_family_over_the_inelastic_one() -> None:
    found = summary()["compute"]
    assert list(found) == ["elastic", "inelastic", "depth9"]
    assert found["elastic"] == {"flops": pytest.approx(8.08e14), "of_inelastic": 0.8}
    assert found["depth9"]["of_inelastic"] == pytest.approx(0.75 / 1.01, abs=1e-4)
    alone = [line for line in THREE if line["family"] == "elastic"]
    assert summary(alone)["compute"]["elastic"]["of_inelastic"] is None


def test_the_order_of_the_lines_changes_nothing() -> None:
    assert summary(THREE[::-1]) == summary()


def test_one_pair_has_no_deviation_and_no_pair_no_comparison() -> None:
    found = compare({0: losses(5.0)}, {0: losses(4.5), 1: losses(4.6)})
    assert found is not None
    assert (found["n"], found["mean"]) == (1, pytest.approx(0.5, abs=1e-4))
    assert (found["sd"], found["seed_sd"], found["in_seed_sds"]) == (None, None, None)
    assert compare({0: losses(5.0)}, {1: losses(4.5)}) is None


def test_a_point_says_what_both_lose_and_how_the_specialist_does() -> None:
    points = summary()["texts"][NAMES[0]]["points"]
    nine = points["L9"]
    assert (nine["axis"], nine["share"]) == ("depth", 0.75)
    assert nine["elastic"] == {"n": 3, "mean": pytest.approx(4.63, abs=1e-4), "sd": 0.01}
    assert nine["lost"]["elastic"]["mean"] == pytest.approx(0.1, abs=1e-4)
    assert nine["lost"]["inelastic"]["mean"] == pytest.approx(0.5, abs=1e-4)
    assert nine["elastic_gain"]["mean"] == pytest.approx(0.38, abs=1e-4)
    # Seed 0 alone has a specialist, so the elastic network of seed 0 stands beside it.
    assert nine["specialist"] == {"family": "depth9", "n": 1, "mean": 4.55, "sd": None}
    assert nine["specialist_gain"]["mean"] == pytest.approx(4.62 - 4.55, abs=1e-4)
    assert points["full"]["specialist"]["family"] == "inelastic"
    assert (points["L6"]["specialist"], points["L6"]["specialist_gain"]) == (None, None)
    assert nine["published"] == {"what": "depth 16 -> 12 layers", "lost": 0.196}
    assert points["w4"]["published"] is None


def test_a_run_of_one_drawn_network_a_step_is_paired_with_the_elastic_one_of_its_seed() -> None:
    drawn = runs({"drawn": [everywhere(4.70, ELASTIC)]})
    nine = summary([*THREE, *drawn])["texts"][NAMES[0]]["points"]["L9"]
    assert (nine["drawn_gain"]["n"], nine["elastic"]["n"]) == (1, 3)
    assert nine["drawn_gain"]["mean"] == pytest.approx(4.52 - 4.70, abs=1e-4)


def test_what_one_network_a_step_costs_is_against_the_inelastic_network_of_its_seed() -> None:
    drawn = runs({"drawn": [everywhere(4.70, ELASTIC)]})
    full = summary([*THREE, *drawn])["texts"][NAMES[0]]["points"]["full"]
    (line,) = [one for one in THREE if (one["family"], one["seed"]) == ("inelastic", 0)]
    inelastic = losses_of(line, NAMES[0], "full")
    assert inelastic is not None
    assert full["drawn_cost"]["n"] == 1
    expected = pytest.approx(4.70 - inelastic.nats_per_token, abs=1e-4)
    assert full["drawn_cost"]["mean"] == expected
    assert full["lost"]["drawn"] == {"n": 1, "mean": 0.0, "sd": None}


def test_bars_are_met_by_three_seeds_far_apart() -> None:
    found = summary()
    assert len(found["bars"]) == 2 * (4 + 1)
    assert {bar["text"] for bar in found["bars"]} == set(NAMES)
    assert [bar["what"][:2] for bar in found["bars"][:5]] == ["L9", "L6", "p8", "w4", "fu"]
    assert all(bar["met"] is True and bar["seeds"] == 3 for bar in found["bars"])


def test_every_split_that_was_trained_is_judged_by_its_own_runs() -> None:
    worse = runs({"frugal": [everywhere(4.58 + e, INELASTIC) for e in (0.0, 0.01, 0.02)]})
    found = summary([*THREE, *worse])
    reported = {(bar["text"], bar["what"].partition(",")[0]): bar["met"] for bar in found["bars"]}
    assert len(reported) == 2 * 2 * (4 + 1)
    for (_, what), met in reported.items():
        assert met is ("frugal" not in what)
    nine = found["texts"][NAMES[0]]["points"]["L9"]
    assert nine["frugal"]["mean"] == pytest.approx(4.59 + 0.5, abs=1e-4)
    assert nine["frugal_gain"]["mean"] == pytest.approx(4.51 - 4.59, abs=1e-4)
    assert nine["lost"]["frugal"]["mean"] == pytest.approx(0.5, abs=1e-4)
    full = [word for word in science_words(found | {"tokens": 1}) if word.startswith("Frugal el")]
    assert len(full) == 2
    assert "Frugal elasticity costs the full network +0.080 ± 0.014 nats per token" in full[0]


def bars(gains: dict[str, dict[str, Any] | None]) -> dict[str, bool | None]:
    usual = {"n": 3, "mean": 0.0, "in_seed_sds": 9.0}
    points = {p: {"elastic_gain": gains.get(p, usual), "frugal_gain": None} for p in POINTS}
    return {bar["what"].partition(":")[0]: bar["met"] for bar in judge({"x": {"points": points}})}


def test_each_bar_is_missed_by_little() -> None:
    def gain(n: int, mean: float, sds: float | None) -> dict[str, Any]:
        return {"n": n, "mean": mean, "in_seed_sds": sds}

    assert all(bars({}).values())
    assert bars({"L6": gain(3, 0.1, 2.0)})["L6"] is False
    assert bars({"L6": gain(3, 0.1, 2.01)})["L6"] is True
    assert bars({"p8": gain(3, -0.1, -5.0)})["p8"] is False
    assert bars({"full": gain(3, -0.05, None)})["full"] is True
    assert bars({"full": gain(3, -0.0501, None)})["full"] is False
    assert "k2" not in bars({})


def test_fewer_than_three_seeds_decide_nothing() -> None:
    assert bars({"w4": {"n": 2, "mean": 5.0, "in_seed_sds": 99.0}})["w4"] is None
    assert bars({"w4": None})["w4"] is None
    two = [line for line in THREE if (line["family"], line["seed"]) != ("inelastic", 2)]
    assert [bar["met"] for bar in summary(two)["bars"]] == [None] * 10
    assert summary(two)["seeds"] == {
        "elastic": [0, 1, 2],
        "inelastic": [0, 1],
        "frugal": [],
        "drawn": [],
        "depth9": [0],
        "pool8": [],
    }


def test_without_its_control_a_network_stands_alone() -> None:
    alone = [line for line in THREE if line["family"] == "elastic"]
    for p in summary(alone)["texts"][NAMES[1]]["points"].values():
        assert p["elastic"]["n"] == 3
        assert p["inelastic"] is p["lost"]["inelastic"] is p["elastic_gain"] is None
        assert p["frugal"] is p["lost"]["frugal"] is p["frugal_gain"] is None
        assert p["specialist"] is p["specialist_gain"] is p["drawn_gain"] is None
        assert p["drawn_cost"] is p["lost"]["drawn"] is None


def test_the_tables_show_the_summary() -> None:
    reported = summary() | {"tokens": 9_998_336}
    rows = science_table(reported, NAMES[0]).splitlines()
    assert len(rows) == 2 + len(POINTS)
    assert rows[2].startswith("| `full` | 4.530 ± 0.010 | 4.510 ± 0.010 | -0.020 (-1.4 seed SDs) |")
    nine = next(row for row in rows if "`L9`" in row)
    assert nine == (
        "| `L9` (depth 75%) | 4.630 ± 0.010 | 5.010 ± 0.010 | +0.380 (26.9 seed SDs) | – | "
        "+0.070 ± 0.000† | – | +0.100 ± 0.000 | +0.196 (depth 16 -> 12 layers) |"
    )
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    words = list(science_words(reported))
    assert words[0] == (
        "Trained on 9,998,336 tokens each; seeds: elastic 3, inelastic 3, depth9 1."
    )
    assert "costs the full network +0.020 ± 0.014 nats per token" in words[1]
    assert len(words) == 5  # no bar is missed


def test_the_words_name_what_is_missed_or_undecided() -> None:
    worse = [run_line("elastic", n, everywhere(9.0 + n / 100, {})) for n in range(3)]
    others = [line for line in THREE if line["family"] != "elastic"]
    reported = summary([*others, *worse]) | {"tokens": 1}
    missed = [line for line in science_words(reported) if line.startswith("Missed")]
    assert len(missed) == 10
    two = [line for line in THREE if line["seed"] < 2]
    reported = summary(two) | {"tokens": 1}
    undecided = [
        line for line in science_words(reported) if line.startswith("Undecided with 2 seeds")
    ]
    assert len(undecided) == 10
