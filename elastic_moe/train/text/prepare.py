"""From files to the folder that training reads: tokenizer.json, train.npy, manifest.json.

The manifest is written last and names what the others hold, so a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from elastic_moe.errors import CorpusError
from elastic_moe.files import replacing, write_text
from elastic_moe.train.text import PIECE_TOKENS
from elastic_moe.train.text.chats import Docstring, chats, docstrings
from elastic_moe.train.text.corpus import LIBRARY, TEXTS, HoldOut, Listing, Mixture, SourceFile
from elastic_moe.train.text.tokens import (
    BOS,
    END,
    TokenStream,
    check_tokenizer,
    special_id,
    train_tokenizer,
)

MANIFEST, TOKENS, TOKENIZER = "manifest.json", "train.npy", "tokenizer.json"
_KEYS = ("seed", "files", "stream_tokens", "stream_sha256", "tokenizer_sha256", "tokenizer_given")
_BATCH = 512  # documents that are encoded at a time
_SAMPLE_BYTES = 20_000_000  # of texts that a tokenizer learns from, which takes seconds


MIXTURE_OPTIONS = {  # field -> option of the command
    "text_fraction": "--corpus-fraction",
    "library_passes": "--library-passes",
    "docstring_passes": "--docstring-passes",
    "chat_fraction": "--chat-fraction",
}


def documents(
    library: Sequence[SourceFile], files: Sequence[SourceFile], mixture: Mixture, seed: int
) -> tuple[list[tuple[str, str]], list[Docstring]]:
    """(kind, text) of every document but chats, and the docstrings that chats can be about."""
    rng = random.Random(seed)
    texts: list[tuple[str, str]] = []
    known: list[Docstring] = []
    for source in library:
        texts += [(LIBRARY, source.read())] * mixture.library_passes
        found = list(docstrings(source))
        known += found
        prose = "\n\n".join(f"{d.name}\n\n{d.text}" for d in found)
        if len(prose) > 200:
            texts += [("docstrings", prose)] * mixture.docstring_passes
    for file in files:
        text = file.read()
        for start in range(0, len(text), mixture.piece_bytes):
            if rng.random() < mixture.text_fraction:
                texts.append((TEXTS, text[start : start + mixture.piece_bytes]))
    return texts, known


def prepare(
    folder: Path,
    library: Sequence[SourceFile],
    files: Sequence[SourceFile],
    mixture: Mixture,
    *,
    vocab_size: int = 4096,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write tokenizer, stream and manifest to `folder`; returns the manifest.

    Args:
        library: sources of the Python library, with docstrings and chats about them; may be empty.
        files: other texts; may be empty.
        vocab_size: of the model: ids of a tokenizer are below it, and a new one has as many.
        tokenizer: None trains one on the text.

    Raises:
        CorpusError: there is no text, or too little of it, or the tokenizer does not suit the
            model. Or the folder cannot be written.
    """
    given = tokenizer is not None
    texts, known = documents(library, files, mixture, seed)
    if not texts:
        raise CorpusError("the mixture leaves nothing to read. Raise its shares and passes.")
    if tokenizer is None:
        size = min(vocab_size, 2**16)  # streams are stored as uint16
        tokenizer = train_tokenizer(_sample(texts, known, mixture, seed), size)
    check_tokenizer(tokenizer, vocab_size)
    encoded: list[tuple[str, np.ndarray]] = []
    with _as_text(tokenizer):
        for kind in (LIBRARY, "docstrings", TEXTS):
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
    if len(stream) < PIECE_TOKENS:
        raise CorpusError(
            f"the text has {len(stream)} tokens, {PIECE_TOKENS} are the least. Add text, and "
            f"repeat the command."
        )
    manifest: dict[str, Any] = {
        "seed": seed,
        "vocab_size": vocab_size,
        "mixture": asdict(mixture),
        "stream_tokens": len(stream),
        "stream_tokens_by_kind": dict(sorted(counts.items())),
        "stream_sha256": hashlib.sha256(stream.data).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "tokenizer_given": given,
        "files": [
            {"corpus": f.corpus, "name": f.name, "sha256": f.sha256, "bytes": f.num_bytes}
            for f in [*library, *files]
        ],
        "held_out": _held_out(files),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
        with replacing(folder / TOKENS) as beside, beside.open("wb") as file:
            np.save(file, stream)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise CorpusError(
            f"{folder} cannot be written: {error}. Make room and see that the folder can be "
            f"written to, then repeat the command."
        ) from None
    return manifest


def _sample(
    texts: list[tuple[str, str]], known: list[Docstring], mixture: Mixture, seed: int
) -> Iterator[str]:
    """What the tokenizer learns from: the library, some of the texts, a quarter of the chats."""
    total = sum(len(text) for kind, text in texts if kind == TEXTS)
    share = _SAMPLE_BYTES / max(1, total)
    for kind, text in texts:
        if kind != TEXTS or hash_fraction(text) < share:
            yield text
    if mixture.chat_fraction:
        yield from islice(chats(known, seed), len(known) // 4)


@contextmanager
def _as_text(tokenizer: Tokenizer) -> Iterator[None]:
    """Within it the tokenizer reads '<|im_start|>' and its like as the letters that they are.

    A text may speak of them; as tokens they would end its document or begin a turn of a chat.
    """
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before


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
    library: bool,
    files: Sequence[SourceFile],
    mixture: Mixture,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> None:
    """Refuse options that the prepared folder was not made with, rather than ignore them.

    Args:
        library: whether the Python library is read.
        files: texts besides it; of a `Listing`, its hold-out is compared as well.
        vocab_size: of the model.

    Raises:
        CorpusError: names the option, what the folder has and what was asked for.
    """

    def compare(option: str, was: Any, now: Any) -> None:
        if was != now:
            raise _changed(folder, option, was, now)

    compare("--seed", manifest["seed"], seed)
    had_library = any(f["corpus"] == LIBRARY for f in manifest["files"])
    words = {True: "the Python library", False: "no Python library"}
    compare("--with-library", words[had_library], words[library])
    held_out = manifest.get("held_out")
    if held_out is not None and isinstance(files, Listing):
        asked = _held_out(files)
        compare("--hold-out", _names(held_out["patterns"]), _names(asked["patterns"]))
        compare("--hold-out-text", _names(held_out["texts"]), _names(asked["texts"]))
    _check_files(folder, manifest, files)
    given, own = manifest["tokenizer_given"], "one trained on the text"
    if given != (tokenizer is not None) or (
        tokenizer is not None and manifest["tokenizer_sha256"] != tokenizer_sha256(tokenizer)
    ):
        now = own if tokenizer is None else "another one"
        raise _changed(folder, "--tokenizer", "a given one" if given else own, now)
    if "vocab_size" in manifest:  # which earlier versions did not write
        compare("--vocab-size", manifest["vocab_size"], vocab_size)
    mixed = manifest.get("mixture", {})
    mixed = {"text_fraction": mixed.get("novel_fraction"), **mixed}  # its name before
    for field, option in MIXTURE_OPTIONS.items():
        read = files if field == "text_fraction" else library
        if read and mixed.get(field) is not None:
            compare(option, mixed[field], getattr(mixture, field))


def _check_files(folder: Path, manifest: Mapping[str, Any], files: Sequence[SourceFile]) -> None:
    had = {f["name"]: f["sha256"] for f in manifest["files"] if f["corpus"] != LIBRARY}
    got = {f.name: f.sha256 for f in files}
    if "held_out" not in manifest:  # an earlier version, which held out some files unasked
        got = {name: sha256 for name, sha256 in got.items() if name in had}
    changed = sorted(name for name in had | got if had.get(name) != got.get(name))
    if changed:
        now = f"{len(got)} texts (the first that differs: {changed[0]})"
        remedy = "Restore the texts and repeat"
        raise _changed(folder, "--corpus", f"{len(had)} texts", now, remedy)


def _changed(folder: Path, option: str, was: Any, now: Any, remedy: str = "Repeat") -> CorpusError:
    return CorpusError(
        f"{option}: {folder} was prepared with {was}, got {now}. "
        f"{remedy} the command that started the run, or name another folder with --out."
    )


def _held_out(files: Sequence[SourceFile]) -> dict[str, Any]:
    """What was asked to be held out of texts, and the files that were."""
    if not isinstance(files, Listing):
        return {**HoldOut().to_json(), "files": []}
    return {**files.hold_out.to_json(), "files": list(files.held_out)}


def _names(held_out: Sequence[Any]) -> str:
    """Of patterns, or of texts with the beginning of their sums."""
    names = (x if isinstance(x, str) else f"{x['name']} {x['sha256'][:8]}" for x in held_out)
    return ", ".join(names) or "nothing"


def open_stream(folder: Path, seed: int) -> TokenStream:
    """The tokens of a prepared folder, in the order of a seed.

    Raises:
        CorpusError: the files cannot be read, or are not those that the manifest names.
    """
    manifest, source = read_manifest(folder)
    remedy = "Delete the folder to have the text prepared again."
    try:
        tokens = np.load(folder / TOKENS, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise CorpusError(f"{folder / TOKENS} cannot be read: {error}. {remedy}") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise CorpusError(f"{folder / TOKENIZER} cannot be read: {error}. {remedy}") from None
    found = {
        "stream_sha256": hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    for key, value in found.items():
        if manifest[key] != value:
            raise CorpusError(
                f"{folder}: {key} is {value}, the manifest says {manifest[key]}. {remedy}"
            )
    return TokenStream(tokens, special_id(tokenizer, BOS), seed, source=source)
