"""Is elastic-mini well trained, and elastic? Its quality on two held-out texts, axis by axis.

    python -m benchmarks.elastic_mini --novels DIR --run runs/mini \\
        --out benchmarks/results/elastic-mini.jsonl

Compares sub-networks pairwise on the same tokens (paired standard errors over windows), and the
full network with what came before it: the first version's figures on the same texts
(results/elastic-mini-first.jsonl), and n-grams over the same training tokens, where the run's
folder is given. Orders and k of the n-grams are chosen on the evaluation text, in their favour.
--out replaces the whole file. Exits 1 if a bar is missed or could not be held against anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.science.measuring import (
    TOKENS,
    describe_loss,
    describe_quality,
    evaluation_texts,
    measure,
)
from elastic_moe.engine import Engine
from elastic_moe.files import write_text
from elastic_moe.lab.quality import Quality, paired_difference
from elastic_moe.lab.record import describe_commit, describe_machine, describe_versions
from elastic_moe.lab.text import EvaluationSet
from elastic_moe.train.bigram import fit_bigram
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.data import open_stream
from elastic_moe.train.ngram import MAX_ORDER, fit_kneser_ney
from elastic_moe.train.plan import TrainingPlan

RESULTS = Path(__file__).resolve().parent / "results"
FIRST = RESULTS / "elastic-mini-first.jsonl"  # what the weights of the first version were measured

# Along each axis quality has to fall at every step, by more than 3 standard errors.
LADDERS = {
    "depth": ("full", "L24", "L12"),
    "top_k": ("full", "k2", "k1"),
    "width": ("full", "w4", "w2"),
    "pool": ("full", "p8", "p4"),
}
BUNDLES = {"full": (48, 36, 24, 12), "k2": (48,), "k1": (48,), "w4": (48,), "w2": (48,)}
BUNDLES |= {"p8": (48,), "p4": (48,)}
# And yet a reduced network may lose no more than this, in nats per token: every version, and those
# after the first.
LIMITS = {"L36": 0.6, "L24": 1.2, "k2": 0.15, "w4": 0.4, "p8": 0.6}
LIMITS_LATER = {"L36": 0.25, "k2": 0.05, "p8": 0.35}
# The whole depth must be used.
LEAST_DEPTH_LOSS, LEAST_DEPTH_LOSS_LATER = 0.05, 0.1
LEAST_GAIN_OVER_BIGRAM = 0.3
OVER_FIRST, OVER_NGRAM = 0.97, 0.93  # of their bits per byte

Line = Mapping[str, Any]


def opponents(run: Path, data: Path, text: EvaluationSet, vocab_size: int) -> dict[str, Any]:
    """What counting alone makes of the run's training tokens: nats per token on the scored ones.

    Returns:
        The best add-k bigram, and the best interpolated n-gram of order 1 to 5.
    """
    _, progress = load_state(run / "state.safetensors")
    plan = TrainingPlan.from_json(progress["plan"])
    stream = open_stream(data, plan.seed)
    steps = progress["step"]  # those that were done, which may be fewer than planned
    bigram = fit_bigram(stream, plan, steps, vocab_size)
    last = np.concatenate([w.inputs[w.first_scored :] for w in text.windows])
    following = np.concatenate([w.targets[w.first_scored :] for w in text.windows])
    nats, k = min(
        (float(bigram.losses(last, following, k).mean()), k) for k in np.geomspace(1e-3, 1, 13)
    )
    ngram = fit_kneser_ney(stream, plan, steps, vocab_size)
    inputs = np.array([window.inputs for window in text.windows])
    targets = np.array([window.targets for window in text.windows])
    firsts = np.array([window.first_scored for window in text.windows])
    scored = np.arange(targets.shape[1]) >= firsts[:, None]
    orders = {
        order: float(ngram.losses(inputs, targets, order)[scored].mean())
        for order in range(1, MAX_ORDER + 1)
    }
    best = min(orders, key=lambda order: orders[order])
    return {
        "bigram_nats_per_token": nats,
        "bigram_k": float(k),
        "ngram_nats_per_token": orders[best],
        "ngram_order": best,
    }


NO_OPPONENTS = dict.fromkeys(
    ("bigram_nats_per_token", "bigram_k", "ngram_nats_per_token", "ngram_order")
)


def record(engine: Engine, text: EvaluationSet, found: dict[str, Quality]) -> dict[str, Any]:
    """The line of one text, without its opponents and bars."""
    points = {
        name: describe_quality(quality, text) | describe_loss(quality, found["full"], text)
        for name, quality in found.items()
    }
    steps = []
    for names in LADDERS.values():
        for better, worse in pairwise(names):
            mean, error = paired_difference(found[worse], found[better], text)
            steps.append({"better": better, "worse": worse, "nats": mean, "standard_error": error})
    return {
        "benchmark": "elastic_mini",
        "model": engine.name,
        "weights_sha256": engine.weights_sha256,
        "corpus": text.describe(),
        "dtype": engine.dtype,
        "backend": engine.backend,
        "points": points,
        "steps": steps,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(),
    }


class Bars(list[dict[str, Any]]):
    """Bars held against values; `met` is None where there was nothing to compare with."""

    def hold(self, what: str, value: float | None, direction: str, limit: float) -> None:
        """Add one: the value must be '<=', '>=' or '>' the limit."""
        met = told = None
        if value is not None:
            met = {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[direction]
            told = round(value, 5)
        needed = f"{direction} {limit:g}"
        self.append({"what": what, "value": told, "needed": needed, "met": met})


def judge(line: Line, first: Line | None) -> Bars:
    """Hold all bars against a line of results; nothing is measured here.

    Args:
        line: as `record` and `opponents` give it.
        first: the first version's line on the same text; weights that are not its own must beat it.
    """
    bars = judge_any(line)
    if first is None or line["weights_sha256"] != first["weights_sha256"]:
        bars += judge_later(line, first)
    return bars


def judge_any(line: Line) -> Bars:
    """The bars of every version: trained, and elastic along every axis."""
    bars, points = Bars(), line["points"]
    full = points["full"]
    if line["bigram_nats_per_token"] is not None:
        gain = line["bigram_nats_per_token"] - full["nats_per_token"]
        bars.hold("nats better than the bigram", gain, ">=", LEAST_GAIN_OVER_BIGRAM)
    for step in line["steps"]:
        value = step["nats"] / step["standard_error"]
        bars.hold(f"{step['better']} > {step['worse']}, in standard errors", value, ">", 3)
    for name, limit in LIMITS.items():
        bars.hold(f"nats lost by {name}", points[name]["nats_lost"], "<=", limit)
    bars.hold("nats lost by L12", points["L12"]["nats_lost"], ">=", LEAST_DEPTH_LOSS)
    bars.hold("KL of full to full", full["kl_to_full"], "<=", 0)
    bars.hold("agreement of full with full", full["top1_agreement"], ">=", 1)
    return bars


def judge_later(line: Line, first: Line | None) -> Bars:
    """What only the first version need not do: beat it and the best n-gram, and lose less."""
    bars, points = Bars(), line["points"]
    full = points["full"]
    ratio = None
    if first is not None and first["corpus"] == line["corpus"]:
        ratio = full["bits_per_byte"] / first["points"]["full"]["bits_per_byte"]
    bars.hold("bits per byte over the first version's", ratio, "<=", OVER_FIRST)
    ngram = line["ngram_nats_per_token"]
    # The tokens are the same, so the nats have the ratio of the bits per byte.
    ratio = None if ngram is None else full["nats_per_token"] / ngram
    bars.hold("bits per byte over the best n-gram's", ratio, "<=", OVER_NGRAM)
    for name, limit in LIMITS_LATER.items():
        bars.hold(f"nats lost by {name}", points[name]["nats_lost"], "<=", limit)
    bars.hold("nats lost by L12", points["L12"]["nats_lost"], ">=", LEAST_DEPTH_LOSS_LATER)
    return bars


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a file of results by the name of their text; the last one counts."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["corpus"]["name"]: line for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="elastic-mini", help="default: %(default)s")
    parser.add_argument("--novels", type=Path, help="folder with novels of the held-out authors")
    parser.add_argument("--run", type=Path, help="folder of the training run, for the n-grams")
    parser.add_argument("--data", type=Path, help="its prepared text (default: RUN/data)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="scored (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    first = read_lines(FIRST)
    lines = []
    for name, text in evaluation_texts(engine.tokenizer, args.novels, args.tokens).items():
        line = record(engine, text, measure(engine, text, BUNDLES)) | NO_OPPONENTS
        if args.run:
            data = args.data or args.run / "data"
            line |= opponents(args.run, data, text, engine.config.vocab_size)
        line["bars"] = judge(line, first.get(name))
        lines.append(line)
    for line in lines:
        print(f"\n{line['corpus']['name']}")
        for bar in line["bars"]:
            verdict = {True: "met", False: "MISSED", None: "NOT MEASURED"}[bar["met"]]
            print(f"{verdict:12} {bar['what']}: {bar['value']} ({bar['needed']})")
    print()
    for line in lines:
        print(json.dumps(line))
    if args.out:
        write_text(args.out, "".join(f"{json.dumps(line)}\n" for line in lines))
    return 0 if all(bar["met"] for line in lines for bar in line["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
