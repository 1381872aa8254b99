"""The angles of rotary position embeddings (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles.

    Args:
        positions: (B, T) or (T,) integer.

    Returns:
        cos, sin: positions' shape + (d/2,), float32.
    """
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    angles = positions.unsqueeze(-1).float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
