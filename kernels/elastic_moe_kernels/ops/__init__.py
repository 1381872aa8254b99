"""The face of the kernels: arguments are checked here, then the named implementation runs.

Implementations: "reference" (PyTorch, any device, differentiable), "cpu" (C++), and "auto", which
is "cpu" where that can run and "reference" elsewhere.

Weights and caches are in the order in which the kernels read them, see `packing` and `kv_blocks`.
Matrix inputs (what meets packed weights or a cache) are rounded to their dtype, ties to even; sums
are float32. A row's bits depend on nothing but that row, at one instruction-set level.
"""

from elastic_moe_kernels import reference
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.attention import attention
from elastic_moe_kernels.ops.dispatch import (
    Backend,
    Implementation,
    available,
    backends,
    require,
    warn_if_degraded,
)
from elastic_moe_kernels.ops.experts import ExpertsResult, experts
from elastic_moe_kernels.ops.linear import linear
from elastic_moe_kernels.ops.norm import rms_norm
from elastic_moe_kernels.ops.route import route

__all__ = [
    "Backend",
    "ExpertsResult",
    "Implementation",
    "KernelError",
    "attention",
    "available",
    "backends",
    "experts",
    "linear",
    "reference",
    "require",
    "rms_norm",
    "route",
    "warn_if_degraded",
]
