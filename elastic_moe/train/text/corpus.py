"""The training text: the Python library that runs this program, and any folder of texts.

Held out from everything, the tokenizer included: the authors in `HELD_OUT_AUTHORS`, every file
below `pydoc_data`, whose language reference is the evaluation text, and copies of it, or of a part
of it, by name or by content.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import overload

from elastic_moe.errors import CorpusError

LIBRARY, TEXTS = "library", "texts"  # the kinds of files; manifests before had "novels" for texts
HELD_OUT_AUTHORS = ("Chesterton", "Forster", "Gissing", "Schreiner")
HELD_OUT_FOLDER = "pydoc_data"
LEFT_OUT_OF_LIBRARY = ("idlelib", "site-packages", "dist-packages", "encodings")
_HEAD_BYTES = 8192
# Content is compared by windows: 50 letters and digits from each 'th' on, so that case, line ends,
# wrapping, quoting and markup make no difference.
_WINDOWS = re.compile(rb"th(?=(.{48}))", re.DOTALL)
_LOWER = bytes(range(256)).lower()
_NO_LETTERS = bytes(c for c in range(256) if not (c < 128 and chr(c).isalnum()))
_CHUNK = 1 << 20
# That many windows are some 3 kB of the evaluation text; modules that quote it share at most 16.
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
class Listing(Sequence[SourceFile]):
    """The files of a folder that are read, sorted by name, and how many are not, by reason.

    A folder that is not entered counts once.
    """

    files: tuple[SourceFile, ...]
    skipped: Mapping[str, int]

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


def is_held_out(corpus: str, name: str) -> bool:
    """Whether a file may never be trained on, by its path within its corpus."""
    parts = Path(name).parts
    if Path(name).stem.casefold() == "topics":  # of pydoc_data, under whatever folder it was saved
        return True
    if HELD_OUT_FOLDER in parts:
        return True
    if corpus == LIBRARY:
        return any(part in LEFT_OUT_OF_LIBRARY or part.startswith("test") for part in parts)
    # Anywhere in the path: a folder per author and other spellings of a name must not pass.
    # A book about one of them is left out as well, which costs little.
    return any(
        author.casefold() in part.casefold() for author in HELD_OUT_AUTHORS for part in parts
    )


def library_files(root: Path | None = None) -> Listing:
    """Sources of the standard library, without what is held out, tests and installed packages."""
    root, skipped, paths = root or _library(), Counter[str](), []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        left_out = {name for name in folders if is_held_out(LIBRARY, str(inside / name))}
        if left_out:
            skipped["left out"] += len(left_out)
        # Most of what lies there is installed packages: thousands of files.
        folders[:] = [name for name in folders if name not in left_out]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return _list_files(LIBRARY, root, paths, skipped)


def text_files(root: Path, include: Sequence[str] = (), leave_out: Path | None = None) -> Listing:
    """Every UTF-8 text below `root`, whatever its suffix, without what is held out.

    Hidden files and folders are not looked at, nor are linked folders, those of training runs, and
    files without text: empty ones, those with a NUL byte, and what is no regular file. Every
    folder on the way to `root` counts for the hold-out.

    Args:
        include: patterns such as '*.md', of paths within `root`; () for all files.
        leave_out: the folder of the run itself, which may not have begun yet.

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
    return _list_files(TEXTS, root, paths, skipped)


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
    began = all((folder / name).is_file() for name in ("plan.json", "log.jsonl"))
    return began or (own is not None and folder.resolve() == own.resolve())


def _list_files(corpus: str, root: Path, paths: Iterable[Path], skipped: Counter[str]) -> Listing:
    found = []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        try:
            if _is_held_out_at(corpus, name, path):
                skipped["left out" if corpus == LIBRARY else "held out"] += 1
                continue
            if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
                skipped["no file"] += 1
                continue
            data = _read(path)
        except (OSError, RuntimeError):  # no permission, a link to nothing or to itself
            skipped["unreadable"] += 1
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        if (why_not := _why_not(data, corpus, sha256)) is not None:
            skipped[why_not] += 1
        else:
            found.append(SourceFile(corpus, name, path, sha256, len(data)))
    listing = Listing(tuple(found), dict(sorted(skipped.items())))
    if not found:
        raise CorpusError(f"nothing to train on below {root}: {listing.describe()}.")
    return listing


def _is_held_out_at(corpus: str, name: str, path: Path) -> bool:
    """`is_held_out`, where texts are judged by the whole way to them, with links and without."""
    if corpus == LIBRARY:
        return is_held_out(corpus, name)
    return any(is_held_out(corpus, str(p)) for p in (path.absolute(), path.resolve()))


def _read(path: Path) -> bytes:
    """A file's bytes; only the first of one that they show to be no text."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return head if b"\0" in head else head + file.read()


def _why_not(data: bytes, corpus: str, sha256: str) -> str | None:
    """Why a file's content is not read; None if it is. Empty ones are part of the library."""
    if b"\0" in data:
        return "binary"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:  # a few library files declare another encoding
        return "not UTF-8"
    if corpus == LIBRARY:
        return None
    if not data.strip():
        return "empty"
    held_out = sha256 in _held_out_sums(_library()) or _has_held_out_content(data)
    return "held out" if held_out else None


def _has_held_out_content(data: bytes) -> bool:
    """Whether a text holds a part of the evaluation text, or is hardly anything else."""
    held_out, shared, windows = _held_out_windows(_library()), set[bytes](), 0
    for of_chunk in _windows(data):
        shared |= held_out.intersection(of_chunk)
        windows += len(of_chunk)
    return len(shared) > _SHARED_WINDOWS or (
        len(shared) >= _LEAST_SHARED and 2 * len(shared) > windows
    )


def _windows(data: bytes) -> Iterator[list[bytes]]:
    """The windows of a text, chunk by chunk."""
    letters = data.translate(_LOWER, _NO_LETTERS)
    for start in range(0, len(letters), _CHUNK):
        yield _WINDOWS.findall(letters, start, start + _CHUNK + 50)


@cache
def _held_out_windows(library: Path) -> frozenset[bytes]:
    """Of the evaluation text, as its file has it and as it reads; less what modules say as well.

    What they say is trained on: pdb's documentation is in both.
    """
    found: set[bytes] = set()
    for path in (library / HELD_OUT_FOLDER).rglob("*.py"):
        source = path.read_bytes()
        nodes = ast.walk(ast.parse(source))
        strings = [n.value for n in nodes if isinstance(n, ast.Constant)]
        texts = [source, *(s.encode() for s in strings if isinstance(s, str))]
        found.update(window for text in texts for part in _windows(text) for window in part)
    if found:
        for file in library_files(library):
            found.difference_update(*_windows(file.path.read_bytes()))
    return frozenset(found)


@cache
def _held_out_sums(library: Path) -> frozenset[str]:
    """Of the evaluation text as this Python has it, by whatever name a copy goes."""
    paths = (library / HELD_OUT_FOLDER).rglob("*.py")
    return frozenset(
        hashlib.sha256(data).hexdigest() for path in paths if (data := path.read_bytes())
    )


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True, slots=True)
class Docstring:
    """A documented name of the library, such as ('textwrap.dedent', 'function', text)."""

    name: str
    kind: str
    text: str


def docstrings(source: SourceFile) -> Iterator[Docstring]:
    """Docstrings of a library file: module, classes, functions, with their dotted names."""
    try:
        tree = ast.parse(source.read())
    except (SyntaxError, ValueError):  # templates and files for other versions
        return
    module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    kinds = {ast.Module: "module", ast.ClassDef: "class"}
    while pending:
        name, node = pending.pop(0)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield Docstring(name, kinds.get(type(node), "function"), inspect.cleandoc(text))
            pending += [
                (f"{name}.{child.name}", child)
                for child in ast.iter_child_nodes(node)
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            ]


QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Tell me about the {kind} {name}.",
    "What is the {kind} {name} for?",
    "Describe {name} in Python.",
    "help({name})",
    "How is {name} documented?",
)


def chat_turn(
    docstring: Docstring, rng: random.Random, longest: int = 1200
) -> tuple[str, str] | None:
    """A question about a documented name, and its answer; None where there is none to give."""
    answer = docstring.text.strip()
    if not 20 <= len(answer) <= longest:
        return None
    short = docstring.name if rng.random() < 0.5 else docstring.name.rsplit(".", 1)[-1]
    if short.startswith("_"):
        return None
    return rng.choice(QUESTIONS).format(name=short, kind=docstring.kind), answer
