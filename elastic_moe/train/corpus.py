"""The training text: the Python library that runs this program, and any folder of texts.

Held out from everything, the tokenizer included: the authors in `HELD_OUT_AUTHORS`, every file
below `pydoc_data`, whose language reference is the evaluation text, and copies of it by its name or
its content.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
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


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of training text. `name` is its path within its corpus; `sha256` of its bytes."""

    corpus: str
    name: str
    path: Path
    sha256: str
    num_bytes: int

    def read(self) -> str:
        return self.path.read_bytes().decode("utf-8", errors="strict")


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


def text_files(root: Path, include: Sequence[str] = ()) -> Listing:
    """Every UTF-8 text below `root`, whatever its suffix, without what is held out.

    Hidden files and folders are not looked at, nor are files without text: empty ones, and those
    with a NUL byte. The name of `root` itself counts for the hold-out.

    Args:
        include: patterns such as '*.md', of paths within `root`; () for all files.

    Raises:
        CorpusError: `root` is no folder, or nothing in it is left to read.
    """
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder. Name a folder of texts, or leave it out.")
    skipped: Counter[str] = Counter()
    paths = []
    for path in _visible(root, skipped):
        name = path.relative_to(root).as_posix()
        if include and not any(fnmatch(name, pattern) for pattern in include):
            skipped["not included"] += 1
        else:
            paths.append(path)
    return _list_files(TEXTS, root, paths, skipped)


def _visible(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        if hidden:
            skipped["hidden"] += len(hidden)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _list_files(corpus: str, root: Path, paths: Iterable[Path], skipped: Counter[str]) -> Listing:
    found = []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        # A folder `Forster/` that is named itself must not pass either.
        if is_held_out(corpus, name if corpus == LIBRARY else f"{root.resolve().name}/{name}"):
            skipped["left out" if corpus == LIBRARY else "held out"] += 1
            continue
        try:
            data = _read(path)
        except OSError:  # no permission, a link to nothing
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
    return "held out" if sha256 in _held_out_sums(_library()) else None


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
