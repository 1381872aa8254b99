"""Saving and resuming a training run: one safetensors file, written beside and then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic_moe.errors import TrainingError

FORMAT = 1


def save_state(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write tensors and progress to `path`, atomically and durably."""
    beside = path.with_name(path.name + ".part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        beside,
        metadata={"elastic_moe_training": json.dumps({"format": FORMAT, **progress})},
    )
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "elastic_moe_training" not in metadata:
            raise TrainingError(f"{path} is no training state of elastic-moe.")
        progress = json.loads(metadata["elastic_moe_training"])
        if progress.get("format") != FORMAT:
            raise TrainingError(
                f"{path} has training state format {progress.get('format')}, this version reads "
                f"{FORMAT}. Resume with the version that wrote it."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return {name: torch.as_tensor(t) for name, t in tensors.items()}, progress
