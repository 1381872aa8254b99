"""A whole model in C++: packed once, then one native call per step runs all layers.

`CpuModel` owns the packed weights (`ModelDims`, `LayerTensors`) and runs `BatchArrays`; a
`PreparedStep` goes on with a batch token by token; `StepResult` and `Counters` come back.
"""

from elastic_moe_kernels.step.inputs import BatchArrays, PreparedStep
from elastic_moe_kernels.step.model import CpuModel
from elastic_moe_kernels.step.outputs import Counters, StepResult
from elastic_moe_kernels.step.weights import LayerTensors, ModelDims, packed_bytes

__all__ = [
    "BatchArrays",
    "Counters",
    "CpuModel",
    "LayerTensors",
    "ModelDims",
    "PreparedStep",
    "StepResult",
    "packed_bytes",
]
