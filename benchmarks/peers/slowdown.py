"""Make a kernel take twice its time, to see that the bars notice: it is simply run again."""

from __future__ import annotations

from typing import Any

import torch
from elastic_moe_kernels.step import CpuModel
from elastic_moe_kernels.step_result import StepResult

from elastic_moe.lab.layer import LayerInputs, LayerWeights, NativeExperts
from elastic_moe.model.moe import MoE
from elastic_moe.model.transformer import DecoderLayer, ElasticTransformer

SLOWER = ("experts",)


class TwiceTheExperts:
    """Stands before a packed model's step and runs its experts again, on the routing it had.

    The experts are packed a second time; what is read again is as cold as the first time, since
    a model's layers together are larger than the caches.
    """

    def __init__(self, packed: CpuModel, model: ElasticTransformer) -> None:
        self._step = packed.step
        self._hidden, self._channels = model.config.hidden_size, model.config.expert_hidden
        self._layers: dict[int, NativeExperts] = {}
        for i, layer in enumerate(model.layers):
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE):
                e = layer.mlp.experts
                weights = LayerWeights(e.gate_proj, e.up_proj, e.down_proj)
                self._layers[i] = NativeExperts(weights)

    def __call__(self, *arguments: Any, **options: Any) -> StepResult:
        """A step, and its experts once more."""
        result = self._step(*arguments, **{**options, "trace": True})
        if result.topk_ids is None:
            raise SystemExit("the step was not traced")
        rows = result.topk_ids.shape[1]  # (L, T, K)
        x = torch.ones(rows, self._hidden, dtype=torch.bfloat16)
        channels = torch.full((rows,), self._channels, dtype=torch.int32)
        weights = torch.ones(result.topk_ids.shape[1:])
        out = torch.zeros(rows, self._hidden)
        for i, experts in self._layers.items():
            ids = result.topk_ids[i].contiguous()
            experts(LayerInputs(x, ids, weights, channels), out)
        return result
