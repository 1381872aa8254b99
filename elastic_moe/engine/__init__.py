"""The engine: requests in, completions out."""

from elastic_moe.engine.engine import Engine
from elastic_moe.engine.outputs import (
    Choice,
    Completion,
    Delta,
    RoutingStats,
    TokenLogprob,
    Usage,
)
from elastic_moe.engine.sampling_params import SamplingParams

__all__ = [
    "Choice",
    "Completion",
    "Delta",
    "Engine",
    "RoutingStats",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
