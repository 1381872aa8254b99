"""Token streams: nothing lost, chat turns that end, batches that depend on their number alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from elastic_moe.train.corpus import library_files, novel_files
from elastic_moe.train.tokens import (
    END,
    IM_END,
    IM_START,
    Mixture,
    TokenStream,
    prepare,
    special_id,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "novels").mkdir()
    (root / "novels" / "Dickens_X_1850.txt").write_text("It was the best of times. " * 2000)
    (root / "novels" / "Forster_Y_1905.txt").write_text("ZEBRAFORSTER " * 2000)
    (root / "library").mkdir()
    functions = "".join(
        f'def function_{n}():\n    """Return the number {n}, which is {n}."""\n    return {n}\n\n'
        for n in range(300)
    )
    (root / "library" / "numbers.py").write_text(f'"""Numbers."""\n\n{functions}')
    prepare(
        root / "out",
        library_files(root / "library"),
        novel_files(root / "novels"),
        Mixture(novel_fraction=1.0),
        vocab_size=600,
    )
    return root / "out"


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
    assert len(chats) > 250
    for chat in chats:
        assert chat.startswith(f"{IM_START}user\n")
        assert chat.endswith(f"{IM_END}\n")
        assert chat.count(IM_END) == 2
    assert [entry["name"] for entry in manifest["files"]] == ["numbers.py", "Dickens_X_1850.txt"]


def test_preparing_twice_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    root = prepared.parent
    prepare(
        tmp_path,
        library_files(root / "library"),
        novel_files(root / "novels"),
        Mixture(novel_fraction=1.0),
        vocab_size=600,
    )
    for name in ("train.npy", "tokenizer.json", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()


def test_batches_cover_an_epoch_once_and_predict_the_next_token() -> None:
    tokens = np.arange(10 * 512 + 17, dtype=np.uint16)
    stream = TokenStream(tokens, bos=60000, seed=3)
    seen = []
    for first in range(0, 10, 2):
        inputs, targets = stream.batch(first, 2, 256)
        assert inputs.shape == targets.shape == (4, 256)
        assert (inputs[:, 0] == 60000).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        seen += targets.flatten().tolist()
    assert sorted(seen) == list(range(10 * 512))
    again, _ = TokenStream(tokens, bos=60000, seed=3).batch(4, 2, 256)
    assert (again == stream.batch(4, 2, 256)[0]).all()
    second_epoch = stream.batch(10, 10, 512)[1]
    assert sorted(second_epoch.flatten().tolist()) == sorted(seen)
    assert second_epoch.flatten().tolist() != seen


def test_special_tokens_have_ids(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    assert special_id(tokenizer, END) != special_id(tokenizer, IM_END)
    with pytest.raises(Exception, match="no token '<|nope|>'".replace("|", r"\|")):
        special_id(tokenizer, "<|nope|>")
