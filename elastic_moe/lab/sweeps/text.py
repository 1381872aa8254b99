"""Evaluation texts, and the windows in which the model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.errors import CorpusError
from elastic_moe.model.text.tokenizer import Tokenizer

WINDOW = 512
STRIDE = 256


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text to evaluate on; results state its name and SHA-256."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def language_reference() -> Corpus:
    """The language reference of the running Python, topics in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python comes without pydoc_data.topics, the default evaluation text. "
            "Name a text of your own with --text FILE."
        ) from None
    return Corpus("python-language-reference", "\n\n".join(topics[name] for name in sorted(topics)))


def read_corpus(path: Path) -> Corpus:
    """Read a UTF-8 text file. Raises: CorpusError: it is missing or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}. Convert it first.") from error
    return Corpus(path.name, text)


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of text that the model reads at once.

    Attributes:
        inputs: token ids that go in, BOS first where the model has one.
        targets: the id that each position has to predict.
        first_scored: positions before this one only serve as context.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    first_scored: int

    @property
    def scored(self) -> int:
        return len(self.targets) - self.first_scored


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Windows over the beginning of a corpus, and the tokens and bytes that they score."""

    corpus: Corpus
    windows: tuple[Window, ...]
    scored_tokens: int
    scored_bytes: int
    bos: str

    def describe(self) -> dict[str, Any]:
        """The `corpus` entry of `sweep.json`."""
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "num_bytes": len(self.corpus.text.encode()),
            "scored_tokens": self.scored_tokens,
            "scored_bytes": self.scored_bytes,
            "window": WINDOW,
            "stride": STRIDE,
            "bos": self.bos,
        }

    def batches(self, size: int) -> Iterator[tuple[Window, ...]]:
        for start in range(0, len(self.windows), size):
            yield self.windows[start : start + size]


def evaluation_set(corpus: Corpus, tokenizer: Tokenizer, max_tokens: int) -> EvaluationSet:
    """Whole windows over at most `max_tokens` tokens from the start of the corpus.

    The first window scores all its predictions, each later one the second half of its own, so that
    every token is scored once, with at least 256 tokens of context after the first window. Where
    the tokenizer puts a BOS token before a text, every window begins with it.

    Raises:
        CorpusError: the text is shorter than one window.
    """
    encoding = tokenizer.fast.encode(corpus.text, add_special_tokens=False)
    ids: list[int] = encoding.ids
    count = min(len(ids), max_tokens)
    if count < WINDOW:
        raise CorpusError(
            f"{corpus.name} gives {count} tokens, one window needs {WINDOW}. "
            f"Use a longer text or a larger --tokens."
        )
    bos = list(tokenizer.prefix[:1])
    windows = []
    for start in range(0, count - WINDOW + 1, STRIDE):
        text = ids[start : start + WINDOW]
        targets = text[1 - len(bos) :]
        first = 0 if start == 0 else STRIDE - (WINDOW - len(targets))
        windows.append(Window((*bos, *text[:-1]), tuple(targets), first))
    first_token = 1 - len(bos)
    last_token = STRIDE * (len(windows) - 1) + WINDOW  # one past the last that is scored
    span = corpus.text[encoding.offsets[first_token][0] : encoding.offsets[last_token - 1][1]]
    return EvaluationSet(
        corpus=corpus,
        windows=tuple(windows),
        scored_tokens=sum(window.scored for window in windows),
        scored_bytes=len(span.encode()),
        bos="every window begins with BOS" if bos else "none",
    )
