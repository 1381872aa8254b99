"""Chats about the Python library's docstrings: questions from templates, docstrings as answers."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from elastic_moe.errors import CorpusError
from elastic_moe.train.text.corpus import SourceFile
from elastic_moe.train.text.tokens import SPECIAL_TOKENS, chat_text


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


def chats(known: Sequence[Docstring], seed: int) -> Iterator[str]:
    """Chat turns without end: pass after pass over the docstrings, each with its own questions.

    Docstrings with a special token in them are left out: it would be read as one.

    Raises:
        CorpusError: no docstring makes one.
    """
    rng = random.Random(f"{seed}/chat")
    while True:
        made = (chat_turn(docstring, rng) for docstring in known)
        turns = [turn for turn in made if turn is not None and not _has_special_token(turn)]
        if not turns:
            raise CorpusError("no docstring is fit for a chat turn. Set chat_fraction to 0.")
        rng.shuffle(turns)
        yield from (chat_text(*turn) for turn in turns)


def _has_special_token(parts: Iterable[str]) -> bool:
    return any(token in part for part in parts for token in SPECIAL_TOKENS)
