"""What the runs say together: means over seeds, differences, bars. Nothing here measures anything.

It is made of the lines that `evaluate` writes, one per run, so that runs of several days and
machines come together without their checkpoints.

A seed decides first weights, order of text and draws, so runs of one seed in two families are
pairs. `seed_sd` is the standard deviation that a difference between two runs of different seeds
has: sqrt(sd_a^2 + sd_b^2), each over seeds with n - 1. It is larger than that of the pairs, and a
difference must exceed it twice. With three seeds it is itself uncertain by half of its value.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_moe.lab.sweeps.quality import weighted_mean
from experiments.science.runs import FAMILIES, SPECIALISTS, SPLITS

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
BETTER_AT = ("L9", "L6", "p8", "w4")  # where a split has to beat inelastic; k as found
SEEDS_NEEDED, SEED_SDS_NEEDED, COST_ALLOWED = 3, 2.0, 0.05

# ERNIE 5.0, arXiv:2602.04705: held-out loss of its ablation, 64 experts and k = 8, in nats.
PUBLISHED = {
    "k2": {"what": "k 8 -> 4", "lost": 0.002},
    "k1": {"what": "k 8 -> 2", "lost": 0.034},
    "L9": {"what": "depth 16 -> 12 layers", "lost": 0.196},
    "p8": {"what": "pool 64 -> 32 experts", "lost": 0.254},
}
PUBLISHED_COST_AT_FULL = (-0.004, 0.007, 0.024)

Line = Mapping[str, Any]  # of one run


@dataclass(frozen=True, slots=True)
class Losses:
    """What a line tells of one point on one text.

    Attributes:
        nats_per_token: over all scored tokens.
        windows: (W,) nats per token of each window, which errors of pairs are taken over.
        counts: (W,) tokens that each window scores.
    """

    nats_per_token: float
    windows: tuple[float, ...]
    counts: tuple[int, ...]


Seeds = Mapping[int, Losses]  # of one family at one point on one text, by seed


def losses_of(line: Line, text: str, point: str) -> Losses | None:
    """None where the run was not measured at this point."""
    measured = line["texts"][text]
    at = measured["points"].get(point)
    if at is None:
        return None
    return Losses(at["nats_per_token"], tuple(at["window_nats"]), tuple(measured["window_tokens"]))


def paired_difference(a: Losses, b: Losses) -> tuple[float, float | None]:
    """Mean of a's loss minus b's, nats per token, and its standard error over windows."""
    counts = np.array(a.counts)
    return weighted_mean((np.array(a.windows) - np.array(b.windows)) * counts, counts)


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Number, mean and standard deviation (n - 1) of what the seeds gave; None of none."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": _short(statistics.fmean(values)), "sd": _short(sd)}


def compare(a: Seeds, b: Seeds) -> dict[str, Any] | None:
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
        nats, error = paired_difference(a[seed], b[seed])
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


def point_summary(point: str, lines: Sequence[Line], text: str) -> dict[str, Any]:
    """Everything about one point on one text."""

    def of(family: str, at: str = point) -> dict[int, Losses]:
        found = {
            line["seed"]: losses_of(line, text, at) for line in lines if line["family"] == family
        }
        return {seed: losses for seed, losses in sorted(found.items()) if losses is not None}

    def nats(losses: Seeds) -> dict[str, Any] | None:
        return spread([one.nats_per_token for one in losses.values()])

    def lost(family: str) -> dict[str, Any] | None:
        full = of(family, "full")
        return spread(
            [one.nats_per_token - full[seed].nats_per_token for seed, one in of(family).items()]
        )

    elastic, frugal, inelastic = of("elastic"), of("frugal"), of("inelastic")
    named = [family for family, own in SPECIALISTS.items() if own == point]
    family = "inelastic" if point == "full" else named[0] if named else None
    special = of(family) if family else {}
    axis, share = POINTS[point]
    difference = nats(special)
    return {
        "axis": axis,
        "share": share,
        "elastic": nats(elastic),
        "frugal": nats(frugal),
        "inelastic": nats(inelastic),
        "specialist": None if difference is None else {"family": family, **difference},
        "lost": {family: lost(family) for family in ("elastic", "frugal", "inelastic", "drawn")},
        "elastic_gain": compare(inelastic, elastic),
        "frugal_gain": compare(inelastic, frugal),
        "specialist_gain": compare(elastic, special),
        "drawn_gain": compare(elastic, of("drawn")),
        "drawn_cost": compare(of("drawn"), inelastic),
        "published": PUBLISHED.get(point),
    }


def compute_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Training FLOPs of each family, mean over its runs: equal tokens do not make equal compute."""
    flops = {
        family: [line["training"]["flops"] for line in lines if line["family"] == family]
        for family in FAMILIES
    }
    means = {family: statistics.fmean(found) for family, found in flops.items() if found}
    whole = means.get("inelastic")
    return {
        family: {"flops": mean, "of_inelastic": None if whole is None else round(mean / whole, 4)}
        for family, mean in means.items()
    }


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """The summary of the runs that have a line, on every text, with its bars."""
    results: dict[str, Any] = {}
    for name in lines[0]["texts"]:
        results[name] = {"points": {point: point_summary(point, lines, name) for point in POINTS}}
    return {
        "seeds": {
            family: sorted(line["seed"] for line in lines if line["family"] == family)
            for family in FAMILIES
        },
        "compute": compute_of(lines),
        "texts": results,
        "published_cost_at_full": list(PUBLISHED_COST_AT_FULL),
        "bars": judge(results),
    }


def judge(texts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the bars against a summary's `texts`, for every split that was trained.

    Fewer than three seeds of both decide nothing.
    """
    bars: list[dict[str, Any]] = []

    def bar(text: str, what: str, needed: str, gain: Any, value: float | None, ok: bool) -> None:
        seeds = 0 if gain is None else gain["n"]
        met = ok if seeds >= SEEDS_NEEDED else None
        bars.append(
            {"text": text, "what": what, "value": value, "needed": needed, "seeds": seeds}
            | {"met": met}
        )

    for family in SPLITS:
        for name, text in texts.items():
            gains = {point: at[f"{family}_gain"] for point, at in text["points"].items()}
            if not any(gains.values()):
                continue
            for point in BETTER_AT:
                gain = gains[point]
                sds = None if gain is None else gain["in_seed_sds"]
                what = f"{point}: inelastic minus {family}, in seed standard deviations"
                better = sds is not None and sds > SEED_SDS_NEEDED
                bar(name, what, f"> {SEED_SDS_NEEDED:g}", gain, sds, better)
            gain = gains["full"]
            cost = None if gain is None else -gain["mean"]
            what = f"full: {family} minus inelastic, nats"
            cheap = cost is not None and cost <= COST_ALLOWED
            bar(name, what, f"<= {COST_ALLOWED:g}", gain, cost, cheap)
    return bars


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
