"""The training text: the Python library that runs this program, and any folder of texts.

Of the library, the evaluation text (`pydoc_data`), tests and installed packages are left out. Of a
folder of texts, only what a `HoldOut` says.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, overload

from elastic_moe.errors import CorpusError

LIBRARY, TEXTS = "library", "texts"  # the kinds of files; manifests before had "novels" for texts
# Folders of the library; those named test* as well.
LEFT_OUT_OF_LIBRARY = ("pydoc_data", "idlelib", "site-packages", "dist-packages", "encodings")
_HEAD_BYTES = 8192
# Content is compared by windows: 50 letters and digits from each 'th' on, so that case, line ends,
# wrapping, quoting and markup make no difference.
_WINDOWS = re.compile(rb"th(?=(.{48}))", re.DOTALL)
_LOWER = bytes(range(256)).lower()
_NO_LETTERS = bytes(c for c in range(256) if not (c < 128 and chr(c).isalnum()))
_CHUNK = 1 << 20
# That many windows are some 3 kB; modules of the library that quote pydoc_data share at most 16.
_SHARED_WINDOWS, _LEAST_SHARED = 40, 8


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much of each kind of text is read, and how long the pieces are that get shuffled.

    Attributes:
        text_fraction: share of the pieces of every text.
        library_passes, docstring_passes: how many times each is read.
        chat_fraction: share of all tokens, whatever else there is; chats are made until it is met.
            They are questions about the library's docstrings, which therefore has to be there.
        piece_bytes: characters of a piece of a text.

    Raises:
        CorpusError: a value is out of its range.
    """

    text_fraction: float = 1.0
    library_passes: int = 1
    docstring_passes: int = 2
    chat_fraction: float = 0.05
    piece_bytes: int = 12_000

    def __post_init__(self) -> None:
        if not 0 < self.text_fraction <= 1:
            raise CorpusError(f"text_fraction must be in (0, 1], got {self.text_fraction}.")
        if not 0 <= self.chat_fraction < 1:
            raise CorpusError(f"chat_fraction must be in [0, 1), got {self.chat_fraction}.")
        for name in ("library_passes", "docstring_passes"):
            if getattr(self, name) < 0:
                raise CorpusError(f"{name} must be at least 0, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of training text. `name` is its path within its corpus; `sha256` of its bytes."""

    corpus: str
    name: str
    path: Path
    sha256: str
    num_bytes: int

    def read(self) -> str:
        """Its text.

        Raises:
            CorpusError: it is not what was listed.
        """
        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CorpusError(
                f"{self.path} changed while it was read. Repeat the command when nothing writes "
                f"to it."
            )
        return data.decode("utf-8", errors="strict")


@dataclass(frozen=True, slots=True)
class HoldOut:
    """Texts that are never trained on.

    Attributes:
        patterns: such as '*Forster*', letter case aside. They hold out a file whose name, or the
            name of any folder on the way to it, with links and without, is like one.
        texts: files, or folders of them. They hold out copies, and texts that contain a part of
            one (some 3 kB, or most of a shorter text): letter case, wrapping, quoting and markup
            make no difference. What modules of the Python library say as well does not count.
    """

    patterns: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()

    def holds_path(self, path: Path) -> bool:
        if not self.patterns:
            return False
        parts = {p.casefold() for way in (path.absolute(), path.resolve()) for p in way.parts}
        patterns = [pattern.casefold() for pattern in self.patterns]
        return any(fnmatchcase(part, pattern) for part in parts for pattern in patterns)

    def holds_content(self, data: bytes) -> bool:
        if not self.texts:
            return False
        sums, windows = _contents(self.files())
        if hashlib.sha256(data).hexdigest() in sums:
            return True
        shared, total = set[bytes](), 0
        for of_chunk in _windows(data):
            shared |= windows.intersection(of_chunk)
            total += len(of_chunk)
        return len(shared) > _SHARED_WINDOWS or (
            len(shared) >= _LEAST_SHARED and 2 * len(shared) > total
        )

    def files(self) -> tuple[Path, ...]:
        """The files of `texts`.

        Raises:
            CorpusError: there is none.
        """
        found: list[Path] = []
        for path in self.texts:
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files = [file for file in files if "__pycache__" not in file.parts]
            if not files:
                raise CorpusError(
                    f"{path} has no text to hold out. Name a file, or a folder of files."
                )
            found += files
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """As the manifest of prepared text has it."""
        texts = [(path.name, path.read_bytes()) for path in self.files()]
        return {
            "patterns": list(self.patterns),
            "texts": [
                {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                for name, data in texts
            ],
        }


@dataclass(frozen=True, slots=True)
class Listing(Sequence[SourceFile]):
    """The files of a folder that are read, sorted by name, and how many are not, by reason.

    A folder that is not entered counts once.

    Attributes:
        hold_out: what was held out; `held_out`: the names of the files that were, for it.
    """

    files: tuple[SourceFile, ...]
    skipped: Mapping[str, int]
    hold_out: HoldOut = HoldOut()
    held_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> SourceFile: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SourceFile, ...]: ...
    def __getitem__(self, index: int | slice) -> SourceFile | tuple[SourceFile, ...]:
        return self.files[index]

    def describe(self) -> str:
        """Such as '12 files, 3.4 MB; skipped 3: 2 held out, 1 not UTF-8'."""
        read = f"{len(self)} files, {sum(f.num_bytes for f in self) / 1e6:,.1f} MB"
        if not self.skipped:
            return read
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        return f"{read}; skipped {sum(self.skipped.values()):,}: {reasons}"


def is_left_out_of_library(name: str) -> bool:
    """Whether a file or folder of the library is not trained on, by its path within it."""
    if Path(name).stem.casefold() == "topics":  # of pydoc_data, wherever it was saved
        return True
    return any(p in LEFT_OUT_OF_LIBRARY or p.startswith("test") for p in Path(name).parts)


def library_files(root: Path | None = None) -> Listing:
    """Sources of the standard library, without evaluation text, tests and installed packages."""
    root, skipped, paths = root or _library(), Counter[str](), []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        left_out = {name for name in folders if is_left_out_of_library(str(inside / name))}
        if left_out:
            skipped["left out"] += len(left_out)
        # Most of what lies there is installed packages: thousands of files.
        folders[:] = [name for name in folders if name not in left_out]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return _list_files(LIBRARY, root, paths, skipped)


def text_files(
    root: Path,
    include: Sequence[str] = (),
    leave_out: Path | None = None,
    hold_out: HoldOut = HoldOut(),
) -> Listing:
    """Every UTF-8 text below `root`, whatever its suffix, without what is held out.

    Hidden files and folders are not looked at, nor are linked folders, those of training runs, and
    files without text: empty ones, those with a NUL byte, and what is no regular file.

    Args:
        include: patterns such as '*.md', of paths within `root`; () for all files.
        leave_out: the folder of the run itself, which may not have started yet.
        hold_out: texts that are not read; every folder on the way to `root` counts.

    Raises:
        CorpusError: `root` is no folder, or nothing in it is left to read.
    """
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder. Name a folder of texts, or leave it out.")
    skipped: Counter[str] = Counter()
    paths = []
    for path in _visible(root, skipped, leave_out):
        name = path.relative_to(root).as_posix()
        if include and not any(fnmatch(name, pattern) for pattern in include):
            skipped["not included"] += 1
        else:
            paths.append(path)
    return _list_files(TEXTS, root, paths, skipped, hold_out)


def _visible(root: Path, skipped: Counter[str], leave_out: Path | None) -> Iterator[Path]:
    def unreadable(_error: OSError) -> None:
        skipped["unreadable"] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        if hidden:
            skipped["hidden"] += len(hidden)
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(folder, name).is_symlink()]  # may be a loop
        if linked:
            skipped["linked folders"] += len(linked)
        runs = [name for name in folders if _is_run(Path(folder, name), leave_out)]
        if runs:
            skipped["training runs"] += len(runs)
        folders[:] = [name for name in folders if name not in runs]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _is_run(folder: Path, own: Path | None) -> bool:
    """Whether a folder holds a training: logs, configurations and token ids are no texts."""
    started = all((folder / name).is_file() for name in ("plan.json", "log.jsonl"))
    return started or (own is not None and folder.resolve() == own.resolve())


def _list_files(
    corpus: str,
    root: Path,
    paths: Iterable[Path],
    skipped: Counter[str],
    hold_out: HoldOut = HoldOut(),
) -> Listing:
    found: list[SourceFile] = []
    held_out: list[str] = []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        try:
            if corpus == LIBRARY and is_left_out_of_library(name):
                skipped["left out"] += 1
                continue
            if hold_out.holds_path(path):
                held_out.append(name)
                continue
            if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
                skipped["no file"] += 1
                continue
            data = _read(path)
        except (OSError, RuntimeError):  # no permission, a link to nothing or to itself
            skipped["unreadable"] += 1
            continue
        if (why_not := _why_not(data, corpus)) is not None:
            skipped[why_not] += 1
        elif hold_out.holds_content(data):
            held_out.append(name)
        else:
            sha256 = hashlib.sha256(data).hexdigest()
            found.append(SourceFile(corpus, name, path, sha256, len(data)))
    if held_out:
        skipped["held out"] = len(held_out)
    listing = Listing(tuple(found), dict(sorted(skipped.items())), hold_out, tuple(held_out))
    if not found:
        raise CorpusError(f"nothing to train on below {root}: {listing.describe()}.")
    return listing


def _read(path: Path) -> bytes:
    """A file's bytes; only the first of one that they show to be no text."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return head if b"\0" in head else head + file.read()


def _why_not(data: bytes, corpus: str) -> str | None:
    """Why a file's content is not read; None if it is. Empty ones are part of the library."""
    if b"\0" in data:
        return "binary"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:  # a few library files declare another encoding
        return "not UTF-8"
    return "empty" if corpus != LIBRARY and not data.strip() else None


def _windows(data: bytes) -> Iterator[list[bytes]]:
    """The windows of a text, chunk by chunk."""
    letters = data.translate(_LOWER, _NO_LETTERS)
    for start in range(0, len(letters), _CHUNK):
        yield _WINDOWS.findall(letters, start, start + _CHUNK + 50)


@cache
def _contents(files: tuple[Path, ...]) -> tuple[frozenset[str], frozenset[bytes]]:
    """The sha256 and the windows of files; of Python files, also those of their strings.

    Less the windows that modules of the library have as well, which are trained on: pdb's
    documentation is in pydoc_data too.
    """
    sums: set[str] = set()
    found: set[bytes] = set()
    for path in files:
        data = path.read_bytes()
        texts = [data, *(_strings(data) if path.suffix == ".py" else ())]
        found.update(window for text in texts for part in _windows(text) for window in part)
        if data:
            sums.add(hashlib.sha256(data).hexdigest())
    if found:
        for file in library_files():
            found.difference_update(*_windows(file.path.read_bytes()))
    return frozenset(sums), frozenset(found)


def _strings(source: bytes) -> Iterator[bytes]:
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return
    yield from (
        node.value.encode()
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
