"""Log-probabilities of logits, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Of every row (..., V)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return found
