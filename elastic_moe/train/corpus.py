"""The training text: the Python library that runs this program, and any folder of novels.

Held out from everything, the tokenizer included: the authors in `HELD_OUT_AUTHORS`, every file
below `pydoc_data`, whose language reference is the evaluation text, and copies of it by its name.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.errors import CorpusError

HELD_OUT_AUTHORS = ("Chesterton", "Forster", "Gissing", "Schreiner")
LEFT_OUT_OF_LIBRARY = ("pydoc_data", "idlelib", "site-packages", "dist-packages", "encodings")


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


def is_held_out(corpus: str, name: str) -> bool:
    """Whether a file may never be trained on."""
    parts = Path(name).parts
    if Path(name).stem.casefold() == "topics":  # of pydoc_data, under whatever folder it was saved
        return True
    if corpus == "novels":
        # Anywhere in the path: a folder per author and other spellings of a name must not pass.
        # A book about one of them is left out as well, which costs little.
        return any(
            author.casefold() in part.casefold() for author in HELD_OUT_AUTHORS for part in parts
        )
    return any(part in LEFT_OUT_OF_LIBRARY or part.startswith("test") for part in parts)


def library_files(root: Path | None = None) -> list[SourceFile]:
    """Sources of the standard library, sorted by name, without what is held out or is no UTF-8."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    return _files("library", root, "*.py")


def novel_files(root: Path) -> list[SourceFile]:
    """Novels in `root`, files named Author_Title_Year.txt, without the held-out authors."""
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder. Name a folder of .txt files, or leave it out.")
    return _files("novels", root, "*.txt")


def _files(corpus: str, root: Path, pattern: str) -> list[SourceFile]:
    found = []
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if is_held_out(corpus, name):
            continue
        data = path.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:  # a few library files declare another encoding
            continue
        found.append(SourceFile(corpus, name, path, hashlib.sha256(data).hexdigest(), len(data)))
    if not found:
        raise CorpusError(f"no {pattern} below {root}. Nothing to train on.")
    return found


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
