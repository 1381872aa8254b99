"""The folder of a run: the options that it was started with, and the lock of its training.

The same options resume the run; others are refused by name. A folder that holds anything else is
left as it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_moe.errors import OptionError, TrainingError
from elastic_moe.files import write_text
from elastic_moe.model.checkpoints.folder import CONFIG, read_json
from elastic_moe.train.config import SHARES, TrainConfig, flag
from elastic_moe.train.step.sampling import AXES
from elastic_moe.train.step.state import STATE
from elastic_moe.train.text.prepare import MANIFEST, TOKENIZER, TOKENS

OPTIONS = "options.json"
LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
# What `options.json` of earlier versions lacks; the state and config.json are compared anyway.
_LATER = ("config", "balance", "split", *SHARES, *(f"reduce_{axis}" for axis in AXES))


def has_started(folder: Path) -> bool:
    """Whether a folder holds a run whose options or steps are on record."""
    return (folder / OPTIONS).exists() or (folder / STATE).exists()


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a run, which training would write over.

    A run that was stopped while its text was prepared may be resumed.

    Raises:
        OptionError: it does, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out {folder} is no folder. Name a new one, or that of a run.")
    if not folder.is_dir() or has_started(folder) or (folder / "data" / MANIFEST).exists():
        return
    strange = [path for path in sorted(folder.iterdir()) if not _is_leftover(path)]
    if strange:
        raise OptionError(
            f"--out {folder} holds something else than a run ({strange[0].name}), which it would "
            f"write over. Name a new folder, or that of a run."
        )


def _is_leftover(path: Path) -> bool:
    """Whether a run that was stopped before its first step may have left it."""
    if path.name == "data" and path.is_dir():
        return all(p.name in (TOKENIZER, TOKENS) or _is_half(p) for p in path.iterdir())
    return path.name == LOCK or _is_half(path)


def _is_half(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".part")


def check_config(folder: Path, raw: Mapping[str, Any] | None, option: str) -> None:
    """Refuse a configuration that the run of a folder does not have, before it is written there.

    Args:
        raw: the config.json that the run is of; None for a model of sizes.
        option: that it came from.

    Raises:
        OptionError: the run was started with another one, or without one, or with one that is not
            given now.
    """
    path = folder / CONFIG
    there = read_json(folder, CONFIG) if path.is_file() else None
    wanted = None if raw is None else json.loads(json.dumps(raw))
    if there == wanted or (there is None and not has_started(folder)):
        return
    remedy = (
        "Repeat the command that started it, or start another one in another folder with --out."
    )
    if raw is None:
        raise OptionError(
            f"{option}: {path} says what the run in {folder} trains, got none. {remedy} If it was "
            f"started without {option}, delete that file."
        )
    how = "without one" if there is None else f"with another configuration ({path})"
    raise OptionError(f"{option}: the run in {folder} was started {how}. {remedy}")


def to_record(
    config: TrainConfig,
    start: str | None,
    sizes: Mapping[str, int],
    raw: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What `options.json` keeps of a run: {option: value}, with defaults filled in.

    Texts and tokenizer are compared by their content, elsewhere. Left out is what decides no step:
    `minutes` is kept only as whether it decided how many there are.

    Args:
        start: the checkpoint that the run starts from.
        sizes: of the model, by option.
        raw: the config.json that they are from; None for a model of sizes.
    """
    staged, fixed, library = (
        config.stages is not None,
        config.fixed is not None,
        config.reads_library,
    )
    mixture = config.mixture
    return {
        "tokens": config.total_tokens,
        "batch_tokens": None if staged else config.step_tokens,
        "length": None if staged else config.sequence_tokens,
        "stages": config.stages,
        "from": start,
        "with_library": library,
        "corpus_fraction": None if config.corpus is None else mixture.text_fraction,
        "library_passes": mixture.library_passes if library else None,
        "docstring_passes": mixture.docstring_passes if library else None,
        "chat_fraction": mixture.chat_fraction if library else None,
        **{f"reduce_{axis}": None if fixed else config.chance(axis) for axis in AXES},
        **{name: None if fixed else config.share(name) for name in SHARES},
        "fixed": config.fixed,
        "sandwich": config.sandwich,
        "distill": config.distilled_share,
        "split": config.split or 0.0,
        "lr_scale": config.lr_scale,
        "bias_rate": config.bias_rate,
        "balance": config.balance,
        "seed": config.seed,
        "dtype": config.dtype,
        "config": None if config.config is None or raw is None else _config_name(raw),
        **sizes,
        "minutes": config.minutes is not None and config.total_tokens is None and not staged,
    }


def _config_name(raw: Mapping[str, Any]) -> str:
    """Such as 'olmoe sha256:0123456789ab'."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return f"{raw.get('model_type')} sha256:{digest[:12]}"


def check_recorded(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse options that the run of a folder was not started with.

    Raises:
        OptionError: names the first that differs, with both values.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        names = dict.fromkeys([*now, *recorded])
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"{path} is torn: {error}. Delete it, and only what the state says is compared."
        ) from None
    for name in names:
        if name in _LATER and name not in recorded:  # an earlier version started the run
            continue
        before, value = recorded.get(name), now.get(name)
        if name == "from" and value is not None and before == str(Path(value).resolve()):
            continue  # a path that is gone cannot be told from an id
        if before != value:
            raise OptionError(
                f"{flag(name)}: the run in {folder} was started {_started(before)}, "
                f"got {_got(value)}. "
                f"Repeat the command that started it, or start another one in "
                f"another folder with --out."
            )


def write_record(folder: Path, now: Mapping[str, Any]) -> None:
    """Write `options.json`, once for a run."""
    if not (folder / OPTIONS).exists():
        write_text(folder / OPTIONS, json.dumps(now, indent=1) + "\n")


def _started(value: Any) -> str:
    if value is None or value is False:
        return "without it"
    return "with it" if value is True else f"with {value}"


def _got(value: Any) -> str:
    if value is None or value is False:
        return "none"
    return "it" if value is True else str(value)


# --- one training at a time: two would remove each other's half-written files


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep every other training out of it.

    The lock is the system's, on a file that stays: it goes with the process, however that ends.

    Raises:
        TrainingError: a training holds it, this process's included, or the file system has no
            locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refusal(folder, error, os.pread(descriptor, 32, 0)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(descriptor)


def _refusal(folder: Path, error: OSError, holder: bytes) -> TrainingError:
    if error.errno not in _TAKEN:
        return TrainingError(
            f"{folder / LOCK} cannot be locked: {error.strerror}. Name a folder on a file system "
            f"that has locks."
        )
    who = f", process {holder.decode().strip()}" if holder.strip().isdigit() else ""
    return TrainingError(
        f"a training is running in {folder}{who}. Wait for its end or stop it, or name another "
        f"folder."
    )
