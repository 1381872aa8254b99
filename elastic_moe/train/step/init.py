"""What a run that begins with no weights begins with."""

from __future__ import annotations

import torch
from torch import nn

from elastic_moe.model.reference.transformer import ElasticTransformer


def initialize(model: ElasticTransformer, seed: int) -> None:
    """Random weights; every output projection is zero, so a layer starts as the identity. So is
    every correction bias: no expert is preferred.

    The embeddings are large enough to be heard in the residual stream; the small gain of the final
    norm makes up for it where they serve as the head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "correction_bias")):
            nn.init.zeros_(p)
        elif p.ndim == 1:
            nn.init.constant_(p, 0.2 if name == "norm.weight" else 1.0)
        elif name.endswith("mlp.gate.weight"):
            nn.init.normal_(p, std=0.02, generator=generator)
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(p, std=0.1, generator=generator)
        else:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
