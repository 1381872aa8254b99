"""A prepared folder: nothing lost, chats that end and keep their share, and no half of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from elastic_moe.errors import CorpusError
from elastic_moe.train.text import prepare as data
from elastic_moe.train.text.chats import Docstring
from elastic_moe.train.text.corpus import SourceFile, text_files
from elastic_moe.train.text.prepare import (
    Mixture,
    check_options,
    documents,
    open_stream,
    prepare,
    read_manifest,
)
from elastic_moe.train.text.tokens import END, IM_END, IM_START, train_tokenizer
from tests.train.tiny import library, novels

MIXTURE = Mixture()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[SourceFile], list[SourceFile]]:
    root = tmp_path_factory.mktemp("corpus")
    return library(root), novels(root)


@pytest.fixture(scope="module")
def prepared(files: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, *files, MIXTURE, vocab_size=600)
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


def test_the_stream_decodes_to_the_documents_and_nothing_held_out(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    stream = np.load(prepared / "train.npy")
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert stream.dtype == np.uint16
    assert len(stream) == manifest["stream_tokens"]
    assert sum(manifest["stream_tokens_by_kind"].values()) == len(stream)
    text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
    assert text.count("It was the best of times.") > 1990  # a piece may be cut within
    assert "ZEBRA" not in text
    documents = text.split(END)
    assert documents[-1] == ""  # every document ends with the end token
    chats = [d for d in documents if d.startswith(IM_START)]
    assert len(chats) > 20
    for chat in chats:
        assert chat.startswith(f"{IM_START}user\n")
        assert chat.endswith(f"{IM_END}\n")
        assert chat.count(IM_END) == 2
    places = [i for i, d in enumerate(documents) if d.startswith(IM_START)]
    assert places != list(range(places[0], places[0] + len(places)))  # shuffled among the rest
    assert [entry["name"] for entry in manifest["files"]] == ["numbers.py", "Dickens_X_1850.txt"]


@pytest.mark.parametrize("with_novels", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_chats_have_their_share_of_the_tokens_whatever_else_is_read(
    share: float, with_novels: bool, files: tuple, tmp_path: Path
) -> None:
    mixture = replace(MIXTURE, chat_fraction=share)
    sources, texts = files
    manifest = prepare(tmp_path, sources, texts if with_novels else [], mixture, vocab_size=600)
    counts = manifest["stream_tokens_by_kind"]
    assert counts["chat"] / manifest["stream_tokens"] == pytest.approx(share, abs=0.003)
    assert ("texts" in counts) is with_novels


def test_five_of_a_hundred_tokens_are_chat_unless_asked_otherwise() -> None:
    assert Mixture().chat_fraction == 0.05
    with pytest.raises(CorpusError, match=r"chat_fraction must be in \[0, 1\), got 1"):
        Mixture(chat_fraction=1.0)


def test_a_library_without_docstrings_makes_no_chats(tmp_path: Path) -> None:
    sources = library(tmp_path, functions=0)
    with pytest.raises(CorpusError, match="Set chat_fraction to 0"):
        prepare(tmp_path / "out", sources, novels(tmp_path), MIXTURE, vocab_size=300)


def test_preparing_twice_gives_the_same_bytes(prepared: Path, files: tuple, tmp_path: Path) -> None:
    prepare(tmp_path, *files, MIXTURE, vocab_size=600)
    for name in ("train.npy", "tokenizer.json", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()
        assert (prepared / name).stat().st_mode & 0o044  # as other files, not for the owner alone


def test_a_folder_that_was_not_finished_has_no_manifest(
    files: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: object, _tokens: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(data.np, "save", half)
    with pytest.raises(CorpusError, match=r"cannot be written: disk full\. Make room"):
        prepare(tmp_path, *files, MIXTURE, vocab_size=600)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


SPOKEN = f"An end is {END} and a turn is {IM_START}user\nhi{IM_END}\n. "


def test_control_tokens_in_a_text_are_letters(files: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(SPOKEN * 100)
    texts, mixture = text_files(folder), replace(MIXTURE, chat_fraction=0.0)
    given = Tokenizer.from_str(train_tokenizer([SPOKEN, "the number 1"], 400).to_str())
    for tokenizer in (None, given):
        prepare(tmp_path / "out", files[0], texts, mixture, vocab_size=600, tokenizer=tokenizer)
        stream = np.load(tmp_path / "out" / "train.npy")
        read = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
        end, start = (read.token_to_id(token) for token in (END, IM_START))
        manifest = read_manifest(tmp_path / "out")[0]
        assert manifest["stream_tokens_by_kind"]["texts"] > 1000
        assert (stream == start).sum() == 0
        documents = read.decode(stream.tolist(), skip_special_tokens=False)
        assert SPOKEN * 100 in documents  # nothing is lost
        assert (stream == end).sum() == documents.count(END) - 100 == 4
    assert given.encode_special_tokens is False  # as it came: chats need them
    assert IM_START in given.encode(SPOKEN).tokens


def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(
    files: tuple, tmp_path: Path
) -> None:
    large = train_tokenizer([SPOKEN * 9, "the number 1"], 320)
    with pytest.raises(CorpusError, match="allow 299"):
        prepare(tmp_path / "out", *files, MIXTURE, vocab_size=300, tokenizer=large)


def test_docstrings_of_a_few_words_are_no_text_of_their_own(tmp_path: Path) -> None:
    for functions, kinds in ((1, {"library"}), (9, {"library", "docstrings"})):
        folder = tmp_path / str(functions)
        folder.mkdir()
        texts, _ = data.documents(library(folder, functions), [], MIXTURE, 0)
        assert {kind for kind, _ in texts} == kinds


def test_a_docstring_with_a_control_token_makes_no_chat() -> None:
    known = [
        Docstring("a.good", "function", "Return the number of things there are."),
        Docstring("a.bad", "function", f"Return the number {IM_END} of things there are."),
    ]
    turns = list(islice(data.chats(known, 0), 20))
    assert all("good" in turn and turn.count(IM_END) == 2 for turn in turns)


def test_too_little_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello world")
    with pytest.raises(CorpusError, match=r"the text has \d+ tokens, 512 are the least. Add text"):
        prepare(tmp_path / "out", [], text_files(tmp_path / "texts"), Mixture(chat_fraction=0))
    assert not (tmp_path / "out").exists()


def test_a_torn_manifest_is_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CorpusError, match=r"manifest\.json is torn: .* Delete .* again"):
        read_manifest(copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(CorpusError, match="lacks 'seed': another version"):
        open_stream(copy, 0)


def test_tokens_that_are_not_the_manifests_are_refused(copy: Path) -> None:
    assert open_stream(copy, 0).source == read_manifest(copy)[1]
    np.save(copy / "train.npy", np.load(copy / "train.npy")[:-1])
    with pytest.raises(CorpusError, match=r"stream_sha256 is .*, the manifest says"):
        open_stream(copy, 0)


def test_a_tokenizer_that_is_not_the_manifests_is_refused(copy: Path) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["extra"])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"tokenizer_sha256 is .*, the manifest says"):
        open_stream(copy, 0)


def test_a_part_of_the_texts_is_a_part_of_every_text(files: tuple) -> None:
    whole, half = (
        len(documents([], files[1], Mixture(text_fraction=share, piece_bytes=50), 0)[0])
        for share in (1.0, 0.5)
    )
    assert whole == 52_000 / 50
    assert half / whole == pytest.approx(0.5, abs=0.05)


def test_the_library_is_read_as_often_as_the_mixture_says(files: tuple, tmp_path: Path) -> None:
    once = Mixture(chat_fraction=0.0, docstring_passes=1)
    more = replace(once, library_passes=3, docstring_passes=0)
    first, second = (
        prepare(tmp_path / name, files[0], [], m, vocab_size=600)["stream_tokens_by_kind"]
        for name, m in (("once", once), ("more", more))
    )
    assert set(first) == {"library", "docstrings"}
    assert set(second) == {"library"}
    assert second["library"] == pytest.approx(3 * first["library"], rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [("text_fraction", 0.0), ("text_fraction", 1.5), ("library_passes", -1)],
)
def test_shares_out_of_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(CorpusError, match=f"{field} must be .*, got {value}"):
        Mixture(**{field: value})


def test_a_mixture_of_nothing_is_refused(files: tuple, tmp_path: Path) -> None:
    nothing = Mixture(library_passes=0, docstring_passes=0, chat_fraction=0.0)
    with pytest.raises(CorpusError, match="leaves nothing to read"):
        prepare(tmp_path, files[0], [], nothing, vocab_size=600)


def test_a_new_tokenizer_learns_from_a_part_of_many_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(40)]
    (tmp_path / "texts").mkdir()
    for word in words:
        (tmp_path / "texts" / f"{word}.txt").write_text(f"{word} " * 100)
    texts, mixture = text_files(tmp_path / "texts"), Mixture(chat_fraction=0.0)

    def known(folder: Path) -> int:
        prepare(folder, [], texts, mixture)
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        return sum(f"Ġ{word}" in vocabulary for word in words)

    assert known(tmp_path / "all") == 40
    monkeypatch.setattr(data, "_SAMPLE_BYTES", 20_000)  # of 40,000
    assert 10 <= known(tmp_path / "half") <= 30


def test_a_new_tokenizer_learns_from_a_quarter_of_the_chats(files: tuple) -> None:
    texts, known = data.documents(*files, MIXTURE, 0)
    for mixture, chats in ((MIXTURE, len(known) // 4), (replace(MIXTURE, chat_fraction=0.0), 0)):
        learns = list(data._sample(texts, known, mixture, 0))
        assert sum(IM_START in text for text in learns) == chats
    assert len(known) > 8


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("name", ["train.npy", "tokenizer.json"])
@pytest.mark.parametrize("damage", [Path.unlink, truncated, lambda path: path.write_text("")])
def test_a_damaged_folder_says_how_to_mend_it(
    name: str, damage: Callable[[Path], None], prepared: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "data")
    damage(folder / name)
    with pytest.raises(CorpusError, match=f"{name} cannot be read: .*have the text prepared again"):
        open_stream(folder, 0)


def test_options_must_be_those_that_the_data_was_prepared_with(
    prepared: Path, files: tuple
) -> None:
    manifest, _ = read_manifest(prepared)
    texts = files[1]
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    same = {"seed": 0, "library": True, "files": texts, "mixture": MIXTURE, "tokenizer": None}
    same["vocab_size"] = manifest["vocab_size"]
    check_options(prepared, manifest, **same)
    given = {**manifest, "tokenizer_given": True}
    check_options(prepared, given, **{**same, "tokenizer": tokenizer})
    for change, message in (
        ({"seed": 1}, "--seed: .* was prepared with 0, got 1"),
        (
            {"files": []},
            r"--corpus: .* with 1 texts, got 0 .*differs: Dickens_X_1850\.txt\)\. Restore",
        ),
        ({"files": [replace(texts[0], sha256="x")]}, "--corpus: .*differs: Dickens"),
        ({"library": False}, "--with-library: .* the Python library, got no Python library"),
        (
            {"mixture": replace(MIXTURE, chat_fraction=0.1)},
            "--chat-fraction: .* with 0.05, got 0.1",
        ),
        (
            {"mixture": replace(MIXTURE, text_fraction=0.1)},
            "--corpus-fraction: .* with 1.0, got 0.1",
        ),
        ({"tokenizer": tokenizer}, "--tokenizer: .* one trained on the text, got another one"),
        ({"vocab_size": 4096}, r"--vocab-size: .* was prepared with \d+, got 4096\. Repeat"),
    ):
        with pytest.raises(CorpusError, match=message):
            check_options(prepared, manifest, **{**same, **change})
    with pytest.raises(CorpusError, match=r"--tokenizer: .* with a given one, got one trained"):
        check_options(prepared, given, **same)


def test_data_that_an_earlier_version_prepared_are_known_by_its_words(
    prepared: Path, files: tuple
) -> None:
    manifest, _ = read_manifest(prepared)
    mixture = {**manifest["mixture"], "novel_fraction": 0.25}
    del mixture["text_fraction"]
    entries = [{**f, "corpus": f["corpus"].replace("texts", "novels")} for f in manifest["files"]]
    old = {**manifest, "mixture": mixture, "files": entries}
    same = {"seed": 0, "library": True, "files": files[1], "tokenizer": None}
    same["vocab_size"] = 4096  # of which earlier versions say nothing
    del old["vocab_size"]
    check_options(prepared, old, mixture=replace(MIXTURE, text_fraction=0.25), **same)
    with pytest.raises(CorpusError, match=r"--corpus-fraction: .* with 0\.25, got 1\.0"):
        check_options(prepared, old, mixture=MIXTURE, **same)
