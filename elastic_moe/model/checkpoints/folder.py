"""A checkpoint folder: finding it, and opening its files without ever leaving it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from elastic_moe.errors import CheckpointError

BUNDLED = Path(__file__).resolve().parents[2] / "bundled"
CONFIG, MANIFEST = "config.json", "manifest.json"
MAX_JSON_BYTES = 16 << 20  # of a configuration or an index; the largest seen are under 4 MiB

# What a download fetches. Nothing that is code, nothing that is pickled.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_checkpoint(model: str | Path, *, download: bool = False) -> Path:
    """The folder of a bundled model's name, of a path, or of a Hugging Face id in the local cache.

    Args:
        download: fetch an id that the cache lacks. Otherwise nothing leaves the machine.

    Raises:
        CheckpointError: none of these; lists what is bundled.
    """
    text = str(model)
    bundled = BUNDLED / text
    folder, why_not = Path(model), ""
    try:
        if bundled.parent == BUNDLED and bundled.is_dir():
            folder = bundled
        elif not folder.exists() and _HUB_ID.fullmatch(text):
            cached, why_not = _from_hub(text, download)
            folder = cached or folder
        found = (folder / CONFIG).is_file()
    except OSError as error:  # the name is too long, or a folder on the way may not be entered
        found, why_not = False, f" {error}."
    if not found:
        names = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"no checkpoint at {text!r}: give a folder with {CONFIG} and safetensors, an id such "
            f"as 'org/name' that is in the Hugging Face cache, or a bundled model: "
            f"{', '.join(names) or 'none is bundled'}.{why_not}"
        )
    return folder


def _from_hub(repo_id: str, download: bool) -> tuple[Path | None, str]:
    """The snapshot of a Hugging Face id, or None and the reason."""
    from huggingface_hub import snapshot_download  # deferred: folders need no hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(repo_id, local_files_only=not download, allow_patterns=_WANTED)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if download:
            return None, f" {repo_id!r} could not be fetched: {error}."
        return None, f" {repo_id!r} is not in the cache; fetch it with --download."
    return Path(path), ""


def checkpoint_name(folder: Path) -> str:
    """What to call a checkpoint: its id if it lies in the Hugging Face cache, else its folder.

    The `checkpoint` that training writes into the folder of a run is called as the run is.
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    resolved = folder.resolve()
    own = resolved.name != "checkpoint"
    return resolved.name if own else resolved.parent.name or resolved.name


def file_in(folder: Path, name: str) -> Path:
    """The regular file `name` of a checkpoint folder.

    A link may point elsewhere in the folder, or into the blobs of its Hugging Face cache.

    Raises:
        CheckpointError: the name has a directory in it, or the file is missing, leads out of the
            folder, or is no regular file.
    """
    path = folder / name
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{folder}: file name {name[:200]!r} is not allowed. Checkpoints name files of their "
            f"own folder only."
        )
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
        regular = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a loop of links; ValueError: a lone surrogate, which no file's name has.
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint folder, to {real}. "
            f"Copy the file into the folder."
        )
    if not regular:
        raise CheckpointError(f"{path} cannot be read: it is no regular file.")
    return path


def read_text(folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> str:
    """A UTF-8 text file of the folder.

    Raises:
        CheckpointError: as `file_in`; or the file is too large, or not UTF-8.
    """
    path = file_in(folder, name)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(
                f"{path} cannot be read: it has {size:,} bytes, at most {max_bytes:,} are allowed."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        CheckpointError: as `read_text`; or the text is no JSON object.
    """
    text = read_text(folder, name)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{folder / name} must hold a JSON object, got {type(data).__name__}."
        )
    return data


def read_json_if_there(folder: Path, name: str) -> dict[str, Any]:
    """As `read_json`; {} where the folder has no such file."""
    return read_json(folder, name) if (folder / name).exists() else {}


def read_training_manifest(folder: Path) -> dict[str, Any]:
    """How a checkpoint was trained, as `elastic-moe train` writes it; {} where there is no record.

    Other tools may call anything a manifest, in whatever form.
    """
    try:
        manifest = read_json_if_there(folder, MANIFEST)
    except CheckpointError:
        return {}
    return manifest if is_training_manifest(manifest) else {}


def is_training_manifest(manifest: Any) -> bool:
    """Whether the manifest records a corpus and a training."""
    return isinstance(manifest, dict) and {"corpus", "training"} <= manifest.keys()
