"""Training a super-network: corpus, sub-network sampling, loss, optimiser, loop, checkpoints.

    from elastic_moe.train import TrainConfig, run

    result = run(TrainConfig(corpus=Path("notes"), out=Path("notes-model"), minutes=5))

`python -m elastic_moe.train` is the same from a command line. Needs torch, numpy, safetensors and
tokenizers only; `run` loads them on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from elastic_moe.train.config import TrainConfig

if TYPE_CHECKING:
    from elastic_moe.train.session import TrainResult as TrainResult
    from elastic_moe.train.session import run as run

__all__ = ["TrainConfig", "TrainResult", "run"]


def __getattr__(name: str) -> Any:
    if name in ("run", "TrainResult"):
        return getattr(importlib.import_module("elastic_moe.train.session"), name)
    raise AttributeError(f"module 'elastic_moe.train' has no attribute {name!r}")
