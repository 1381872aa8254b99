"""Checkpoint folders: config.json, safetensors and tokenizer.json as transformers writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic_moe.errors import CheckpointError
from elastic_moe.files import replacing
from elastic_moe.model.config import ModelConfig, read_config
from elastic_moe.model.transformer import ElasticTransformer

DTypeName = Literal["auto", "float32", "bfloat16"]
BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
WEIGHTS = "model.safetensors"
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def find_checkpoint(model: str | Path) -> Path:
    """The folder of a bundled model's name or of a path.

    Raises:
        CheckpointError: neither; lists what is bundled.
    """
    bundled = BUNDLED / str(model)
    folder = bundled if bundled.parent == BUNDLED and bundled.is_dir() else Path(model)
    if not (folder / "config.json").is_file():
        names = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
        raise CheckpointError(
            f"no checkpoint at {str(model)!r}: give a folder with config.json and {WEIGHTS}, "
            f"or a bundled model: {', '.join(names) or 'none is bundled'}."
        )
    return folder


def load_config(folder: Path) -> ModelConfig:
    """Read and check config.json."""
    return read_config(_read_json(folder / "config.json"), str(folder / "config.json"))


def load_model(
    folder: Path, *, dtype: DTypeName = "auto", device: torch.device | str = "cpu"
) -> ElasticTransformer:
    """Load a checkpoint folder into the reference model, ready for inference.

    Args:
        dtype: what matrix inputs, keys and values are rounded to: 'bfloat16', 'float32' (not
            rounded), or 'auto', the dtype of the file (float32 unless it is bf16). Weights are
            held in float32 either way.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshaped or not finite.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = ElasticTransformer(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    path = folder / WEIGHTS
    with _open(path) as file:
        stored = set(file.keys())
        stored_dtype = torch.float32
        for name, shape in expected.items():
            parts = _stored_names(name, config)
            missing = [part for part in parts if part not in stored]
            if missing:
                raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing.")
            stacked = name.endswith(_EXPERT_PARTS)
            tensors = [file.get_tensor(part) for part in parts]
            stored_dtype = tensors[0].dtype
            stored.difference_update(parts)
            for part, tensor in zip(parts, tensors, strict=True):
                wanted = shape[1:] if stacked else shape
                if tuple(tensor.shape) != wanted:
                    raise CheckpointError(
                        f"{path}: tensor {part!r} has shape {tuple(tensor.shape)}, "
                        f"config.json asks for {wanted}."
                    )
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{path}: tensor {part!r} holds NaN or infinite values.")
            whole = torch.stack(tensors) if stacked else tensors[0]
            state[name] = whole.to(device=device, dtype=torch.float32)
    stored.discard("lm_head.weight" if config.tied_embeddings else "")
    if stored:
        raise CheckpointError(
            f"{path}: {len(stored)} tensors that the model has no place for, such as "
            f"{min(stored)!r}. The file belongs to another architecture or configuration."
        )
    model.load_state_dict(state, assign=True)
    rounded = stored_dtype == torch.bfloat16 if dtype == "auto" else dtype == "bfloat16"
    model.set_input_dtype(torch.bfloat16 if rounded else None)
    return model.requires_grad_(False).eval()


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json and model.safetensors; each appears whole or not at all.

    Args:
        weights: parameters of an `ElasticTransformer`, by name.
        config: the config.json to write; read back first, so that only a valid one is written.
    """
    parsed = read_config(config, str(folder / "config.json"))
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        parts = _stored_names(name, parsed)
        stored = weight.detach().to(dtype)
        pieces = stored.unbind(0) if name.endswith(_EXPERT_PARTS) else [stored]
        # A clone each: safetensors refuses tensors that share storage.
        tensors.update(
            {part: piece.clone().contiguous() for part, piece in zip(parts, pieces, strict=True)}
        )
    with replacing(folder / WEIGHTS) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    with replacing(folder / "config.json") as beside:
        beside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_names(name: str, config: ModelConfig) -> list[str]:
    """Tensor names in a Hugging Face file that make up one of our parameters."""
    if name.endswith(_EXPERT_PARTS):
        prefix, part = name.rsplit(".", 1)
        return [f"model.{prefix}.{e}.{part}.weight" for e in range(config.num_experts)]
    return [name if name.startswith("lm_head.") else f"model.{name}"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; what the library raises becomes a `CheckpointError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
