"""From files to the folder that training reads: tokenizer.json, train.npy, manifest.json.

The manifest is written last and names what the others hold, so a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from elastic_moe.errors import CorpusError
from elastic_moe.files import replacing, write_text
from elastic_moe.train.corpus import Docstring, SourceFile, chat_turn, docstrings
from elastic_moe.train.tokens import (
    BOS,
    END,
    TokenStream,
    chat_text,
    check_tokenizer,
    special_id,
    train_tokenizer,
)

MANIFEST, TOKENS, TOKENIZER = "manifest.json", "train.npy", "tokenizer.json"
_KEYS = ("seed", "files", "stream_tokens", "stream_sha256", "tokenizer_sha256", "tokenizer_given")
_BATCH = 512  # documents that are encoded at a time


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much of each kind of text is read, and how long the pieces are that get shuffled.

    Attributes:
        novel_fraction: share of the pieces of every novel.
        library_passes, docstring_passes: how many times each is read.
        chat_fraction: share of all tokens, whatever else there is; chats are made until it is met.
        piece_bytes: characters of a piece of a novel.
    """

    novel_fraction: float = 0.25
    library_passes: int = 1
    docstring_passes: int = 2
    chat_fraction: float = 0.05
    piece_bytes: int = 12_000

    def __post_init__(self) -> None:
        if not 0 <= self.chat_fraction < 1:
            raise CorpusError(f"chat_fraction must be in [0, 1), got {self.chat_fraction}.")


def documents(
    library: list[SourceFile], novels: list[SourceFile], mixture: Mixture, seed: int
) -> tuple[list[tuple[str, str]], list[Docstring]]:
    """(kind, text) of every document but chats, and the docstrings that chats can be about."""
    rng = random.Random(seed)
    texts: list[tuple[str, str]] = []
    known: list[Docstring] = []
    for source in library:
        texts += [("library", source.read())] * mixture.library_passes
        found = list(docstrings(source))
        known += found
        prose = "\n\n".join(f"{d.name}\n\n{d.text}" for d in found)
        if len(prose) > 200:
            texts += [("docstrings", prose)] * mixture.docstring_passes
    for novel in novels:
        text = novel.read()
        for start in range(0, len(text), mixture.piece_bytes):
            if rng.random() < mixture.novel_fraction:
                texts.append(("novels", text[start : start + mixture.piece_bytes]))
    return texts, known


def chats(known: Sequence[Docstring], seed: int) -> Iterator[str]:
    """Chat turns without end: pass after pass over the docstrings, each with its own questions.

    Raises:
        CorpusError: no docstring makes one.
    """
    rng = random.Random(f"{seed}/chat")
    while True:
        turns = [turn for docstring in known if (turn := chat_turn(docstring, rng)) is not None]
        if not turns:
            raise CorpusError("no docstring is fit for a chat turn. Set chat_fraction to 0.")
        rng.shuffle(turns)
        yield from (chat_text(*turn) for turn in turns)


def prepare(
    folder: Path,
    library: list[SourceFile],
    novels: list[SourceFile],
    mixture: Mixture,
    *,
    vocab_size: int = 4096,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write tokenizer, stream and manifest to `folder`; returns the manifest."""
    given = tokenizer is not None
    texts, known = documents(library, novels, mixture, seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(_sample(texts, known, mixture, seed), vocab_size)
    check_tokenizer(tokenizer, vocab_size)
    encoded: list[tuple[str, np.ndarray]] = []
    for kind in ("library", "docstrings", "novels"):
        of_kind = (text for one, text in texts if one == kind)
        encoded += [(kind, ids) for ids in _encode(tokenizer, of_kind)]
    total = sum(len(ids) for _, ids in encoded)
    missing = round(total * mixture.chat_fraction / (1 - mixture.chat_fraction))
    if missing:
        for ids in _encode(tokenizer, chats(known, seed)):
            encoded.append(("chat", ids))
            missing -= len(ids)
            if missing <= 0:
                break
    random.Random(f"{seed}/order").shuffle(encoded)
    counts: dict[str, int] = {}
    for kind, ids in encoded:
        counts[kind] = counts.get(kind, 0) + len(ids)
    stream = np.concatenate([ids for _, ids in encoded])
    manifest: dict[str, Any] = {
        "seed": seed,
        "mixture": asdict(mixture),
        "stream_tokens": len(stream),
        "stream_tokens_by_kind": dict(sorted(counts.items())),
        "stream_sha256": hashlib.sha256(stream.data).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "tokenizer_given": given,
        "files": [
            {"corpus": f.corpus, "name": f.name, "sha256": f.sha256, "bytes": f.num_bytes}
            for f in [*library, *novels]
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
    with replacing(folder / TOKENS) as beside, beside.open("wb") as file:
        np.save(file, stream)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _sample(
    texts: list[tuple[str, str]], known: list[Docstring], mixture: Mixture, seed: int
) -> Iterator[str]:
    """What the tokenizer learns from: the library, and a quarter of novels and chats."""
    for kind, text in texts:
        if kind != "novels" or hash_fraction(text) < 0.25:
            yield text
    if mixture.chat_fraction:
        yield from islice(chats(known, seed), len(known) // 4)


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text, and the token that ends a document."""
    end = special_id(tokenizer, END)
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, end], dtype=np.uint16)


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, to draw the same sample every time."""
    return zlib.crc32(text.encode()) / 2**32


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Of what it does, not of how its file is laid out."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


# --- reading what was prepared


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a prepared folder, and the sha256 of its file.

    Raises:
        CorpusError: it is torn, or of another version.
    """
    path = folder / MANIFEST
    data = path.read_bytes()
    remedy = f"Delete {folder} to have the text prepared again."
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise CorpusError(f"{path} is torn: {error}. {remedy}") from None
    missing = [key for key in _KEYS if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise CorpusError(f"{path} lacks {missing[0]!r}: another version wrote it. {remedy}")
    return manifest, hashlib.sha256(data).hexdigest()


def check_options(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    seed: int,
    novels: Sequence[SourceFile],
    tokenizer: Tokenizer | None,
) -> None:
    """Refuse options that the prepared folder was not made with, rather than ignore them.

    Raises:
        CorpusError: names the option, what the folder has and what was asked for.
    """
    own = "one trained on the text"
    had = {f["name"]: f["sha256"] for f in manifest["files"] if f["corpus"] == "novels"}
    got = {f.name: f.sha256 for f in novels}
    changed = sorted(name for name in had | got if had.get(name) != got.get(name))
    first = f" (the first that differs: {changed[0]})" if changed else ""
    same_tokenizer = manifest["tokenizer_given"] == (tokenizer is not None) and (
        tokenizer is None or manifest["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    )
    options = (
        ("--seed", seed == manifest["seed"], str(manifest["seed"]), str(seed)),
        ("--novels", not changed, f"{len(had)} novels", f"{len(got)} novels{first}"),
        (
            "--tokenizer",
            same_tokenizer,
            "a given one" if manifest["tokenizer_given"] else own,
            "another one" if tokenizer is not None else own,
        ),
    )
    for option, same, before, now in options:
        if not same:
            raise CorpusError(
                f"{option}: {folder} was prepared with {before}, got {now}. "
                f"Repeat the command that began the run, or name another folder with --out."
            )


def open_stream(folder: Path, seed: int) -> TokenStream:
    """The tokens of a prepared folder, in the order of a seed.

    Raises:
        CorpusError: the files are not those that the manifest names.
    """
    manifest, source = read_manifest(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokens = np.load(folder / TOKENS, mmap_mode="r")
    found = {
        "stream_sha256": hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    for key, value in found.items():
        if manifest[key] != value:
            raise CorpusError(
                f"{folder}: {key} is {value}, the manifest says {manifest[key]}. "
                f"Delete the folder to have the text prepared again."
            )
    return TokenStream(tokens, special_id(tokenizer, BOS), seed, source=source)
