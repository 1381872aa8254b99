"""The content of `sweep.json`, version 1: fields, types and units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from elastic_moe.routing.axes import TRAINED

SCHEMA_VERSION = 1


class SweepPoint(TypedDict):
    """One sub-network: its choice of the axes, cost, quality and speed.

    An axis is None where layers differ, and absent in a file from before it was added. Costs are
    those of a token with a whole window (512) of context; `..._max` holds whatever the threshold
    drops. Losses, `delta_nats` (mean difference to the full network), its paired standard error and
    `kl_to_full` are in nats per token; the error is None where there is one window alone.
    `window_deviations` lists for each window the nats that it has beyond its tokens' share of the
    loss, over all scored tokens: the standard error of the difference of two points follows from
    theirs (`difference_error`). A speed is the median over rounds, `..._min` and `..._max` are
    of the slowest and the fastest round; all are None until they are measured. Older files lack
    deviations and ranges.
    """

    name: str
    depth: int
    top_k: int | None
    expert_width: int | None
    sparsity_threshold: float | None
    expert_pool: int | None
    trained: bool
    active_params: int
    active_params_max: int
    flops_per_token: int
    flops_per_token_max: int
    weight_bytes_per_token: int
    mean_experts: float
    bits_per_byte: float
    nats_per_token: float
    perplexity: float
    delta_nats: float
    standard_error: float | None
    window_deviations: list[float] | None
    kl_to_full: float
    top1_agreement: float
    prefill_tokens_per_second: float | None
    prefill_tokens_per_second_min: float | None
    prefill_tokens_per_second_max: float | None
    decode_tokens_per_second: float | None
    decode_tokens_per_second_min: float | None
    decode_tokens_per_second_max: float | None
    backend: str
    dtype: str
    pareto: bool


class ExpertUse(TypedDict):
    """Of the full network: for each layer that routes, the share of its choices by expert."""

    name: str
    layer_ids: list[int]
    layers: list[list[float]]


class SweepResult(TypedDict):
    """A whole sweep; `complete` is false while it runs and where it was interrupted.

    Points of two sweeps are comparable only where `corpus`, `settings`, `machine` and `versions`
    are equal. `skipped` lists the combinations that the model cannot run, with the reason. `date`
    (UTC), `command` and `commit` are of the run that wrote the file; older ones lack them. `load`,
    None before, is what other programs ran while speeds were measured (`LoadMonitor.describe`).
    """

    schema_version: int
    model: dict[str, Any]
    corpus: dict[str, Any]
    date: NotRequired[str]
    command: NotRequired[str]
    commit: NotRequired[str | None]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    skipped: list[dict[str, str]]
    points: list[SweepPoint]
    expert_use: ExpertUse | None
    load: NotRequired[dict[str, Any] | None]
    complete: bool
    seconds: float


ADDED_FIELDS = (  # None in files from before they were added
    "window_deviations",
    "prefill_tokens_per_second_min",
    "prefill_tokens_per_second_max",
    "decode_tokens_per_second_min",
    "decode_tokens_per_second_max",
)
POINT_FIELDS = tuple(dict.fromkeys((*SweepPoint.__annotations__, *(a.name for a in TRAINED))))


def full_values(model: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each axis in the full network, by the point's field: `{"depth": 48, ...}`.

    None where the entry `model` lacks the size, as before an axis was added that needs it.
    """
    unknown = {axis for axis in TRAINED if axis.full is None and axis.size not in (None, *model)}
    return {axis.name: None if axis in unknown else axis.whole(model) for axis in TRAINED}


def with_every_field(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep as read from a file; in each point axes added since are full, other fields None."""
    full = {**full_values(sweep["model"]), **dict.fromkeys(ADDED_FIELDS)}
    return {**sweep, "points": [{**full, **point} for point in sweep["points"]]}
