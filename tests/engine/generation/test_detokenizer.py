"""Text made token by token is the text made at once, and shows nothing of a stop text."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine.generation.detokenizer import Detokenizer
from elastic_moe.engine.generation.sampler import Sampler
from elastic_moe.engine.request import Request, Sequence, SequenceOutput
from elastic_moe.engine.streams import BlockingOutputs
from elastic_moe.errors import CheckpointError
from elastic_moe.model.checkpoints.folder import find_checkpoint
from elastic_moe.model.text.tokenizer import TextStream, Tokenizer
from elastic_moe.routing import Subnet
from tests.routing.shapes import MINI

TOKENIZER = Tokenizer(find_checkpoint("elastic-mini"))
A, END = TOKENIZER.encode("a!", add_special_tokens=False)  # both have a text of their own
HALF = TOKENIZER.encode("\N{SNOWMAN}", add_special_tokens=False)[:1]  # of a character


def texts(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    """The pieces, the whole, and whether it stopped."""
    detokenizer, pieces = Detokenizer(TOKENIZER, stop), []
    for count, token in enumerate(ids, 1):
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            ids = ids[:count]
            break
    pieces.append(detokenizer.finish(ids))
    return pieces, detokenizer.text, detokenizer.stopped


def test_half_a_character_becomes_a_replacement_at_the_end_alone() -> None:
    assert TOKENIZER.decode(HALF) == "\ufffd"
    whole = TOKENIZER.encode("a\N{SNOWMAN}b", add_special_tokens=False)
    pieces, text, _ = texts(whole)
    assert "".join(pieces) == text == "a\N{SNOWMAN}b"
    assert not any("\ufffd" in piece for piece in pieces)
    cut = [A, *HALF]
    assert texts(cut) == (["a", "", "\ufffd"], "a\ufffd", False)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_pieces_make_up_the_text_that_is_made_at_once(ids: list[int]) -> None:
    pieces, text, _ = texts(ids)
    at_once = Detokenizer(TOKENIZER)
    assert at_once.finish(ids) == at_once.text == TOKENIZER.decode(ids)
    assert "".join(pieces) == text == at_once.text


@given(
    st.text("ab \N{SNOWMAN}", max_size=30),
    st.lists(st.text("ab\N{SNOWMAN}", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example("aba", ["b", "aba"])
@example("aab", ["ab"])
def test_a_text_ends_before_the_stop_text_that_is_whole_first(text: str, stop: list[str]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, got, stopped = texts(ids, tuple(stop))
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(found)
    assert "".join(pieces) == got == (text[: min(found)[1]] if found else text)


def test_whoever_reads_a_text_in_pieces_or_at_once_gets_the_same(mini: Engine) -> None:
    params = SamplingParams(forced_text=[*TOKENIZER.encode("the snow"), *HALF], max_tokens=9)
    whole = mini.generate("x", None, params)
    assert whole.text == "the snow\ufffd"
    deltas = list(mini.stream("x", None, params))
    assert deltas[-1].completion is not None
    assert deltas[-1].completion.choices == whole.choices
    assert "".join(delta.text for delta in deltas) == whole.text


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_an_end_token_is_no_text_but_may_cut_a_character(stop: tuple[str, ...]) -> None:
    def write(*tokens: int) -> tuple[Sequence, list[SequenceOutput]]:
        params = SamplingParams(stop=stop, max_tokens=9)
        request = Request([A], Subnet.full(MINI), params, BlockingOutputs())
        sampler = Sampler(params, [], 0, {END}, 512)
        sequence = request.add_sequence(sampler, Detokenizer(TOKENIZER, stop), {END})
        return sequence, [sequence.append(token) for token in tokens]

    sequence, outputs = write(A, *HALF, END)
    assert [output.finish_reason for output in outputs] == [None, None, "stop"]
    assert [output.delta().text for output in outputs] == ["a", "", "\ufffd"]
    assert sequence.choice().text == "a\ufffd"
    assert sequence.choice().token_ids == (A, *HALF, END)
    assert write(A, *HALF, END)[0].choice() == sequence.choice()  # nothing was read before
    assert write(END)[1][0].delta().text == ""


def test_text_that_cannot_be_made_ends_the_request(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader gets an error, and the engine is free for others."""
    params = SamplingParams(max_tokens=500, ignore_eos=True)

    def broken(_: TextStream, token: int) -> str:
        raise CheckpointError(f"the tokenizer cannot decode token {token}.")

    with Engine.from_pretrained(tiny_folder) as engine:
        monkeypatch.setattr(TextStream, "step", broken)
        for stop in ((), ("never",)):
            stream = engine.stream([5], None, dataclasses.replace(params, stop=stop))
            with pytest.raises(CheckpointError, match="cannot decode"):
                next(stream)
            assert list(stream) == []
            until = time.monotonic() + 20
            while engine.stats().unfinished:
                assert time.monotonic() < until
        assert engine.stats().steps < 400
        monkeypatch.undo()
        engine.check_integrity()
        assert len(engine.generate([5], None, params).token_ids) == 500
