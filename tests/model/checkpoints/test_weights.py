"""The safetensors reader: a file that is not exactly what its header says is refused by name."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_moe_kernels import arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.weights import (
    INDEX,
    MAX_HEADER_BYTES,
    WEIGHTS,
    TensorFiles,
    read_header,
)
from tests.model.time_limit import interrupted_after

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def file_of(header: dict[str, Any] | str, data: bytes | int = 32) -> bytes:
    """A safetensors file; data is its bytes, or how many zeros."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(data) if isinstance(data, int) else data)


def with_a(**changes: Any) -> dict[str, Any]:
    """`GOOD` with other fields of its tensor a; None takes a field away."""
    changed = {key: value for key, value in {**GOOD["a"], **changes}.items() if value is not None}
    return {**GOOD, "a": changed}


def test_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(file_of(GOOD))
    assert {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }


# Values


NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def values_of(folder: Path, name: str) -> Tensor:
    with TensorFiles(folder).mapped(name) as values:
        return arrays.tensor(values.copy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_values_are_those_that_the_formats_own_library_wrote(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    want = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("x", "y", "z")}
    save_file(want, tmp_path / WEIGHTS)
    for name, tensor in want.items():
        got = values_of(tmp_path, name)
        assert got.dtype == dtype
        assert torch.equal(got, tensor)


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_need_not_be_aligned(dtype: torch.dtype, padding: int, tmp_path: Path) -> None:
    want = torch.arange(6).to(dtype)
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header = {"x": {"dtype": name, "shape": [6], "data_offsets": [0, want.nbytes]}}
    data = want.view(torch.uint8).numpy().tobytes()
    (tmp_path / WEIGHTS).write_bytes(file_of(json.dumps(header) + " " * padding, data))
    assert torch.equal(values_of(tmp_path, "x"), want)


def test_tensor_behind_several_pages_is_read(tmp_path: Path) -> None:
    want = {"long": torch.arange(5000).float(), "tail": torch.arange(3).bfloat16()}
    save_file(want, tmp_path / WEIGHTS)
    for name, tensor in want.items():
        assert torch.equal(values_of(tmp_path, name), tensor)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 2)], ids=str)
def test_tensor_without_values_is_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"none": torch.empty(shape), "x": torch.ones(2)}, tmp_path / WEIGHTS)
    assert values_of(tmp_path, "none").shape == shape
    assert values_of(tmp_path, "x").tolist() == [1, 1]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 6, 11])
def test_values_that_are_no_numbers_are_named(
    place: int, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    bad = torch.ones(3, 4).to(dtype)
    bad.view(-1)[place] = value
    save_file({"bad": bad, "good": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="tensor 'bad' holds NaN or infinite values"):
        values_of(tmp_path, "bad")
    assert values_of(tmp_path, "good").tolist() == [1]


def test_largest_numbers_are_numbers(tmp_path: Path) -> None:
    save_file({str(d): Tensor([torch.finfo(d).max]).to(d) for d in DTYPES}, tmp_path / WEIGHTS)
    for dtype in DTYPES:
        assert math.isfinite(values_of(tmp_path, str(dtype)).item())


@pytest.mark.parametrize(
    ("name", "size"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("I32", 4), ("I8", 1), ("U8", 1), ("F64", 8)],
)
def test_dtype_that_holds_no_weights_is_named(name: str, size: int, tmp_path: Path) -> None:
    header = {"x": {"dtype": name, "shape": [4], "data_offsets": [0, 4 * size]}}
    (tmp_path / WEIGHTS).write_bytes(file_of(header, 4 * size))
    with pytest.raises(CheckpointError, match=f"'x' has dtype {name}, supported are F32, F16, BF"):
        values_of(tmp_path, "x")


# Files that are not what they say


HUGE = 1 << 47
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
ITEM = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes, a header has at least 8"),
    "cut-in-the-length": (file_of(GOOD)[:7], "it has 7 bytes, a header has at least 8"),
    "cut-in-the-header": (file_of(GOOD)[:60], "its header claims .* the file has 52 after"),
    "cut-in-the-data": (file_of(GOOD, 31), "tensor 'b' ends at byte .* It was cut off"),
    "no-data": (file_of(GOOD, 0), "It was cut off"),
    "header-longer-than-allowed": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        "its header claims 16,777,217 bytes",
    ),
    "header-as-long-as-can-be": (b"\xff" * 8 + b"{}", "claims 18,446,744,073,709,551,615 bytes"),
    "header-empty": (file_of(""), "Expecting value"),
    "header-no-json": (file_of('{"a": '), "Expecting value"),
    "header-no-utf8": (b"\x03" + bytes(7) + b'"\xff"', "codec can't decode"),
    "header-a-list": (file_of("[]", 0), "its header is no JSON object"),
    "header-a-number": (file_of("7", 0), "its header is no JSON object"),
    "header-nested-deeply": (file_of(DEEP), "recursion"),
    "overlap": (
        file_of({**GOOD, "b": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]}}),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "same-bytes-twice": (file_of({**GOOD, "c": GOOD["a"]}), "tensor 'c' overlaps tensor 'a'"),
    "gap": (
        file_of({**GOOD, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [28, 32]}}),
        "tensor 'b' leaves a gap after tensor 'a'",
    ),
    "gap-at-the-start": (
        file_of({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}),
        "tensor 'b' leaves a gap after the header",
    ),
    "bytes-that-follow": (file_of(GOOD, 33), "1 bytes follow tensor 'b'"),
    "bytes-that-follow-no-tensor": (file_of({}, 5), "5 bytes follow the header"),
    "name-twice": (file_of(f'{{"a":{ITEM},"a":{ITEM}}}', 4), "'a' appears twice"),
    "field-twice": (
        file_of('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4),
        "'dtype' appears twice",
    ),
    "entry-no-object": (file_of({**GOOD, "a": [0, 24]}), "'a' must have dtype, shape and data_off"),
    "dtype-missing": (file_of(with_a(dtype=None)), "'a' must have dtype, shape and data_offsets"),
    "field-too-many": (file_of(with_a(strides=[3, 1])), "'a' must have dtype, shape and data_off"),
    "dtype-unknown": (file_of(with_a(dtype="F31")), "'a' has the unknown dtype 'F31'"),
    "dtype-no-text": (file_of(with_a(dtype=["F32"])), "'a' has the unknown dtype"),
    "dtype-too-small": (file_of(with_a(dtype="F16")), "takes 12 bytes, its data_offsets span 24"),
    "dtype-too-large": (file_of(with_a(dtype="F64")), "takes 48 bytes, its data_offsets span 24"),
    "shape-too-small": (file_of(with_a(shape=[2, 2])), "takes 16 bytes, its data_offsets span 24"),
    "shape-too-large": (file_of(with_a(shape=[2, 4])), "takes 32 bytes, its data_offsets span 24"),
    "shape-negative": (file_of(with_a(shape=[-2, -3])), "'a' must have a shape of at most 8 sizes"),
    "shape-of-fractions": (file_of(with_a(shape=[2.0, 3])), "'a' must have a shape of at most 8"),
    "shape-of-flags": (file_of(with_a(shape=[True, 6])), "'a' must have a shape of at most 8"),
    "shape-a-number": (file_of(with_a(shape=6)), "'a' must have a shape of at most 8 sizes"),
    "shape-huge": (file_of(with_a(shape=[1 << 64])), "'a' must have a shape of at most 8 sizes"),
    "shape-whose-product-is-huge": (file_of(with_a(shape=[HUGE] * 8)), "'a' of shape .* takes"),
    "shape-that-wraps-to-the-right-size": (
        file_of(with_a(shape=[1 << 32, 1 << 32, 6])),
        "its data_offsets span 24",
    ),
    "shape-of-many-sizes": (file_of(with_a(shape=[2, 3] + [1] * 7)), "at most 8 sizes"),
    "offsets-descend": (file_of(with_a(data_offsets=[24, 0])), "'a' must have two ascending"),
    "offsets-negative": (file_of(with_a(data_offsets=[-24, 0])), "'a' must have two ascending"),
    "offsets-of-fractions": (file_of(with_a(data_offsets=[0, 24.0])), "two ascending"),
    "offsets-too-many": (file_of(with_a(data_offsets=[0, 12, 24])), "two ascending"),
    "offsets-no-numbers": (file_of(with_a(data_offsets=["0", "24"])), "two ascending"),
    "offsets-huge": (file_of(with_a(data_offsets=[0, 10**30])), "two ascending"),
    "offsets-shifted": (file_of(with_a(data_offsets=[8, 32])), "leaves a gap|overlaps"),
    "offsets-behind-the-end": (
        file_of({"a": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}),
        "tensor 'a' ends at byte .* It was cut off",
    ),
    "numbers-of-many-digits": (
        file_of('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', 4),
        "digits",
    ),
}


@pytest.mark.parametrize(("content", "message"), CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_file_is_named_with_what_is_wrong(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFiles(tmp_path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    assert len(str(caught.value)) < len(str(path)) + 400


def test_header_of_the_longest_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    text = json.dumps(GOOD)
    path.write_bytes(file_of(text + " " * (MAX_HEADER_BYTES - len(text))))
    assert read_header(path).keys() == {"a", "b"}


def test_header_that_claims_terabytes_allocates_none(tmp_path: Path) -> None:
    """A sparse file with room for a header of 1 TiB is refused before it is read."""
    path = tmp_path / WEIGHTS
    path.write_bytes((1 << 40).to_bytes(8, "little"))
    os.truncate(path, 1 << 41)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="its header claims 1,099,511,627,776 bytes"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_every_cut_of_a_good_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    whole = file_of(GOOD)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


# Shards


def shard(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Tensors x and y in 1.safetensors, z in 2.safetensors."""
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, tmp_path / "1.safetensors")
    save_file({"z": torch.ones(4)}, tmp_path / "2.safetensors")
    shard(tmp_path, {"x": "1.safetensors", "y": "1.safetensors", "z": "2.safetensors"})
    return tmp_path


def test_shards_are_read(shards: Path) -> None:
    files = TensorFiles(shards)
    assert files.nbytes == 4 * (2 + 3 + 4)
    assert {name: entry.path.name for name, entry in files.entries.items()} == {
        "x": "1.safetensors",
        "y": "1.safetensors",
        "z": "2.safetensors",
    }


def test_one_whole_file_goes_before_an_index(shards: Path) -> None:
    save_file({"whole": torch.ones(1)}, shards / WEIGHTS)
    assert TensorFiles(shards).entries.keys() == {"whole"}


ONE, TWO = "1.safetensors", "2.safetensors"
WRONG_INDEX: dict[str, tuple[Any, str]] = {
    "shard-missing": ({"x": ONE, "y": ONE, "z": "3.safetensors"}, r"3\.safetensors cannot be read"),
    "tensor-missing": ({"x": ONE, "y": ONE, "z": TWO, "w": TWO}, "2.*: tensor 'w' is missing"),
    "tensor-in-the-wrong-shard": (
        {"x": ONE, "y": TWO, "z": TWO},
        rf"1\.safetensors: tensor 'y' is here, but {INDEX} expects it in 2\.safetensors",
    ),
    "tensor-not-listed": ({"x": ONE, "z": TWO}, "'y' is here, .* expects it in no file"),
    "no-map": (None, "weight_map must give a file name per tensor"),
    "map-a-list": ([ONE, TWO], "weight_map must give a file name per tensor"),
    "shard-no-text": ({"x": ONE, "y": 1, "z": TWO}, "weight_map must give a file name per tensor"),
    "nothing": ({}, "tensor 'z' is missing"),
}


@pytest.mark.parametrize(("weight_map", "message"), WRONG_INDEX.values(), ids=WRONG_INDEX.keys())
def test_wrong_index_is_named(weight_map: Any, message: str, shards: Path) -> None:
    shard(shards, weight_map)
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(shards).entry("z")


def test_shard_that_is_cut_off_is_named(shards: Path) -> None:
    os.truncate(shards / TWO, (shards / TWO).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"2\.safetensors cannot be read: tensor 'z' ends at"):
        TensorFiles(shards)


# What lies where the weights should


def pickled(folder: Path, name: str) -> None:
    torch.save({"a": torch.ones(2)}, folder / name)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "model.safetensors cannot be read"),
    "folder": (lambda f: (f / WEIGHTS).mkdir(), "it is no regular file"),
    "pipe": (lambda f: os.mkfifo(f / WEIGHTS), "it is no regular file"),
    "pickle-of-that-name": (lambda f: pickled(f, WEIGHTS), "its header claims"),
    **{
        name: (
            lambda f, name=name: pickled(f, name),
            f"{WEIGHTS}, but {name}: pickled weights .* Convert them to safetensors",
        )
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt")
    },
}


@pytest.mark.parametrize(("make", "message"), PLACES.values(), ids=PLACES.keys())
def test_what_is_no_file_of_weights_is_refused(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with interrupted_after(5), pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)


def test_pickle_beside_good_weights_is_left_alone(tmp_path: Path) -> None:
    pickled(tmp_path, "optimizer.pt")
    save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS)
    assert torch.equal(values_of(tmp_path, "a"), load_file(tmp_path / WEIGHTS)["a"])
