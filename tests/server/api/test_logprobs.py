"""Log-probabilities that JSON cannot express."""

from __future__ import annotations

import math

from elastic_moe import Engine
from elastic_moe.engine.outputs import TokenLogprob
from elastic_moe.server.api.logprobs import LogprobWriter, TextOffset


def test_what_cannot_come_has_a_logprob_that_json_can_say(tiny: Engine) -> None:
    writer = LogprobWriter(tiny.tokenizer)
    never = TokenLogprob(20, -math.inf, ((21, -0.5), (22, -math.inf)))
    (chat,) = writer.chat([never])["content"]
    assert chat["logprob"] == -9999
    assert [top["logprob"] for top in chat["top_logprobs"]] == [-0.5, -9999]
    text = writer.completion([never], TextOffset())
    assert text["token_logprobs"] == [-9999]
    assert list(text["top_logprobs"][0].values()) == [-0.5, -9999]
