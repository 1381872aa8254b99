"""Loading a checkpoint folder into the reference model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from elastic_moe_kernels.arrays import tensor
from torch import Tensor

from elastic_moe.model.checkpoints.checkpoint import (
    Checkpoint,
    DTypeName,
    Progress,
    is_rounded,
    is_small,
)
from elastic_moe.model.reference.transformer import ElasticTransformer


def load_model(
    folder: Path,
    *,
    dtype: DTypeName = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = None,
) -> ElasticTransformer:
    """Load a checkpoint folder into the reference model, ready for inference.

    Matrices keep the dtype of the file, so that memory holds the model once; what is small (norms,
    routers, biases) is widened to float32.

    Args:
        dtype: what matrix inputs, keys and values are rounded to: 'bfloat16', 'float32' (not
            rounded), or 'auto', the dtype of the file (float32 unless it is bf16). Under
            'bfloat16' the matrices of another file are rounded to bf16 as well.
        progress: called with (parameters read, all) as loading goes on.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshaped or not finite.
    """
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = ElasticTransformer(checkpoint.config)
    rounded = is_rounded(checkpoint, dtype)
    state: dict[str, Tensor] = {}
    for name in _in_order_of_files(checkpoint):
        kept = "bfloat16" if rounded else None
        wanted = "float32" if is_small(name, checkpoint.shapes[name]) else kept
        state[name] = tensor(checkpoint.read(name, wanted), device)
        if progress is not None:
            progress(len(state), len(checkpoint.shapes))
    model.load_state_dict(state, assign=True)
    model.set_input_dtype(torch.bfloat16 if rounded else None)
    return model.requires_grad_(False).eval()


def _in_order_of_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of all parameters, in the order in which their first tensors lie on the disk."""
    place = {name: i for i, name in enumerate(checkpoint.files.entries)}
    yield from sorted(checkpoint.shapes, key=lambda n: place[checkpoint.sources(n)[0].tensor])
