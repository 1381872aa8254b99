"""From text to token files: the tokenizer, the mixed stream, and batches of it.

A prepared folder holds `tokenizer.json`, `train.npy` (uint16, one long stream) and
`manifest.json`, which lists every file that was read with its sha256.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from elastic_moe.errors import CorpusError
from elastic_moe.train.corpus import Docstring, SourceFile, chat_turn, docstrings

BOS, END, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    BOS,
    END,
    PAD,
    IM_START,
    IM_END,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    *(f"<|reserved_{i}|>" for i in range(16)),
)
# Words with their leading space, runs of up to three digits, punctuation, line ends, indentation.
SPLIT = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text round-trips; ids of `SPECIAL_TOKENS` come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = special_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many times each kind of text is read, and how long the pieces are that get shuffled."""

    novel_fraction: float = 0.25
    library_passes: int = 1
    docstring_passes: int = 2
    chat_passes: int = 1
    piece_bytes: int = 12_000


def documents(
    library: list[SourceFile], novels: list[SourceFile], mixture: Mixture, seed: int
) -> Iterator[tuple[str, str]]:
    """(kind, text) of every document in a seeded order; a piece of a novel is a document."""
    rng = random.Random(seed)
    pieces: list[tuple[str, str]] = []
    known: list[Docstring] = []
    for source in library:
        pieces += [("library", source.read())] * mixture.library_passes
        found = list(docstrings(source))
        known += found
        prose = "\n\n".join(f"{d.name}\n\n{d.text}" for d in found)
        if len(prose) > 200:
            pieces += [("docstrings", prose)] * mixture.docstring_passes
    for _ in range(mixture.chat_passes):
        for docstring in known:
            turn = chat_turn(docstring, rng)
            if turn is not None:
                pieces.append(("chat", chat_text(*turn)))
    for novel in novels:
        text = novel.read()
        for start in range(0, len(text), mixture.piece_bytes):
            if rng.random() < mixture.novel_fraction:
                pieces.append(("novels", text[start : start + mixture.piece_bytes]))
    rng.shuffle(pieces)
    yield from pieces


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        CorpusError: the tokenizer lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CorpusError(f"the tokenizer has no token {token!r}. Train one with this package.")
    return found


def chat_text(question: str, answer: str) -> str:
    """One exchange as the chat template writes it, without the final end-of-document token."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"


def prepare(
    folder: Path,
    library: list[SourceFile],
    novels: list[SourceFile],
    mixture: Mixture,
    *,
    vocab_size: int = 4096,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> dict[str, object]:
    """Write tokenizer, stream and manifest to `folder`; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        sample = (
            text
            for kind, text in documents(library, novels, mixture, seed)
            if kind in ("library", "docstrings") or hash_fraction(text) < 0.25
        )
        tokenizer = train_tokenizer(sample, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = special_id(tokenizer, END)
    parts: list[np.ndarray] = []
    counts: dict[str, int] = {}
    batch: list[tuple[str, str]] = []

    def flush() -> None:
        encodings = tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False)
        for (kind, _), encoding in zip(batch, encodings, strict=True):
            ids = np.array([*encoding.ids, end], dtype=np.uint16)
            counts[kind] = counts.get(kind, 0) + len(ids)
            parts.append(ids)
        batch.clear()

    for document in documents(library, novels, mixture, seed):
        batch.append(document)
        if len(batch) == 512:
            flush()
    flush()
    stream = np.concatenate(parts)
    np.save(folder / "train.npy", stream)
    manifest: dict[str, object] = {
        "seed": seed,
        "mixture": asdict(mixture),
        "stream_tokens": len(stream),
        "stream_tokens_by_kind": counts,
        "files": [
            {"corpus": f.corpus, "name": f.name, "sha256": f.sha256, "bytes": f.num_bytes}
            for f in [*library, *novels]
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, to draw the same sample every time."""
    import zlib

    return zlib.crc32(text.encode()) / 2**32


class TokenStream:
    """Batches of fixed pieces of a token stream, each epoch in its own seeded order.

    Position is one number: pieces consumed. A piece is `piece_tokens` inputs; sequences shorter
    than a piece are its consecutive parts. Every sequence starts with BOS, then predicts
    its own tokens: inputs are BOS, t0 .. t(n-2), targets t0 .. t(n-1).
    """

    def __init__(self, tokens: np.ndarray, bos: int, seed: int, piece_tokens: int = 512) -> None:
        self.tokens = tokens
        self.bos = bos
        self.seed = seed
        self.piece_tokens = piece_tokens
        self.pieces_per_epoch = len(tokens) // piece_tokens
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def batch(
        self, first_piece: int, num_pieces: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (num_pieces * piece_tokens / length, length)."""
        targets = np.stack([self._piece(first_piece + i) for i in range(num_pieces)])
        targets = targets.reshape(-1, length).astype(np.int64)
        inputs = np.concatenate(
            [np.full((len(targets), 1), self.bos, dtype=np.int64), targets[:, :-1]], axis=1
        )
        return inputs, targets

    def _piece(self, index: int) -> np.ndarray:
        epoch, within = divmod(index, self.pieces_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(
                self.pieces_per_epoch
            )
            self._epoch = epoch
        start = int(self._order[within]) * self.piece_tokens
        return self.tokens[start : start + self.piece_tokens]
