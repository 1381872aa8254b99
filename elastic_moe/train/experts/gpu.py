"""What a GPU runs in place of a model's own attention and experts: few kernels, little memory."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.reference.layers import Attention
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.train.experts.padded import run_experts_padded


def attend_repeated(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """As `F.scaled_dot_product_attention` with grouped queries, in float32.

    Of heads that queries share CUDA has no float32 kernel but the one that writes down every score;
    each is repeated for its queries instead.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (heads.repeat_interleave(group, 1) for heads in (k, v))  # (B, H, T, d)
    return F.scaled_dot_product_attention(q, k, v, **{**options, "enable_gqa": False})


def use_gpu(model: ElasticTransformer) -> None:
    """Have every layer of a model run what suits a GPU."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_repeated
        elif isinstance(module, MoE):
            module.run_experts = run_experts_padded
