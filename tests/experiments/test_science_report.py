"""The tables and words of docs/science.md, from handmade results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.science import report
from experiments.science.report import (
    coherence_table,
    coherence_words,
    science_table,
    science_words,
)

TEXTS = ("python-language-reference", "held-out-authors")

# --- the experiment


def gain(mean: float, *errors: float | None, seed_sd: float | None = None) -> dict[str, Any]:
    """Of as many seeds as there are errors of pairs."""
    return {
        "n": len(errors),
        "mean": mean,
        "sd": 0.0123 if len(errors) > 1 else None,
        "seed_sd": seed_sd,
        "in_seed_sds": mean / seed_sd if seed_sd else None,
        "pairs": [
            {"seed": seed, "nats": mean, "standard_error": error}
            for seed, error in enumerate(errors)
        ],
    }


def spread(mean: float, sd: float | None = None) -> dict[str, Any]:
    return {"n": 1 if sd is None else 3, "mean": mean, "sd": sd}


def point(
    axis: str, share: float, elastic_gain: Any, specialist_gain: Any, drawn_gain: Any = None
) -> dict[str, Any]:
    return {
        "axis": axis,
        "share": share,
        "elastic": spread(4.5, 0.01),
        "inelastic": spread(4.75, 0.02),
        "specialist": None,
        "lost": {"elastic": spread(0.125, 0.003), "inelastic": spread(0.5, 0.004)},
        "elastic_gain": elastic_gain,
        "frugal_gain": None,
        "specialist_gain": specialist_gain,
        "drawn_gain": drawn_gain,
        "published": {"what": "depth 16 -> 12 layers", "lost": 0.196} if axis == "depth" else None,
    }


def summary(full: Any, nine: Any, special: Any, compute: Any = None) -> dict[str, Any]:
    points = {"full": point("none", 1.0, full, None), "L9": point("depth", 0.75, nine, special)}
    reported = {
        "kind": "summary",
        "seeds": {"elastic": [0, 1], "inelastic": [0], "depth9": []},
        "tokens": 9_998_336,
        "texts": {name: {"points": points} for name in TEXTS},
        "bars": [],
    }
    return reported if compute is None else reported | {"compute": compute}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_differences_of_one_seed_have_the_error_of_their_pair_and_a_mark() -> None:
    reported = summary(gain(-0.02, 0.004), gain(0.25, 0.011), gain(0.07, 0.006))
    header, _, full, nine = rows(science_table(reported, TEXTS[0]))
    assert header[3:5] == ["elastic is better by", "frugal is better by"]
    assert header[5:7] == ["specialist is better by", "defaults of `train` are better by"]
    # The specialist at full is the inelastic network, of which the column before tells.
    assert full == [
        *("`full`", "4.500 ± 0.010", "4.750 ± 0.020", "-0.020 ± 0.004†", *["–"] * 5),
    ]
    assert nine == [
        *("`L9` (depth 75%)", "4.500 ± 0.010", "4.750 ± 0.020", "+0.250 ± 0.011†", "–"),
        *("+0.070 ± 0.006†", "–", "+0.125 ± 0.003", "+0.196 (depth 16 -> 12 layers)"),
    ]
    marked = [line for line in science_words(reported) if line.startswith("†")]
    assert len(marked) == 1
    assert "standard error over windows of text alone" in marked[0]


def test_differences_of_several_seeds_have_deviations_and_no_mark() -> None:
    many = gain(0.25, 0.011, 0.012, 0.013, seed_sd=0.0204)
    reported = summary(gain(-0.02, 0.1, 0.1, 0.1, seed_sd=0.0144), many, many)
    nine = rows(science_table(reported, TEXTS[1]))[-1]
    # The deviation that two runs of different seeds would show, and not that of pairs, everywhere.
    assert (nine[3], nine[5]) == ("+0.250 (12.3 seed SDs)", "+0.250 ± 0.020")
    assert not any("†" in line for line in science_words(reported))


def test_a_difference_that_is_not_there_or_of_one_window_has_no_mark() -> None:
    reported = summary(None, gain(0.25, None), None)
    full, nine = rows(science_table(reported, TEXTS[0]))[2:]
    assert (full[3:6], nine[3:6]) == (["–", "–", "–"], ["+0.250", "–", "–"])
    assert list(science_words(reported)) == [
        "Trained on 9,998,336 tokens each; seeds: elastic 2, inelastic 1."
    ]
    # Its own pair is in no table: what is judged there is the gain of the elastic network.
    reported["texts"][TEXTS[0]]["points"]["full"]["specialist_gain"] = gain(0.1, 0.2)
    assert not any("†" in line for line in science_words(reported))


def test_the_run_of_one_drawn_network_a_step_stands_beside_the_elastic_one() -> None:
    reported = summary(None, None, None)
    nine = point("depth", 0.75, None, None, gain(-0.125, 0.004))
    reported["texts"][TEXTS[0]]["points"]["L9"] = nine
    assert rows(science_table(reported, TEXTS[0]))[-1][6] == "-0.125 ± 0.004†"
    assert sum(line.startswith("†") for line in science_words(reported)) == 1


def test_the_frugal_recipe_stands_beside_the_elastic_one() -> None:
    reported = summary(None, None, None)
    nine = point("depth", 0.75, None, None) | {"frugal_gain": gain(-0.125, 0.004)}
    reported["texts"][TEXTS[0]]["points"]["L9"] = nine
    assert rows(science_table(reported, TEXTS[0]))[-1][4] == "-0.125 ± 0.004†"
    assert sum(line.startswith("†") for line in science_words(reported)) == 1


def test_the_cost_at_full_is_told_with_its_seed_deviation() -> None:
    words = list(science_words(summary(gain(-0.02, 0.1, 0.1, 0.1, seed_sd=0.0144), None, None)))
    assert words[1:] == [
        f"Elasticity costs the full network +0.020 ± 0.014 nats per token on {name} (mean ± seed "
        f"standard deviation, 3 seeds; the bar judges the mean alone)."
        for name in TEXTS
    ]
    words = list(science_words(summary(gain(-0.02, 0.004), None, None)))
    assert words[1] == (
        f"Elasticity costs the full network +0.020 ± 0.004† nats per token on {TEXTS[0]} (1 seed; "
        f"the bar judges the mean alone)."
    )


def test_the_cost_of_one_network_a_step_is_told_beside_that_of_the_elastic_recipe() -> None:
    reported = summary(gain(-0.02, 0.004), None, None)
    reported["texts"][TEXTS[1]]["points"] = dict(reported["texts"][TEXTS[1]]["points"])
    full = reported["texts"][TEXTS[1]]["points"]["full"] | {"drawn_cost": gain(0.125, 0.007)}
    reported["texts"][TEXTS[1]]["points"]["full"] = full
    assert list(science_words(reported))[3] == (
        f"With the defaults of `train`, one network a step, it costs +0.125 ± 0.007† on "
        f"{TEXTS[1]} (1 seed)."
    )


def test_compute_is_told_where_the_inelastic_one_is_known() -> None:
    compute = {
        "elastic": {"flops": 8.4e14, "of_inelastic": 0.8412},
        "inelastic": {"flops": 1e15, "of_inelastic": 1.0},
        "depth9": {"flops": 7.5e14, "of_inelastic": 0.7513},
    }
    (words,) = list(science_words(summary(None, None, None, compute)))[1:]
    assert words == (
        "At equal tokens, training cost this share of the inelastic network's FLOPs: elastic 0.84, "
        "depth9 0.75."
    )
    alone = {"elastic": {"flops": 8.4e14, "of_inelastic": None}}
    assert len(list(science_words(summary(None, None, None, alone)))) == 1


# --- coherence


def wrote(repeated: float, distinct: float, perplexity: float) -> dict[str, Any]:
    return {
        "repeated_4": repeated,
        "distinct_1": 0.11,
        "distinct_2": distinct,
        "distinct_3": 0.99,
        "perplexity_under_full": perplexity,
    }


def apart(first: float, near: float, far: float) -> dict[str, Any]:
    return {"first_difference": first, "equal": {"16": near, "32": 0.77, "64": far}}


LINE: dict[str, Any] = {
    "case": "elastic-mini",
    "trained_length": 128,
    "temperature": 0.7,
    "position_edges": [0, 64, 128, 192],
    "positions": {
        TEXTS[0]: {
            "full": {
                "lost": [0.0, 0.0, 0.0],
                "within": 4.1,
                "beyond": 4.4,
                "long_context": {"nats": -0.01, "standard_error": 0.002},
            },
            "L9": {
                "lost": [0.111, 0.222, 0.333],
                "within": 4.25,
                "beyond": 4.9,
                "long_context": {"nats": 0.031, "standard_error": 0.004},
            },
        },
        TEXTS[1]: {},
    },
    "writing": {
        "human": {"text": wrote(0.03, 0.81, 84.2)},
        "full": {
            "greedy": wrote(0.61, 0.08, 8.4),
            "sampled": wrote(0.02, 0.82, 35.1),
            "divergence": apart(128.0, 1.0, 1.0),
        },
        "L9": {
            "greedy": wrote(0.73, 0.07, 7.2),
            "sampled": wrote(0.04, 0.79, 40.3),
            "divergence": apart(4.44, 0.24, 0.14),
        },
    },
}


def test_the_table_of_coherence_says_each_number_in_its_column() -> None:
    header, _, human, full, nine = rows(coherence_table(LINE))
    assert header == [
        *("sub-network", "lost at 0-63", "at 128-191", "long context costs"),
        *("greedy: 4-grams repeated", "sampled at 0.7: 4-grams repeated", "perplexity under full"),
        *("distinct-2", "greedy: first difference", "equal of 16 / 64"),
    ]
    assert len(header) == 10
    assert human == ["human text", "–", "–", "–", "–", "3%", "84", "0.81", "–", "–"]
    assert full == [
        *("`full`", "+0.000", "+0.000", "-0.010 ± 0.002", "61%", "2%", "35", "0.82", "–", "–")
    ]
    assert nine == [
        *("`L9`", "+0.111", "+0.500", "+0.031 ± 0.004", "73%", "4%", "40", "0.79", "4.4"),
        "24% / 14%",
    ]


def test_the_words_say_that_a_low_perplexity_is_no_quality() -> None:
    words = coherence_words(LINE)
    assert "A lower perplexity is not better: repeated text is the most predictable." in words
    assert words.endswith(
        "Under the full network, human text has 84, its own sampled text 35, and its own greedy "
        "text, 61% of whose 4-grams are repeated, 8."
    )


# --- the command


def write(path: Path, line: dict[str, Any]) -> None:
    path.write_text(json.dumps(line) + "\n")


def test_one_text_can_be_asked_for_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--results", str(tmp_path), "--text"]
    write(tmp_path / "coherence.jsonl", LINE)
    assert report.main([*command, TEXTS[1]]) == 1
    assert "science.jsonl has no table of 'held-out-authors'; it has none" in (
        capsys.readouterr().err
    )
    write(tmp_path / "science.jsonl", summary(None, None, None))
    assert report.main([*command, TEXTS[1]]) == 0
    out = capsys.readouterr().out
    assert f"On {TEXTS[1]}:" in out
    assert f"On {TEXTS[0]}:" not in out
    assert out.rstrip().endswith(coherence_words(LINE))
    assert report.main([*command, "nonsense"]) == 1
    done = capsys.readouterr()
    assert done.out == ""
    assert f"no table of 'nonsense'; it has {', '.join(TEXTS)}." in done.err
    assert report.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"On {name}:" in out for name in TEXTS)


def test_without_results_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert report.main(["--results", str(tmp_path)]) == 1
