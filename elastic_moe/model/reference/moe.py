"""The mixture-of-experts block: a router, and experts of which a width prefix may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from elastic_moe_kernels import ops, reference
from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.table import LayerTable
from torch import Tensor, nn

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.layers import MLP

Implementation = Literal["reference", "cpu"]


class Experts(nn.Module):
    """E SwiGLU experts, stacked: gate_proj, up_proj (E, F, D) and down_proj (E, D, F)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, channels, hidden = config.num_experts, config.expert_hidden, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(experts, channels, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, channels, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, channels))


ExpertsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Experts, torch.dtype | None], Tensor]


def run_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    channels: Tensor,
    experts: Experts,
    input_dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.experts` of the kernels with a layer's stacked weights.

    Args:
        input_dtype: what matrix inputs are rounded to; None for no rounding.
    """
    return reference.experts(
        x,
        topk_ids,
        topk_weights,
        channels,
        experts.gate_proj,
        experts.up_proj,
        experts.down_proj,
        input_dtype=input_dtype or x.dtype,
    )


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer.

    `implementation` names the routing kernel, `run_experts` the execution of the experts; both may
    be exchanged for another that computes the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.renormalize = config.renormalize
        self.epsilon = config.routing_epsilon
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # never rounded
        self.correction_bias = (
            nn.Parameter(torch.zeros(config.num_experts)) if config.selection_bias else None
        )
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.shared_hidden) if config.shared_hidden else None
        )
        self.input_dtype: torch.dtype | None = None
        self.implementation: Implementation = "reference"
        self.run_experts: ExpertsFunction = run_experts

    def forward(
        self, x: Tensor, table: LayerTable, subnet_of_row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D) -> output (T, D), router_logits (T, E), topk_ids (T, K)."""
        router_logits = self.gate(x)
        topk_ids, topk_weights = ops.route(
            router_logits,
            table,
            subnet_of_row,
            renormalize=self.renormalize,
            epsilon=self.epsilon,
            correction_bias=self.correction_bias,
            implementation=self.implementation,
        )
        channels = tensor(table.channels)[subnet_of_row]  # (T,)
        out = self.run_experts(x, topk_ids, topk_weights, channels, self.experts, self.input_dtype)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, router_logits, topk_ids
