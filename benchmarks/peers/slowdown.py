"""Make a kernel take twice its time, to see that the bars notice: it is simply run again."""

from __future__ import annotations

import torch

from elastic_moe.lab.layer import LayerInputs, LayerWeights, NativeExperts
from elastic_moe.lab.runners import NativeRunner
from elastic_moe.model.moe import MoE
from elastic_moe.model.transformer import DecoderLayer, ElasticTransformer

SLOWER = ("experts",)


class AgainExperts:
    """Runs the experts of a step once more, on the routing that the step had.

    The experts are packed a second time; what is read again is as cold as the first time, since
    a model's layers together are larger than the caches.
    """

    def __init__(self, model: ElasticTransformer) -> None:
        self._hidden = model.config.hidden_size
        self._channels = model.config.expert_hidden
        self._layers: dict[int, NativeExperts] = {}
        for i, layer in enumerate(model.layers):
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE):
                experts = layer.mlp.experts
                self._layers[i] = NativeExperts(
                    LayerWeights(experts.gate_proj, experts.up_proj, experts.down_proj)
                )

    def __call__(self, runner: NativeRunner) -> None:
        """Run them; the runner's last call must have traced."""
        if runner.last is None or runner.last.topk_ids is None:
            raise SystemExit("the step was not traced")
        topk_ids = runner.last.topk_ids  # (L, T, K)
        rows = topk_ids.shape[1]
        x = torch.ones(rows, self._hidden, dtype=torch.bfloat16)
        channels = torch.full((rows,), self._channels, dtype=torch.int32)
        weights = torch.ones(topk_ids.shape[1:])
        out = torch.zeros(rows, self._hidden)
        for i, experts in self._layers.items():
            experts(LayerInputs(x, topk_ids[i].contiguous(), weights, channels), out)
