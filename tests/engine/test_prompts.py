"""Log-probabilities of a prompt: alone, or before the text that follows it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine.outputs import Delta
from elastic_moe.errors import RequestError

PROMPT = list(range(20, 60))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 2}], ids=len)
@pytest.mark.parametrize("n", [1, 3])
def test_no_tokens_may_be_asked_for(tiny_folder: Path, options: Any, n: int) -> None:
    params = SamplingParams(max_tokens=0, n=n, prompt_logprobs=2, logprobs=1)
    with Engine.from_pretrained(tiny_folder, dtype="float32", **options) as engine:
        want = engine.generate(PROMPT, None, SamplingParams(max_tokens=1, prompt_logprobs=2))
        done = engine.generate(PROMPT, None, params)
        deltas = list(engine.stream(PROMPT, None, params))

        async def read() -> list[Delta]:
            return [delta async for delta in engine.astream(PROMPT, None, params)]

        for got in (deltas, asyncio.run(read())):
            assert got[-1].completion is not None
            assert got[-1].completion.choices == done.choices
            assert [d.choice for d in got] == list(range(n))
            assert {(d.text, d.token_ids, d.finish_reason, d.logprobs) for d in got} == {
                ("", (), "length", ())
            }
        assert done.prompt_logprobs == want.prompt_logprobs
        for choice in done.choices:
            assert (choice.text, choice.token_ids, choice.logprobs) == ("", (), ())
            assert choice.finish_reason == "length"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(PROMPT), 0)
        assert done.usage.tpot_seconds == 0
        assert done.usage.ttft_seconds > 0
        assert done.routing.mean_experts > 0
        engine.check_integrity()
        assert engine.stats().used_blocks == 0


def test_a_prompt_may_fill_the_context_if_nothing_follows(tiny: Engine) -> None:
    limit = tiny.config.max_positions
    full = [20 + i % 40 for i in range(limit)]
    done = tiny.generate(full, "L2", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert done.prompt_logprobs is not None
    assert len(done.prompt_logprobs) == limit - 1
    with pytest.raises(RequestError, match=f"{limit} positions"):
        tiny.generate([*full, 20], "L2", SamplingParams(max_tokens=0))


def test_the_first_piece_tells_of_the_prompt(tiny: Engine) -> None:
    params = SamplingParams(max_tokens=4, n=2, prompt_logprobs=1, temperature=1.0)
    first, *others = tiny.stream(PROMPT, None, params)
    assert first.prompt_logprobs is not None
    assert [reported.token_id for reported in first.prompt_logprobs] == PROMPT[1:]
    assert others[-1].completion is not None
    assert first.prompt_logprobs == others[-1].completion.prompt_logprobs
    assert [d.prompt_logprobs for d in others] == [None] * len(others)
    plain = list(tiny.stream(PROMPT, None, SamplingParams(max_tokens=2)))
    assert [d.prompt_logprobs for d in plain] == [None, None]


@pytest.mark.parametrize("stop", [(), ("never",), ("l>\n",)], ids=str)
def test_special_tokens_are_text_where_that_is_asked_for(tiny: Engine, stop: Any) -> None:
    """In their place: also where text is held back that may begin a stop text."""
    encode = tiny.tokenizer.encode
    begin, end, other = (encode(t)[-1] for t in ("<tool_call>", "</tool_call>", "<|reserved_0|>"))
    text = "a nev<tool_call>\n\N{SNOWMAN} nev<|reserved_0|></tool_call>e"
    forced = encode(text, add_special_tokens=False)
    assert {begin, end, other} <= set(forced)
    params: dict[str, Any] = {"forced_text": forced, "stop": stop}
    hidden = tiny.generate(PROMPT, None, SamplingParams(**params))
    assert hidden.text == "a nev\n\N{SNOWMAN} neve"
    params["shown_token_ids"] = [begin, end, forced[0]]
    deltas = list(tiny.stream(PROMPT, None, SamplingParams(**params)))
    want = text.replace("<|reserved_0|>", "")
    if stop == ("l>\n",):
        want = want[: want.index(stop[0])]
    assert "".join(d.text for d in deltas) == want
    assert deltas[-1].completion is not None
    assert deltas[-1].completion.text == want
    assert tiny.generate(PROMPT, None, SamplingParams(**params)).text == want
    assert tiny.decode(forced) == hidden.text  # nobody else's texts have changed
