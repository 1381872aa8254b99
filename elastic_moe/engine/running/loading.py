"""Which runner a checkpoint gets, on this machine and device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from elastic_moe_kernels import native, ops
from elastic_moe_kernels.arrays import NO_TORCH
from elastic_moe_kernels.errors import KernelError

from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.engine.running.runner import ModelRunner
from elastic_moe.errors import EngineError, require_torch
from elastic_moe.model.checkpoints.checkpoint import DTypeName

Backend = Literal["auto", "reference", "cpu"]


def load_runner(
    folder: Path,
    *,
    backend: Backend = "auto",
    dtype: DTypeName = "auto",
    device: object = "cpu",
) -> ModelRunner:
    """What runs a checkpoint folder, without the text around it.

    Args:
        device: "cpu", "cuda", "cuda:N", or a `torch.device`.

    Raises:
        CheckpointError: the checkpoint is missing, broken or not supported.
        EngineError: the backend or device that was named cannot run here.
    """
    place = check_device(device)
    runner: ModelRunner | None = None
    if choose_backend(backend, place) == "cpu":
        runner = _native_runner(folder, dtype, backend)
    if runner is None:
        from elastic_moe.engine.running.reference import ReferenceRunner  # deferred: loads torch
        from elastic_moe.model.reference.loading import load_model

        runner = ReferenceRunner(load_model(folder, dtype=dtype, device=place))
    return runner


def choose_backend(backend: Backend, device: str) -> Literal["reference", "cpu"]:
    """The backend that 'auto' means here, or the one that was named.

    Raises:
        EngineError: it cannot run here.
    """
    on_cpu = device == "cpu"
    if backend == "cpu" and not on_cpu:
        raise EngineError("backend 'cpu' needs the model on the CPU. Use device='cpu'.")
    if backend not in ("auto", "reference", "cpu"):
        raise EngineError(f"backend must be 'auto', 'reference' or 'cpu', got {backend!r}.")
    if backend == "reference" or not on_cpu:
        require_torch("backend 'reference'" if on_cpu else f"device {device!r}")
        return "reference"
    if backend == "auto":
        ops.warn_if_degraded()
        if native.missing() and ops.available("reference"):
            return "reference"
    try:  # a level that was named and is not there is an error for "auto" too
        ops.require("cpu")
    except KernelError as error:
        remedy = "" if ops.available("reference") else f" Or, for a slower model: {NO_TORCH}"
        raise EngineError(f"{error}{remedy}") from error
    return "cpu"


def _native_runner(folder: Path, dtype: DTypeName, backend: Backend) -> ModelRunner | None:
    """The C++ step; None if this model's sizes are not for it and 'auto' may choose another."""
    try:
        return NativeRunner(folder, dtype)
    except KernelError as error:
        if backend == "cpu" or not ops.available("reference"):
            raise EngineError(f"{folder}: {error} Use backend='reference'.") from error
        warnings.warn(
            f"{folder} runs on the PyTorch reference, which is slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def check_device(device: object) -> str:
    """A device that is there: "cpu", "cuda" or "cuda:N".

    Raises:
        EngineError: it is not.
    """
    name = str(device)
    if name in ("cpu", "cpu:0"):
        return "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not index.isdecimal()):
        raise EngineError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}.")
    require_torch(f"device {name!r}")
    import torch  # deferred: the CPU does without it

    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise EngineError(
            f"device {name!r} is not there: torch {torch.__version__} sees {count} CUDA "
            f"devices. Use device='cpu', or a torch built for the driver of this machine."
        )
    return name
