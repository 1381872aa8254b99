"""The windows score every token exactly once, with the context that the design promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.engine import Engine
from elastic_moe.errors import CorpusError
from elastic_moe.lab.sweeps.text import (
    Corpus,
    EvaluationSet,
    evaluation_set,
    language_reference,
    read_corpus,
)


def scored_tokens(text: EvaluationSet) -> list[int]:
    return [token for w in text.windows for token in w.targets[w.first_scored :]]


@settings(max_examples=20, deadline=None)
@given(words=st.integers(400, 1500), limit=st.integers(512, 2000))
def test_scored_tokens_are_the_text_from_its_start_each_once(
    mini: Engine, words: int, limit: int
) -> None:
    corpus = Corpus("counting", " ".join(f"w{n}é" for n in range(words)))
    ids = mini.tokenizer.encode(corpus.text, add_special_tokens=False)
    text = evaluation_set(corpus, mini.tokenizer, limit)
    scored = scored_tokens(text)
    assert scored == ids[: len(scored)]
    assert min(len(ids), limit) - 256 < len(scored) <= min(len(ids), limit)
    assert text.scored_tokens == len(scored)
    decoded = mini.tokenizer.decode(scored)
    assert abs(text.scored_bytes - len(decoded.encode())) <= 3  # the last character may be cut
    for index, window in enumerate(text.windows):
        assert len(window.inputs) == len(window.targets) == 512
        assert window.inputs[0] == mini.tokenizer.bos_id
        assert window.inputs[1:] == window.targets[:-1]
        assert window.first_scored == (0 if index == 0 else 256)


def test_without_bos_the_first_token_is_context_only(
    mini: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus("counting", " ".join(map(str, range(900))))
    ids = mini.tokenizer.encode(corpus.text, add_special_tokens=False)
    monkeypatch.setattr(mini.tokenizer, "prefix", ())
    text = evaluation_set(corpus, mini.tokenizer, 1200)
    scored = scored_tokens(text)
    assert scored == ids[1 : 1 + len(scored)]
    assert text.bos == "none"
    assert all(w.inputs[1:] == w.targets[:-1] for w in text.windows)


def test_the_default_text_is_the_held_out_language_reference() -> None:
    corpus = language_reference()
    assert len(corpus.text) > 200_000
    assert "with" in corpus.text
    assert len(corpus.sha256) == 64


def test_a_python_without_the_reference_points_to_the_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="--text FILE"):
        language_reference()


def test_unusable_texts_are_named(mini: Engine, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"missing\.txt cannot be read"):
        read_corpus(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(CorpusError, match="is not UTF-8"):
        read_corpus(tmp_path / "latin.txt")
    with pytest.raises(CorpusError, match="gives 2 tokens, one window needs 512"):
        evaluation_set(Corpus("short", "a b"), mini.tokenizer, 10_000)
