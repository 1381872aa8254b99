"""Reading safetensors: headers are checked whole before anything is allocated, data is mapped.

Our own reader rather than the library's, because messages must name the tensor that is wrong,
headers must be bounded, and the pages of a tensor must leave memory as soon as it was copied:
loading then peaks at the model plus one tensor.

Format: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, data.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from elastic_moe_kernels.arrays import BITS
from elastic_moe_kernels.packing import all_finite
from numpy.typing import NDArray

from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.folder import file_in, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20  # over 100,000 tensors
MAX_DIMENSIONS = 8

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Dtypes of the format that hold no weights which we can run.
_OTHER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_OTHER_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes [begin, end) of `path`, counted from the file's start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles:
    """The tensors of a checkpoint folder, in one safetensors file or in shards with an index.

    Attributes:
        path: the file to blame: the weights, or the index of the shards.
        entries: every tensor by name.

    Raises:
        CheckpointError: a file is missing, leads out of the folder, or its header does not describe
            exactly the bytes that it has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._finite: set[str] = set()  # names of tensors that were looked through
        if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
            self.path = folder / WEIGHTS
            _refuse_pickle(folder)
            self.shards = [WEIGHTS]
            self.entries = read_header(file_in(folder, WEIGHTS))
            return
        self.path = folder / INDEX
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise CheckpointError(f"{self.path}: weight_map must give a file name per tensor.")
        self.shards = sorted(set(weight_map.values()))
        for shard in self.shards:
            for name, entry in read_header(file_in(folder, shard)).items():
                if weight_map.get(name) != shard:
                    where = weight_map.get(name, "no file")
                    raise CheckpointError(
                        f"{folder / shard}: tensor {name!r} is here, but {INDEX} expects it in "
                        f"{where}."
                    )
                self.entries[name] = entry
        for name, shard in weight_map.items():
            if name not in self.entries:
                raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing.")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, all files together."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """Where a tensor lies; raises `CheckpointError` where there is none of that name."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing.")
        return self.entries[name]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor's values, by name: "bfloat16".

        Raises:
            CheckpointError: there is no such tensor, or it holds no floating-point weights.
        """
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} has dtype {entry.dtype}, supported are "
                f"{', '.join(DTYPES)}. Quantised checkpoints must be converted first."
            )
        return DTYPES[entry.dtype]

    @contextmanager
    def mapped(self, name: str) -> Iterator[NDArray[Any]]:
        """The values of a tensor, mapped from its file; they must not be used after the block.

        bfloat16 comes as its bits, see `elastic_moe_kernels.arrays`.

        Raises:
            CheckpointError: as `dtype`, or a value is NaN or infinite.
        """
        dtype, entry = self.dtype(name), self.entry(name)
        if entry.begin == entry.end:
            yield np.empty(entry.shape, BITS[dtype])
            return
        page = mmap.ALLOCATIONGRANULARITY
        start = entry.begin // page * page
        with entry.path.open("rb") as file:
            length = entry.end - start
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        buffer: Any = memoryview(pages)[entry.begin - start :]
        if entry.begin % BITS[dtype].itemsize:
            buffer = bytes(buffer)  # the format does not promise alignment
        flat = np.frombuffer(buffer, BITS[dtype])
        if name not in self._finite and not all_finite(flat, dtype):
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} holds NaN or infinite values. "
                f"Fetch or convert the file again."
            )
        self._finite.add(name)
        yield flat.reshape(entry.shape)
        # The mapping ends with the last reference to `values`; its pages leave memory with it.

    def sha256(self) -> str:
        """SHA-256 of the file of weights; of shards, that of their names and their SHA-256."""
        digests = {shard: file_sha256(self.folder / shard) for shard in self.shards}
        if self.shards == [WEIGHTS]:
            return digests[WEIGHTS]
        lines = "".join(f"{shard} {digest}\n" for shard, digest in digests.items())
        return hashlib.sha256(lines.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: the header is too long, no JSON of the format, or its tensors do not cover
            the data exactly: one is cut off, overlaps another, or leaves a gap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            _require(size >= 8, path, f"it has {size} bytes, a header has at least 8")
            _require(
                length <= min(MAX_HEADER_BYTES, size - 8),
                path,
                f"its header claims {length:,} bytes, the file has {size - 8:,} after the length "
                f"and {MAX_HEADER_BYTES:,} are allowed",
            )
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    _require(isinstance(header, dict), path, "its header is no JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, item, start) for name, item in header.items()}
    position, before = start, "the header"
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for name, entry in ordered:
        if entry.begin != position:
            how = "overlaps" if entry.begin < position else "leaves a gap after"
            raise CheckpointError(f"{path} cannot be read: tensor {name[:200]!r} {how} {before}.")
        if entry.end > size:
            raise CheckpointError(
                f"{path} cannot be read: tensor {name[:200]!r} ends at byte {entry.end:,}, but the "
                f"file has {size:,}. It was cut off; fetch it again."
            )
        position, before = entry.end, f"tensor {name[:200]!r}"
    _require(position == size, path, f"{size - position:,} bytes follow {before}")
    return dict(ordered)


def _entry(path: Path, name: str, item: Any, start: int) -> Entry:
    """One entry of a header, its offsets counted from the file's start."""
    where = f"tensor {name[:200]!r}"
    _require(
        isinstance(item, dict) and item.keys() == {"dtype", "shape", "data_offsets"},
        path,
        f"{where} must have dtype, shape and data_offsets",
    )
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    itemsize = BITS[DTYPES[dtype]].itemsize if _is_in(dtype, DTYPES) else None
    itemsize = _OTHER_BYTES[dtype] if _is_in(dtype, _OTHER_BYTES) else itemsize
    _require(itemsize is not None, path, f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    _require(
        _are_sizes(shape) and len(shape) <= MAX_DIMENSIONS,
        path,
        f"{where} must have a shape of at most {MAX_DIMENSIONS} sizes",
    )
    _require(
        _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
        path,
        f"{where} must have two ascending data_offsets",
    )
    wanted = math.prod(shape) * (itemsize or 0)
    _require(
        offsets[1] - offsets[0] == wanted,
        path,
        f"{where} of shape {tuple(shape)} in {dtype} takes {wanted:,} bytes, its data_offsets "
        f"span {offsets[1] - offsets[0]:,}",
    )
    return Entry(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_in(value: Any, table: dict[str, Any]) -> bool:
    return isinstance(value, str) and value in table


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name[:200]!r} appears twice")
        table[name] = value
    return table


def _require(condition: bool, path: Path, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"{path} cannot be read: {problem}.")


def _refuse_pickle(folder: Path) -> None:
    """Weights that only unpickling could read are refused by name."""
    if (folder / WEIGHTS).exists():
        return
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} has no {WEIGHTS}, but {path.name}: pickled weights can run code and are "
                f"never loaded. Convert them to safetensors."
            )
