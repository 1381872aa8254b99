"""Make a kernel take twice its time, to see that the bars notice: it is simply run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from elastic_moe_kernels.step import CpuModel, PreparedStep, StepResult
from torch import Tensor

from elastic_moe.lab.bench.layer import LayerInputs, LayerWeights, NativeExperts
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import DecoderLayer, ElasticTransformer

SLOWER = ("experts",)


class TwiceTheExperts:
    """Stands before a packed model's `prepare`; steps run their experts again, as they were routed.

    The experts are packed a second time; what is read again is as cold as the first time, since
    a model's layers together are larger than the caches.
    """

    def __init__(self, packed: CpuModel, model: ElasticTransformer) -> None:
        self._prepare = packed.prepare
        self._hidden, self._channels = model.config.hidden_size, model.config.expert_hidden
        self._layers: dict[int, NativeExperts] = {}
        for i, layer in enumerate(model.layers):
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE):
                e = layer.mlp.experts
                weights = LayerWeights(e.gate_proj, e.up_proj, e.down_proj)
                self._layers[i] = NativeExperts(weights, threads=torch.get_num_threads())

    def __call__(self, *arguments: Any, **options: Any) -> SlowStep:
        """Prepare a batch whose steps run the experts twice."""
        return SlowStep(self._prepare(*arguments, **{**options, "trace": True}), self._again)

    def _again(self, topk_ids: Tensor) -> None:
        """Run the experts of ids (L, T, K)."""
        x = torch.ones(topk_ids.shape[1], self._hidden, dtype=torch.bfloat16)
        channels = torch.full((len(x),), self._channels, dtype=torch.int32)
        weights = torch.ones(topk_ids.shape[1:])
        out = torch.zeros(len(x), self._hidden)
        for i, experts in self._layers.items():
            experts(LayerInputs(x, topk_ids[i].contiguous(), weights, channels), out)


class SlowStep:
    """A prepared step, and its experts once more."""

    def __init__(self, step: PreparedStep, again: Callable[[Tensor], None]) -> None:
        self._step, self._again = step, again

    def run(self) -> StepResult:
        return self._and_again(self._step.run())

    def advance(self, token_ids: list[int]) -> StepResult:
        return self._and_again(self._step.advance(token_ids))

    def _and_again(self, result: StepResult) -> StepResult:
        if result.topk_ids is None:
            raise SystemExit("the step was not traced")
        self._again(torch.from_numpy(result.topk_ids))
        return result._replace(topk_ids=None)
