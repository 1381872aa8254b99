"""The face of the kernels: arguments are checked here, then the named implementation runs.

Implementations: "reference" (PyTorch, any device, differentiable), "cpu" (C++), and "auto", which
is "cpu" where that can run and "reference" elsewhere.

Weights and caches are in the order in which the kernels read them, see `packing` and `kv_blocks`.
Arguments are arrays of any kind, and results of the kind of the first: torch tensors for a
tensor, numpy's otherwise. bfloat16 is uint16 in numpy, see `arrays`.

Matrix inputs (what meets packed weights or a cache) are rounded to their dtype, ties to even; sums
are float32. A row's bits depend on nothing but that row, at one instruction-set level.
"""

from typing import Any

from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.attention import attention
from elastic_moe_kernels.ops.dispatch import (
    Backend,
    Implementation,
    available,
    backends,
    load_reference,
    require,
    warn_if_degraded,
)
from elastic_moe_kernels.ops.divergence import divergence
from elastic_moe_kernels.ops.experts import ExpertsResult, experts
from elastic_moe_kernels.ops.linear import linear
from elastic_moe_kernels.ops.norm import rms_norm
from elastic_moe_kernels.ops.route import route
from elastic_moe_kernels.ops.sample import sample, token_logprobs

__all__ = [
    "Backend",
    "ExpertsResult",
    "Implementation",
    "KernelError",
    "attention",
    "available",
    "backends",
    "divergence",
    "experts",
    "linear",
    "reference",
    "require",
    "rms_norm",
    "route",
    "sample",
    "token_logprobs",
    "warn_if_degraded",
]


def __getattr__(name: str) -> Any:
    if name == "reference":  # on first use: it loads torch
        return load_reference()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
