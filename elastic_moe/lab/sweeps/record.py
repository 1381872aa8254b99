"""The entries of `sweep.json`: points, model and settings."""

from __future__ import annotations

import hashlib
import math
from typing import Any, cast

from elastic_moe.engine import Engine
from elastic_moe.lab.bench.speed import Spread
from elastic_moe.lab.schema import ExpertUse, SweepPoint
from elastic_moe.lab.sweeps.grid import is_trained
from elastic_moe.lab.sweeps.quality import Quality, paired_difference, window_deviations
from elastic_moe.lab.sweeps.text import WINDOW, EvaluationSet
from elastic_moe.model.checkpoints.folder import file_in
from elastic_moe.routing import Subnet
from elastic_moe.routing.axes import AXES, DEPTH, TRAINED, count

SPEED_FIELDS = tuple(
    f"{kind}_tokens_per_second{part}"
    for kind in ("prefill", "decode")
    for part in ("", "_min", "_max")
)
BYTES_PER_WEIGHT = {"bfloat16": 2, "float32": 4}


def describe_point(
    subnet: Subnet, quality: Quality, full: Quality, text: EvaluationSet, engine: Engine
) -> SweepPoint:
    """One entry of `points`, its speeds still unknown (None).

    Cost is that of a token with a whole window (512) of context, with the number of experts that
    really ran; `active_params_max` is the bound that holds whatever the threshold drops.
    """
    delta, error = paired_difference(quality, full, text)
    experts = quality.mean_experts
    point: dict[str, Any] = {
        "name": subnet.name,
        DEPTH.name: subnet.depth,
        **{axis.name: count(subnet.uniform(axis.name)) for axis in TRAINED if axis.per_layer},
        "trained": is_trained(subnet, engine.config.elastic),
        "active_params": round(subnet.active_params_at(experts)),
        "active_params_max": subnet.active_params,
        "flops_per_token": round(subnet.flops_per_token(WINDOW, experts)),
        "flops_per_token_max": round(subnet.flops_per_token(WINDOW)),
        "weight_bytes_per_token": round(
            subnet.weight_bytes_per_token(BYTES_PER_WEIGHT[engine.dtype], experts)
        ),
        "mean_experts": round(experts, 4),
        "bits_per_byte": quality.bits_per_byte(text.scored_bytes),
        "nats_per_token": quality.nats_per_token,
        "perplexity": math.exp(quality.nats_per_token),
        "delta_nats": delta,
        "standard_error": error,
        "window_deviations": window_deviations(quality, text),
        "kl_to_full": max(0.0, quality.kl_to_full),
        "top1_agreement": quality.top1_agreement,
        **dict.fromkeys(SPEED_FIELDS),
        "backend": engine.backend,
        "dtype": engine.dtype,
        "pareto": False,
    }
    return cast(SweepPoint, point)


def describe_speed(kind: str, speed: Spread) -> dict[str, float]:
    """The fields of one speed, in tokens per second. `kind`: prefill or decode."""
    key = f"{kind}_tokens_per_second"
    figures = {key: speed.median, f"{key}_min": speed.min, f"{key}_max": speed.max}
    return {name: round(figure, 2) for name, figure in figures.items()}


def describe_model(engine: Engine) -> dict[str, Any]:
    """The `model` entry: name and sizes, and what the checkpoint says of its training."""
    config, shape = engine.config, engine.shape
    return {
        "name": engine.name,
        "model_type": config.model_type,
        **{axis.size: axis.most(shape) for axis in AXES if axis.size is not None},
        "expert_hidden": shape.expert_hidden,
        "hidden_size": shape.hidden_size,
        "total_params": shape.total_params,
        "elastic_moe": config.elastic.to_json() if config.elastic else None,
    }


def describe_settings(engine: Engine, *, quick: bool, ranked_on: str | None) -> dict[str, Any]:
    """The `settings` entry: with corpus, machine and versions, all that a point depends on.

    Args:
        ranked_on: name of the text that the channels were ranked on, where it is known.
    """
    return {
        "weights_sha256": engine.weights_sha256,
        "config_sha256": _sha256(engine, "config.json"),
        "tokenizer_sha256": _sha256(engine, "tokenizer.json"),
        "backend": engine.backend,
        "dtype": engine.dtype,
        "device": str(engine.runner.device),
        "rank_channels": ranked_on,
        "rank_channels_sha256": engine.calibration_sha256,
        "quick": quick,
    }


def describe_expert_use(name: str, quality: Quality) -> ExpertUse:
    """The `expert_use` entry: for each layer that routes, the share of each expert."""
    ids = sorted(quality.expert_use)
    return {"name": name, "layer_ids": ids, "layers": [quality.expert_use[i] for i in ids]}


def _sha256(engine: Engine, name: str) -> str:
    return hashlib.sha256(file_in(engine.folder, name).read_bytes()).hexdigest()
