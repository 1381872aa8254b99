"""What the runs say together: means over seeds, differences, bars. Nothing here measures anything.

A seed decides first weights, order of text and draws, so runs of one seed in two families are
pairs. `seed_sd` is the standard deviation that a difference between two runs of different seeds
has: sqrt(sd_a^2 + sd_b^2), each over seeds with n - 1. It is larger than that of the pairs, and a
difference must exceed it twice. With three seeds it is itself uncertain by half of its value.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.science.runs import FAMILIES, SPECIALISTS
from elastic_moe.lab.quality import Quality, paired_difference
from elastic_moe.lab.text import EvaluationSet

# Point -> which axis it reduces, and to what share of the full value.
POINTS = {
    "full": ("none", 1.0),
    "k2": ("top_k", 0.5),
    "k1": ("top_k", 0.25),
    "L9": ("depth", 0.75),
    "L6": ("depth", 0.5),
    "p8": ("pool", 0.5),
    "w4": ("width", 0.5),
}
BETTER_AT = ("L9", "L6", "p8", "w4")  # where elastic has to beat inelastic; k as found
SEEDS_NEEDED, SEED_SDS_NEEDED, COST_ALLOWED = 3, 2.0, 0.05

# ERNIE 5.0, arXiv:2602.04705: held-out loss of its ablation, 64 experts and k = 8, in nats.
PUBLISHED = {
    "k2": {"what": "k 8 -> 4", "lost": 0.002},
    "k1": {"what": "k 8 -> 2", "lost": 0.034},
    "L9": {"what": "depth 16 -> 12 layers", "lost": 0.196},
    "p8": {"what": "pool 64 -> 32 experts", "lost": 0.254},
}
PUBLISHED_COST_AT_FULL = (-0.004, 0.007, 0.024)

Seeds = Mapping[int, Quality]  # of one family at one point on one text, by seed
Measured = Mapping[str, Mapping[str, Quality]]  # of one run: text -> point -> quality


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Number, mean and standard deviation (n - 1) of what the seeds gave; None of none."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": _short(statistics.fmean(values)), "sd": _short(sd)}


def compare(a: Seeds, b: Seeds, text: EvaluationSet) -> dict[str, Any] | None:
    """Loss of a minus loss of b over the seeds that both have; None where they share none.

    `mean` and `sd` are of the differences of pairs, `seed_sd` as this module says. Each pair has
    the standard error of its own difference, over windows of text: it says how exactly these two
    networks were measured, nothing of other seeds.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    pairs, differences = [], []
    for seed in shared:
        nats, error = paired_difference(a[seed], b[seed], text)
        differences.append(nats)
        pairs.append({"seed": seed, "nats": _short(nats), "standard_error": _short(error)})
    mean = statistics.fmean(differences)
    sd = seed_sd = None
    if len(shared) > 1:
        sd = statistics.stdev(differences)
        seed_sd = math.hypot(
            *(statistics.stdev(one[seed].nats_per_token for seed in shared) for one in (a, b))
        )
    return {
        "n": len(shared),
        "mean": _short(mean),
        "sd": _short(sd),
        "seed_sd": _short(seed_sd),
        "in_seed_sds": _short(mean / seed_sd) if seed_sd else None,
        "pairs": pairs,
    }


def point_summary(
    point: str, runs: Mapping[tuple[str, int], Mapping[str, Quality]], text: EvaluationSet
) -> dict[str, Any]:
    """Everything about one point on one text.

    Args:
        runs: (family, seed) -> point -> quality on this text.
    """

    def of(family: str, at: str = point) -> dict[int, Quality]:
        return {seed: found[at] for (one, seed), found in runs.items() if one == family}

    def nats(qualities: Seeds) -> dict[str, Any] | None:
        return spread([quality.nats_per_token for quality in qualities.values()])

    def lost(family: str) -> dict[str, Any] | None:
        full = of(family, "full")
        return spread(
            [q.nats_per_token - full[seed].nats_per_token for seed, q in of(family).items()]
        )

    elastic, inelastic = of("elastic"), of("inelastic")
    named = [family for family, own in SPECIALISTS.items() if own == point]
    family = "inelastic" if point == "full" else named[0] if named else None
    special = of(family) if family else {}
    axis, share = POINTS[point]
    told = nats(special)
    return {
        "axis": axis,
        "share": share,
        "elastic": nats(elastic),
        "inelastic": nats(inelastic),
        "specialist": None if told is None else {"family": family, **told},
        "lost": {"elastic": lost("elastic"), "inelastic": lost("inelastic")},
        "elastic_gain": compare(inelastic, elastic, text),
        "specialist_gain": compare(elastic, special, text),
        "published": PUBLISHED.get(point),
    }


def summarise(
    runs: Mapping[tuple[str, int], Measured], texts: Mapping[str, EvaluationSet]
) -> dict[str, Any]:
    """The summary of all finished runs, on every text, with its bars.

    Args:
        runs: (family, seed) -> text -> point -> quality; a specialist has its own point alone.
    """
    told: dict[str, Any] = {}
    for name, text in texts.items():
        here = {run: measured[name] for run, measured in runs.items()}
        points = {point: point_summary(point, here, text) for point in POINTS}
        told[name] = {"points": points}
    return {
        "seeds": {
            family: sorted(seed for one, seed in runs if one == family) for family in FAMILIES
        },
        "texts": told,
        "published_cost_at_full": list(PUBLISHED_COST_AT_FULL),
        "bars": judge(told),
    }


def judge(texts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the bars against a summary's `texts`. Fewer than three seeds of both decide nothing."""
    bars: list[dict[str, Any]] = []

    def bar(text: str, what: str, needed: str, gain: Any, value: float | None, ok: bool) -> None:
        seeds = 0 if gain is None else gain["n"]
        met = ok if seeds >= SEEDS_NEEDED else None
        bars.append(
            {"text": text, "what": what, "value": value, "needed": needed, "seeds": seeds}
            | {"met": met}
        )

    for name, text in texts.items():
        for point in BETTER_AT:
            gain = text["points"][point]["elastic_gain"]
            sds = None if gain is None else gain["in_seed_sds"]
            what = f"{point}: inelastic minus elastic, in seed standard deviations"
            better = sds is not None and sds > SEED_SDS_NEEDED
            bar(name, what, f"> {SEED_SDS_NEEDED:g}", gain, sds, better)
        gain = text["points"]["full"]["elastic_gain"]
        cost = None if gain is None else -gain["mean"]
        what = "full: elastic minus inelastic, nats"
        cheap = cost is not None and cost <= COST_ALLOWED
        bar(name, what, f"<= {COST_ALLOWED:g}", gain, cost, cheap)
    return bars


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
