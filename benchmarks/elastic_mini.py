"""Is elastic-mini well trained, and elastic? Its quality on held-out text, axis by axis.

    python benchmarks/elastic_mini.py --run runs/mini --out benchmarks/results/elastic-mini.jsonl
    python benchmarks/elastic_mini.py --text FILE

Compares sub-networks pairwise on the same tokens (paired standard errors over windows), and the
full network with the best add-k bigram over the same training tokens, where the run's folder is
given: k is chosen on the evaluation text, in the bigram's favour. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_moe import __version__
from elastic_moe.engine import Engine
from elastic_moe.lab.quality import FullNetwork, Quality, measure_depths, paired_difference
from elastic_moe.lab.record import describe_commit
from elastic_moe.lab.text import EvaluationSet, evaluation_set, language_reference, read_corpus
from elastic_moe.train.bigram import fit_bigram
from elastic_moe.train.checkpoint import load_state
from elastic_moe.train.data import open_stream
from elastic_moe.train.plan import TrainingPlan

# Along each axis quality has to fall at every step, by more than 3 standard errors.
LADDERS = {
    "depth": ("full", "L24", "L12"),
    "top_k": ("full", "k2", "k1"),
    "width": ("full", "w4", "w2"),
    "pool": ("full", "p8", "p4"),
}
# And yet a reduced network may lose no more than this, in nats per token.
LIMITS = {"L36": 0.6, "L24": 1.2, "k2": 0.15, "w4": 0.4, "p8": 0.6}
BUNDLES = {"full": (48, 36, 24, 12), "k2": (48,), "k1": (48,), "w4": (48,), "w2": (48,)}
BUNDLES |= {"p8": (48,), "p4": (48,)}
LEAST_DEPTH_LOSS = 0.05
LEAST_GAIN_OVER_BIGRAM = 0.3


def measure(engine: Engine, text: EvaluationSet) -> dict[str, Quality]:
    full = FullNetwork(text.scored_tokens, engine.config.vocab_size)
    found: dict[str, Quality] = {}
    for name, depths in BUNDLES.items():
        deepest = engine.resolve(name)
        measured: dict[int, Quality] = {}
        for _, measured in measure_depths(  # noqa: B007  (the last item is the result)
            engine.runner, text, deepest, depths, full, is_full=name == "full"
        ):
            pass
        found |= {deepest.at_depth(depth).name: quality for depth, quality in measured.items()}
        print(f"measured {', '.join(deepest.at_depth(d).name for d in depths)}", file=sys.stderr)
    return found


def bigram_nats(run: Path, text: EvaluationSet, vocab_size: int) -> tuple[float, float]:
    """(nats per token, k) of the best add-k bigram on the scored tokens."""
    _, progress = load_state(run / "state.safetensors")
    plan = TrainingPlan.from_json(progress["plan"])
    # The steps that were done, which may be fewer than planned.
    bigram = fit_bigram(open_stream(run / "data", plan.seed), plan, progress["step"], vocab_size)
    last = np.concatenate([w.inputs[w.first_scored :] for w in text.windows])
    following = np.concatenate([w.targets[w.first_scored :] for w in text.windows])
    tried = [
        (float(bigram.losses(last, following, k).mean()), k) for k in np.geomspace(1e-3, 1, 13)
    ]
    return min(tried)


def judge(found: dict[str, Quality], text: EvaluationSet, bigram: float | None) -> list[dict]:
    bars = []

    def bar(what: str, value: float, ok: bool, needed: str) -> None:
        bars.append({"what": what, "value": round(value, 5), "needed": needed, "met": bool(ok)})

    full = found["full"]
    if bigram is not None:
        gain = bigram - full.nats_per_token
        bar("nats better than the bigram", gain, gain >= LEAST_GAIN_OVER_BIGRAM, ">= 0.3")
    for names in LADDERS.values():
        for better, worse in pairwise(names):
            mean, error = paired_difference(found[worse], found[better], text)
            bar(f"{better} > {worse}, in standard errors", mean / error, mean > 3 * error, "> 3")
    for name, limit in LIMITS.items():
        loss, _ = paired_difference(found[name], full, text)
        bar(f"nats lost by {name}", loss, loss <= limit, f"<= {limit}")
    loss, _ = paired_difference(found["L12"], full, text)
    bar("nats lost by L12", loss, loss >= LEAST_DEPTH_LOSS, f">= {LEAST_DEPTH_LOSS}")
    bar("KL of full to full", full.kl_to_full, full.kl_to_full == 0, "0")
    bar("agreement of full with full", full.top1_agreement, full.top1_agreement == 1, "1")
    return bars


def record(engine: Engine, text: EvaluationSet, found: dict[str, Quality]) -> dict[str, Any]:
    points = {}
    for name, quality in found.items():
        loss, error = paired_difference(quality, found["full"], text)
        points[name] = {
            "nats_per_token": round(quality.nats_per_token, 5),
            "bits_per_byte": round(quality.bits_per_byte(text.scored_bytes), 5),
            "nats_lost": round(loss, 5),
            "standard_error": round(error, 5),
            "kl_to_full": round(quality.kl_to_full, 5),
            "top1_agreement": round(quality.top1_agreement, 5),
        }
    return {
        "benchmark": "elastic_mini",
        "model": engine.name,
        "weights_sha256": engine.weights_sha256,
        "corpus": text.describe(),
        "dtype": engine.dtype,
        "backend": engine.backend,
        "points": points,
        "machine": platform.processor() or platform.machine(),
        "versions": {"elastic_moe": __version__, "torch": str(torch.__version__)},
        "commit": describe_commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of the training run, for the bigram")
    parser.add_argument("--text", type=Path, help="UTF-8 text instead of the language reference")
    parser.add_argument("--tokens", type=int, default=32_256)
    parser.add_argument("--out", type=Path, help="append the result to this .jsonl file")
    args = parser.parse_args()
    engine = Engine.from_pretrained("elastic-mini")
    corpus = read_corpus(args.text) if args.text else language_reference()
    text = evaluation_set(corpus, engine.tokenizer, args.tokens)
    found = measure(engine, text)
    bigram, k = None, None
    if args.run:
        bigram, k = bigram_nats(args.run, text, engine.config.vocab_size)
    result = record(engine, text, found)
    result |= {"bigram_nats_per_token": bigram, "bigram_k": k}
    result["bars"] = judge(found, text, bigram)
    for bar in result["bars"]:
        verdict = "met   " if bar["met"] else "MISSED"
        print(f"{verdict} {bar['what']}: {bar['value']} ({bar['needed']})")
    line = json.dumps(result)
    print(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(line + "\n")
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
