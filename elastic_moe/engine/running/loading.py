"""Which runner a checkpoint gets, on this machine and device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from elastic_moe_kernels import native, ops
from elastic_moe_kernels.errors import KernelError

from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.engine.running.reference import ReferenceRunner
from elastic_moe.engine.running.runner import ModelRunner
from elastic_moe.errors import EngineError
from elastic_moe.model.checkpoints.checkpoint import DTypeName
from elastic_moe.model.reference.loading import load_model

Backend = Literal["auto", "reference", "cpu"]


def load_runner(
    folder: Path,
    *,
    backend: Backend = "auto",
    dtype: DTypeName = "auto",
    device: torch.device | str = "cpu",
) -> ModelRunner:
    """What runs a checkpoint folder, without the text around it.

    Raises:
        CheckpointError: the checkpoint is missing, broken or not supported.
        EngineError: the backend or device that was named cannot run here.
    """
    place = check_device(device)
    runner: ModelRunner | None = None
    if choose_backend(backend, place) == "cpu":
        runner = _native_runner(folder, dtype, backend)
    if runner is None:
        runner = ReferenceRunner(load_model(folder, dtype=dtype, device=place))
    return runner


def choose_backend(backend: Backend, device: torch.device) -> Literal["reference", "cpu"]:
    """The backend that 'auto' means here, or the one that was named.

    Raises:
        EngineError: it cannot run here.
    """
    on_cpu = device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise EngineError("backend 'cpu' needs the model on the CPU. Use device='cpu'.")
    if backend not in ("auto", "reference", "cpu"):
        raise EngineError(f"backend must be 'auto', 'reference' or 'cpu', got {backend!r}.")
    if backend == "reference" or not on_cpu:
        return "reference"
    if backend == "auto":
        ops.warn_if_degraded()
        if native.missing():
            return "reference"
    try:  # a level that was named and is not there is an error for "auto" too
        ops.require("cpu")
    except KernelError as error:
        raise EngineError(str(error)) from error
    return "cpu"


def _native_runner(folder: Path, dtype: DTypeName, backend: Backend) -> ModelRunner | None:
    """The C++ step; None if this model's sizes are not for it and 'auto' may choose another."""
    try:
        return NativeRunner(folder, dtype)
    except KernelError as error:
        if backend == "cpu":
            raise EngineError(f"{folder}: {error} Use backend='reference'.") from error
        warnings.warn(
            f"{folder} runs on the PyTorch reference, which is slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def check_device(device: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        EngineError: it is not.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}.")
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise EngineError(
            f"device {str(device)!r} is not there: torch {torch.__version__} sees {count} CUDA "
            f"devices. Use device='cpu', or a torch built for the driver of this machine."
        )
    return place
