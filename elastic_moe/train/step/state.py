"""Saving and resuming a training run: a safetensors file with its plan, model and data."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic_moe.errors import TrainingError
from elastic_moe.files import replacing
from elastic_moe.model.config import ModelConfig

# 1 did not say which plan, model and data a state belongs to; plans of 2 had fewer fields.
FORMAT = 3
STATE = "state.safetensors"  # in the folder of a run
FREE = {"save_every_steps"}  # of a plan: what may change from one resume to the next


# safetensors writes to a file of its own beside the one that it is to write: '.tmp' and six letters
# or digits. A kill leaves it, as large as a state.
HALF_STATE = ".tmp" + 6 * "[0-9A-Za-z]"


def save_state(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write tensors and progress to `path`, atomically and durably.

    Raises:
        TrainingError: it cannot be written; what was there before still is.
    """
    try:
        with replacing(path) as beside:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                beside,
                metadata={"elastic_moe_training": json.dumps({"format": FORMAT, **progress})},
            )
    except (SafetensorError, OSError) as error:
        kept = "The state before it is kept" if path.exists() else "There is no state yet"
        raise TrainingError(
            f"{path} cannot be written: {error}. {kept}. Make room and see that the folder can be "
            f"written to, then repeat the command."
        ) from None


def load_state(
    path: Path, formats: Container[int] = (FORMAT,)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote, in one of `formats`.

    Raises:
        TrainingError: it cannot be read, is torn, or is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            progress = _progress(path, metadata, formats)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Put a whole copy in its place. Without it, the same "
            f"command starts at step 0."
        ) from None
    return {name: torch.as_tensor(t) for name, t in tensors.items()}, progress


def _progress(path: Path, metadata: Mapping[str, str], formats: Container[int]) -> dict[str, Any]:
    if "elastic_moe_training" not in metadata:
        raise TrainingError(f"{path} is no training state of elastic-moe.")
    progress: dict[str, Any] = json.loads(metadata["elastic_moe_training"])
    if progress.get("format") not in formats:
        raise TrainingError(
            f"{path} has training state format {progress.get('format')}, this version reads "
            f"{FORMAT}. Resume with the version that wrote it."
        )
    return progress


def model_to_json(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as JSON gives it back."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config), default=sorted))
    return data


def check_same_run(
    path: Path, progress: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare what a state was trained with (plan, model, data) with what is wanted now.

    Raises:
        TrainingError: names the first field that differs.
    """
    for part, fields in wanted.items():
        saved = progress[part]
        for field in sorted((saved.keys() | fields.keys()) - FREE):
            if saved.get(field) != fields.get(field):
                raise TrainingError(
                    f"{path} was trained with another {part}: {field} = {saved.get(field)!r}, "
                    f"got {fields.get(field)!r}. Repeat the command that started the run, or start "
                    f"another one in another folder."
                )


def check_parent(path: Path, progress: Mapping[str, Any], parent: str | None) -> None:
    """Compare the first weights of a state's run (None: random ones) with those wanted now.

    Raises:
        TrainingError: they differ.
    """
    if progress["parent"] != parent:
        saved, wanted = ("random weights" if p is None else p for p in (progress["parent"], parent))
        raise TrainingError(
            f"{path} started with {saved}, not with {wanted}. Repeat the command that started it, "
            f"or start another one in another folder."
        )


def machine_change(
    before: Mapping[str, Any], now: Mapping[str, Any], *, any_threads: bool
) -> str | None:
    """What is not as it was, if that may change the last bits of steps.

    Args:
        before, now: backend, device and threads; states of earlier versions lack some.
        any_threads: whether steps have the same bits on any number of threads.
    """
    for what in ("backend", "device"):
        if before.get(what) not in (None, now[what]):
            return (
                f"resumes with {what} {now[what]}, where it had {before[what]}: steps then differ "
                f"in their last bits from those of a run that never stopped"
            )
    if before.get("threads") in (None, now["threads"]) or any_threads:
        return None
    return (
        f"resumes with {now['threads']} threads, where it had {before['threads']}: steps in "
        f"PyTorch or with a teacher then differ in their last bits from those of a run that never "
        f"stopped"
    )
