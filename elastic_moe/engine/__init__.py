"""The engine: requests in, completions out."""

from elastic_moe.engine.engine import Engine
from elastic_moe.engine.request import (
    AppliedRouting,
    Completion,
    Delta,
    SamplingParams,
    TokenLogprob,
    Usage,
)

__all__ = [
    "AppliedRouting",
    "Completion",
    "Delta",
    "Engine",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
