"""Writing checkpoint folders: safetensors tensor by tensor, in shards where there is much."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from elastic_moe_kernels.arrays import BITS, Array, array, dtype_name, to_dtype
from numpy.typing import NDArray

from elastic_moe.errors import CheckpointError
from elastic_moe.files import replacing, write_text
from elastic_moe.model.checkpoints.folder import CONFIG
from elastic_moe.model.checkpoints.weights import DTYPES, INDEX, WEIGHTS
from elastic_moe.model.families import EXPERT_PARTS, FAMILIES, Source, read_config

MAX_SHARD_BYTES = 5 << 30
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to write; `read` makes its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * BITS[self.dtype].itemsize


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights of a model; each file appears whole or not at all.

    Args:
        weights: parameters of an `ElasticTransformer`, by name; arrays of any kind.
        config: the config.json to write; read back first, so that only a valid one is written.
        max_shard_bytes: weights beyond it are written as several files.
    """
    parsed = read_config(config, str(folder / CONFIG))
    family = FAMILIES[parsed.model_type]
    items: list[Item] = []
    dtype = dtype_name(dtype)
    for name, weight in weights.items():
        stored = to_dtype(array(weight), dtype)
        sources = next(family.sources(parsed, name, tuple(weight.shape)))
        stacked = name.endswith(EXPERT_PARTS)
        for source, part in zip(sources, stored if stacked else [stored], strict=True):
            items.append(Item(source.tensor, source.shape, dtype, _shaped(part, source)))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, items, max_shard_bytes)
    write_config_json(folder, config)


def write_config_json(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, whole or not at all."""
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    folder: Path, items: Iterable[Item], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write tensors as `model.safetensors`, or as shards with an index where they exceed one.

    One tensor is in memory at a time. Returns the names of the files of weights.
    """
    shards = _share_out(sorted(items, key=lambda item: item.name), max_shard_bytes)
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0])
        return [WEIGHTS]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(item.nbytes for shard in shards for item in shard)},
        "weight_map": {
            item.name: name for name, shard in zip(names, shards, strict=True) for item in shard
        },
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def write_file(path: Path, items: Iterable[Item]) -> None:
    """Write one safetensors file; it appears whole or not at all."""
    # By falling item size, as the format's library does, so that every tensor is aligned.
    ordered = sorted(items, key=lambda item: (-BITS[item.dtype].itemsize, item.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in ordered:
        header[item.name] = {
            "dtype": _NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in ordered:
            values = np.ascontiguousarray(item.read())
            if values.dtype != BITS[item.dtype] or values.shape != item.shape:
                raise CheckpointError(
                    f"{path}: tensor {item.name!r} should be {item.dtype} {item.shape}, "
                    f"got {dtype_name(values.dtype)} {values.shape}."
                )
            file.write(values.reshape(-1).view(np.uint8).data)


def _share_out(items: list[Item], limit: int) -> list[list[Item]]:
    """Consecutive shards of at most `limit` bytes; a larger tensor has one of its own."""
    shards: list[list[Item]] = [[]]
    used = 0
    for item in items:
        if shards[-1] and used + item.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.nbytes
    return shards


def _shaped(part: NDArray[Any], source: Source) -> Callable[[], NDArray[Any]]:
    return lambda: part.reshape(source.shape)
