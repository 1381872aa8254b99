"""The engine: requests in, completions out."""

from elastic_moe.engine.engine import Engine
from elastic_moe.engine.outputs import (
    AppliedRouting,
    Choice,
    Completion,
    Delta,
    TokenLogprob,
    Usage,
)
from elastic_moe.engine.sampling_params import SamplingParams

__all__ = [
    "AppliedRouting",
    "Choice",
    "Completion",
    "Delta",
    "Engine",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
