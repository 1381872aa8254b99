"""A made-up sweep of a model like elastic-mini, in the shape of `sweep.json`.

Costs follow the model's sizes; losses and speeds are smooth formulas with a little fixed noise, so
that the pictures look like real ones. No figure here was measured.
"""

from __future__ import annotations

import math
import random
from typing import Any

from elastic_moe.lab.schema import full_values
from elastic_moe.routing.axes import TRAINED

LAYERS, EXPERTS, TOP_K, GRANULES, HIDDEN, EXPERT_HIDDEN, VOCAB = 48, 16, 4, 8, 128, 64, 4096
SIZES = {
    "num_layers": LAYERS,
    "num_experts": EXPERTS,
    "max_top_k": TOP_K,
    "width_granules": GRANULES,
}
THRESHOLD_EXPERTS = {0.0: 4.0, 0.25: 3.52, 0.5: 2.61, 0.75: 1.74, 1.0: 1.0}


def synthetic_point(
    depth: int = LAYERS,
    k: int = TOP_K,
    width: int = GRANULES,
    threshold: float = 0.0,
    pool: int = EXPERTS,
) -> dict[str, Any]:
    """One point of the sweep; equal arguments give equal points."""
    parts = [
        f"L{depth}" if depth < LAYERS else "",
        f"k{k}" if k < TOP_K else "",
        f"w{width}" if width < GRANULES else "",
        f"t{threshold:g}" if threshold else "",
        f"p{pool}" if pool < EXPERTS else "",
    ]
    name = "-".join(part for part in parts if part) or "full"
    noise = random.Random(name)
    experts = min(float(k), THRESHOLD_EXPERTS[threshold])
    channels = EXPERT_HIDDEN * width // GRANULES

    def params(mean: float) -> float:
        attention = HIDDEN * (2 * 128 + 2 * 64)
        layer = attention + pool * HIDDEN + mean * 3 * HIDDEN * channels
        return depth * layer + VOCAB * HIDDEN

    delta = (
        1.05 * (1 - depth / LAYERS) ** 1.7
        + {1: 0.14, 2: 0.035, 3: 0.008, 4: 0.0}[k] * (depth / LAYERS)
        + 0.42 * (1 - width / GRANULES) ** 1.6
        + 0.045 * ((TOP_K - experts) / 3 if threshold else 0.0) ** 1.5
        + 0.55 * (1 - pool / EXPERTS) ** 1.5
    )
    if name != "full":
        delta += noise.uniform(-0.003, 0.003)
    nats = 4.312 + delta
    decode_seconds = 0.0009 + depth * (0.00021 + 0.000033 * experts * (0.5 + 0.5 * width / 8))
    trained = width in (2, 4, 6, 8) and pool in (4, 8, 16)
    return {
        **full_values(SIZES),  # every axis that no argument changes
        "name": name,
        "depth": depth,
        "top_k": k,
        "expert_width": width,
        "sparsity_threshold": threshold,
        "expert_pool": pool,
        "trained": trained,
        "active_params": round(params(experts)),
        "active_params_max": round(params(k)),
        "flops_per_token": 2 * params(experts) + depth * 4 * 256 * 128,
        "weight_bytes_per_token": 2 * params(experts),
        "mean_experts": experts,
        "bits_per_byte": nats / math.log(2) / 2.96,
        "perplexity": math.exp(nats),
        "standard_error": 0.0 if name == "full" else 0.002 + 0.009 * math.sqrt(delta + 0.004),
        "nats_per_token": nats,
        "delta_nats": 0.0 if name == "full" else delta,
        "kl_to_full": 0.0 if name == "full" else abs(delta) * 0.9 + 0.01,
        "top1_agreement": 1.0 if name == "full" else math.exp(-1.3 * math.sqrt(abs(delta) + 0.004)),
        "prefill_tokens_per_second": 31.0 / decode_seconds * noise.uniform(0.97, 1.03),
        "decode_tokens_per_second": 1.0 / decode_seconds * noise.uniform(0.97, 1.03),
        "backend": "reference",
        "dtype": "bfloat16",
    }


def synthetic_sweep(*, timings: bool = True, complete: bool = True) -> dict[str, Any]:
    """The default grid of the bundled model: 26 points and a skipped one."""
    points = [synthetic_point(d, k) for d in (48, 36, 24, 12) for k in (4, 3, 2, 1)]
    points += [synthetic_point(width=w) for w in (2, 4, 6)]
    points += [synthetic_point(threshold=t) for t in (0.25, 0.5, 0.75, 1.0)]
    points += [synthetic_point(pool=p) for p in (4, 8, 12)]
    for point in points:
        if not timings:
            point["prefill_tokens_per_second"] = point["decode_tokens_per_second"] = None
        # The definition, spelled out: the tests of the fast one must not depend on it.
        point["pareto"] = not any(
            other is not point
            and other["flops_per_token"] <= point["flops_per_token"]
            and other["bits_per_byte"] <= point["bits_per_byte"]
            for other in points
        )
    use = random.Random(0)
    layers = []
    for layer in range(LAYERS):
        weights = [use.lognormvariate(0, 0.2 + 0.5 * layer / LAYERS) for _ in range(EXPERTS)]
        if layer == 40:
            weights[11] = 0.0  # an expert that is never chosen
        layers.append([weight / sum(weights) for weight in weights])
    return {
        "schema_version": 1,
        "model": {
            "name": "elastic-mini",
            "path": "elastic_moe/bundled/elastic-mini",
            "model_type": "qwen3_moe",
            **SIZES,
            "expert_hidden": EXPERT_HIDDEN,
            "hidden_size": HIDDEN,
            "total_params": 21_912_704,
            "elastic_moe": {
                "format": 1,
                "width_granules": GRANULES,
                "trained": {
                    **{axis.trained: [axis.whole(SIZES)] for axis in TRAINED},
                    "depth": list(range(12, 49)),
                    "top_k": [1, 2, 3, 4],
                    "width": [2, 4, 6, 8],
                    "pool": [4, 8, 16],
                    "threshold": [0.0, 0.25, 0.5, 0.75, 1.0],
                },
                "tokens": 9_800_000,
                "corpus_sha256": "ab" * 32,
            },
        },
        "corpus": {
            "name": "Python language reference (pydoc_data.topics, 3.11)",
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "num_bytes": 680_000,
            "scored_tokens": 20_480,
            "scored_bytes": 60_621,
            "window": 512,
            "stride": 256,
            "bos": "one BOS token before every window, never scored",
        },
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "threads": 2, "isa": "avx512_bf16"},
        "versions": {"elastic_moe": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "settings": {"quick": False, "seed": 0},
        "skipped": [{"name": "k4-p2", "reason": "top_k must be in [1, 2], got 4"}],
        "points": points,
        "expert_use": {"name": "full", "layers": layers},
        "complete": complete,
        "seconds": 412.7,
    }
