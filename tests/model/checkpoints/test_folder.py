"""Checkpoint folders: found by path or by id without the network, and never left."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from elastic_moe.engine import Engine
from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.folder import (
    BUNDLED,
    MAX_JSON_BYTES,
    checkpoint_name,
    file_in,
    find_checkpoint,
    read_json,
)
from elastic_moe.model.checkpoints.weights import INDEX, WEIGHTS, TensorFiles
from elastic_moe.model.reference.loading import load_model
from tests.model.time_limit import interrupted_after

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No test here may open a connection; the list holds those that were tried."""
    tried: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        tried.append(address)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


def store(cache: Path, repo_id: str, files: dict[str, Path]) -> Path:
    """Put files into the cache as huggingface_hub does: blobs, links to them, a reference."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, (name, source) in enumerate(files.items()):
        blob = repository / "blobs" / f"{i:064x}"
        blob.write_bytes(source.read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


# Ids


def test_id_in_the_cache_is_found_and_runs_without_network(
    cache: Path, tiny_folder: Path, offline: list[Any]
) -> None:
    snapshot = store(cache, "org/tiny", {path.name: path for path in tiny_folder.iterdir()})
    assert find_checkpoint("org/tiny") == snapshot
    engine = Engine.from_pretrained("org/tiny")
    assert engine.name == "org/tiny"
    assert engine.generate("x = 1").token_ids
    assert engine.weights_sha256 == Engine.from_pretrained(tiny_folder).weights_sha256
    assert not offline


def test_snapshot_of_a_cache_behind_a_link_is_read(
    cache: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, "org/tiny", {path.name: path for path in tiny_folder.iterdir()})
    (tmp_path / "elsewhere").symlink_to(cache)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert load_model(find_checkpoint("org/tiny")).config.num_layers == 6


def test_missing_id_is_refused_with_the_way_to_get_it(cache: Path, offline: list[Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.from_pretrained("org/missing")
    assert "no checkpoint at 'org/missing'" in str(caught.value)
    assert "is not in the cache; fetch it with --download" in str(caught.value)
    assert "elastic-mini" in str(caught.value)
    assert not offline, "nothing is looked up unless it was asked for"
    assert not list(cache.iterdir())


def test_download_that_fails_says_so(cache: Path, offline: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="'org/missing' could not be fetched"):
        find_checkpoint("org/missing", download=True)
    assert offline, "this time the network was asked"
    assert not list(cache.rglob("*.safetensors"))


def test_download_fetches_no_code_and_no_pickles(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_checkpoint("org/new", download=True) == tiny_folder
    assert find_checkpoint("org/new") == tiny_folder
    (name, first), (_, second) = asked
    assert name == "org/new"
    assert (first["local_files_only"], second["local_files_only"]) == (False, True)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in _kinds(first))


def _kinds(options: dict[str, Any]) -> list[str]:
    patterns: list[str] = options["allow_patterns"]
    return [pattern for pattern in patterns if pattern != "LICENSE*"]


def test_folder_goes_before_an_id_of_the_same_name(
    cache: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, "org/tiny", {path.name: path for path in tiny_folder.iterdir()})
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("org/tiny") == Path("org/tiny")


NOTHING = ["", ".", "..", "/", "../bundled", "org/", "a/b/c", "org/..", "org/a--b", "-o/x"]
NOTHING += ["x" * 5000, "a/" + "b" * 200, "a\0b", "a/b\n", "org/na me", "\udcff", "\ud800/x"]
NOTHING += ["https://host/org/x"]


@pytest.mark.parametrize("name", NOTHING, ids=lambda name: ascii(name[:12]))
def test_name_of_nothing_is_refused_by_name(name: str, cache: Path, offline: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_checkpoint(name)
    assert not offline
    assert not list(cache.iterdir())


def test_bundled_model_is_found_by_its_name() -> None:
    assert find_checkpoint("elastic-mini") == BUNDLED / "elastic-mini"
    assert checkpoint_name(BUNDLED / "elastic-mini") == "elastic-mini"


def test_name_of_a_snapshot_is_its_id(cache: Path, tiny_folder: Path) -> None:
    snapshot = store(cache, "org/a-b", {"config.json": tiny_folder / "config.json"})
    assert checkpoint_name(snapshot) == "org/a-b"


def test_the_checkpoint_of_a_run_is_called_as_the_run(tmp_path: Path) -> None:
    (tmp_path / "notes-model" / "checkpoint").mkdir(parents=True)
    assert checkpoint_name(tmp_path / "notes-model" / "checkpoint") == "notes-model"
    assert checkpoint_name(tmp_path / "notes-model") == "notes-model"
    assert checkpoint_name(Path("/checkpoint")) == "checkpoint"


# Files


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, and a secret beside the folder."""
    folder = tmp_path / "checkpoint"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "config.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    return folder


ELSEWHERE = ["../secret.json", "inner/config.json", "inner/../config.json", "./config.json"]
ELSEWHERE += ["/etc/passwd", "..", ".", "", "/", "..\\secret.json", "C:\\x", "a\0b", "\ud800"]
ELSEWHERE += ["x" * 300, "inner"]


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: ascii(name[:20]))
def test_name_that_is_no_file_of_the_folder_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(CheckpointError):
        file_in(folder, name)


LINKS_OUT = {
    "relative": "../secret.json",
    "through-a-folder": "inner/../../secret.json",
    "absolute": "/etc/hostname",
    "device": "/dev/zero",
    "terminal": "/dev/stdin",
}


@pytest.mark.parametrize("target", LINKS_OUT.values(), ids=LINKS_OUT.keys())
def test_link_that_leads_out_is_refused(target: str, folder: Path) -> None:
    link(folder, "config.json", target)
    with pytest.raises(CheckpointError, match=r"leads out of|cannot be read"):
        read_json(folder, "config.json")


def test_link_within_the_folder_is_followed(folder: Path) -> None:
    link(folder, "config.json", "inner/config.json")
    assert read_json(folder, "config.json") == {}


@pytest.mark.parametrize("target", ["config.json", "nothing"], ids=["loop", "dangling"])
def test_link_to_nothing_is_refused(target: str, folder: Path) -> None:
    link(folder, "config.json", target)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(folder, "config.json")


def test_only_a_snapshot_may_link_to_blobs(folder: Path) -> None:
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    try:
        (blobs / "config").write_text('{"secret": 1}')
        link(folder, "config.json", str(blobs / "config"))
        with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
            read_json(folder, "config.json")
    finally:
        (blobs / "config").unlink()
        blobs.rmdir()


def test_snapshot_may_not_link_to_other_models(cache: Path, folder: Path) -> None:
    other = store(cache, "org/private", {"config.json": folder.parent / "secret.json"})
    snapshot = store(cache, "org/public", {})
    link(snapshot, "config.json", str((other / "config.json").resolve()))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        read_json(snapshot, "config.json")


SHARDS = {
    "parent": "../secret.safetensors",
    "absolute": "/etc/passwd",
    "inner": "inner/secret.safetensors",
    "backslash": "..\\secret.safetensors",
    "empty": "",
    "folder-above": "..",
    "lone-surrogate": "\ud800.safetensors",
    "null": "a\0.safetensors",
    "long": "a" * 5000,
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
def test_index_that_names_a_file_elsewhere_is_refused(shard: str, folder: Path) -> None:
    index = json.dumps({"weight_map": {"x": shard}})
    (folder / INDEX).write_text(index, encoding="utf-8")
    with pytest.raises(CheckpointError):
        TensorFiles(folder)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
def test_weights_that_are_a_link_out_are_refused(name: str, folder: Path) -> None:
    link(folder, name, "../secret.safetensors")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        TensorFiles(folder)


def test_absolute_link_in_an_index_is_refused(folder: Path) -> None:
    link(folder, "1.safetensors", str(folder.parent / "secret.safetensors"))
    (folder / INDEX).write_text('{"weight_map": {"x": "1.safetensors"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        TensorFiles(folder)


# JSON


def too_long(path: Path) -> None:
    path.write_text("{}")
    os.truncate(path, MAX_JSON_BYTES + 1)


ODD_JSON: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_text(""), "Expecting value"),
    "list": (lambda p: p.write_text("[]"), "must hold a JSON object, got list"),
    "no-utf8": (lambda p: p.write_bytes(b'{"a": "\xff"}'), "codec can't decode"),
    "deep": (lambda p: p.write_text("[" * 200_000), "recursion"),
    "digits": (lambda p: p.write_text('{"a": ' + "1" * 5000 + "}"), "digits"),
    "too-long": (too_long, "at most 16,777,216 are allowed"),
    "folder": (lambda p: p.mkdir(), "it is no regular file"),
    "pipe": (os.mkfifo, "it is no regular file"),
}


@pytest.mark.parametrize(("make", "message"), ODD_JSON.values(), ids=ODD_JSON.keys())
def test_odd_json_is_named(make: Callable[[Path], object], message: str, folder: Path) -> None:
    path = folder / "config.json"
    path.unlink()
    make(path)
    with interrupted_after(5), pytest.raises(CheckpointError, match=message) as caught:
        read_json(folder, "config.json")
    assert str(path) in str(caught.value)
