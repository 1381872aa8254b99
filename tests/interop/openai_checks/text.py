"""Checks of the `openai` client: completions, embeddings, models."""

from __future__ import annotations

import base64
import math
import struct
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from tests.interop.checks import Tally
from tests.interop.openai_checks.asking import (
    At,
    arguments,
    routing_of,
    same_account,
    same_choices,
    same_routing,
    spellings,
)


def subnets(at: At, tally: Tally) -> None:
    """completions: every spelling of a sub-network gives the engine's text, logprobs, usage."""
    for case in at.wanted["completion_subnets"]:
        for model, more in spellings(case, at.model):
            own = arguments({**case["body"], **more}, model)
            answer = at.client.completions.create(**own)
            same_choices(tally, answer.choices, case, chat=False)
            same_account(tally, answer, case)
            tally.equal(answer.model, model, "model is the name that was asked for")
            tally.equal(answer.object, "text_completion", "object")


def options(at: At, tally: Tally) -> None:
    """completions: every option of sampling gives the engine's choices, streamed or not."""
    for case in at.wanted["completion_options"]:
        own = arguments(case["body"], f"{at.model}@{case['subnet']}")
        answer = at.client.completions.create(**own)
        same_choices(tally, answer.choices, case, chat=False)
        same_account(tally, answer, case)
        choices, last = join(at.client.completions.create(**own, stream=True))
        same_choices(tally, choices, case, chat=False)
        same_routing(tally, routing_of(last), case)


def prompts(at: At, tally: Tally) -> None:
    """completions: a text, texts, ids and lists of ids are answered alike, streamed or not."""
    cases = [case for case in at.wanted["completion_subnets"] if case["subnet"] == "full"]
    body = {k: v for k, v in cases[0]["body"].items() if k != "prompt"}
    texts, ids = at.wanted["prompts"], at.wanted["prompt_ids"]
    for case, own in zip(cases, ids, strict=True):
        answer = at.client.completions.create(model=at.model, prompt=own, **body)
        same_choices(tally, answer.choices, case, chat=False)
    for several in (texts, ids):
        answer = at.client.completions.create(model=at.model, prompt=several, **body)
        tally.equal([choice.index for choice in answer.choices], [0, 1, 2], "indices")
        stream = at.client.completions.create(
            model=at.model,
            prompt=several,
            **body,
            stream=True,
            stream_options={"include_usage": True},
        )
        choices, last = join(stream)
        for got, what in ((answer.choices, "whole"), (choices, "stream")):
            got_texts = [choice.text for choice in got]
            tally.equal(got_texts, [_text(case) for case in cases], f"texts of several, {what}")
        for usage in (answer.usage, last.usage):
            wanted = sum(case["wanted"]["prompt_tokens"] for case in cases)
            tally.equal(usage.prompt_tokens, wanted, "prompt_tokens of several")
    # n choices of each prompt: those of the first one come first.
    own = {"model": at.model, "max_tokens": 6, "seed": 3, "n": 2}
    both = at.client.completions.create(**own, prompt=texts[:2])
    alone = [at.client.completions.create(**own, prompt=text) for text in texts[:2]]
    wanted = [choice.text for answer in alone for choice in answer.choices]
    tally.equal([choice.text for choice in both.choices], wanted, "n choices of two prompts")


def echoes(at: At, tally: Tally) -> None:
    """completions: echo with logprobs gives the prompt's, equal to Engine.score's"""
    for own in at.wanted["scores"]:
        for prompt in (own["prompt"], own["ids"]):
            answer = at.client.completions.create(
                model=f"{at.model}@{own['subnet']}",
                prompt=prompt,
                max_tokens=1,
                temperature=0,
                echo=True,
                logprobs=1,
            )
            reported = answer.choices[0].logprobs
            tally.equal(reported.token_logprobs[0], None, "the first token has none")
            tally.close(reported.token_logprobs[1:-1], own["logprobs"], f"logprobs {own['subnet']}")
            best = [max(top.values()) for top in reported.top_logprobs[1:-1]]
            tally.close(best, own["best"], f"top_logprobs {own['subnet']}")
            text = answer.choices[0].text
            tally.true(text.startswith(own["prompt"]), f"{text!r} begins with the prompt")
            cuts = [*reported.text_offset, len(text)]
            pieces = [text[a:b] for a, b in pairwise(cuts)]
            plain = [t for t in reported.tokens[1:] if not t.startswith("bytes:")]
            found = [p for p, t in zip(pieces[1:], reported.tokens[1:], strict=True) if t in plain]
            tally.equal(found, plain, "text_offset cuts the text into its tokens")


def echo_variants(at: At, tally: Tally) -> None:
    """completions: echo streamed, without logprobs, and with max_tokens 0"""
    own = at.wanted["scores"][0]
    body = {"model": at.model, "prompt": own["prompt"], "temperature": 0, "echo": True}
    whole = at.client.completions.create(**body, max_tokens=5)
    tally.equal(whole.choices[0].logprobs, None, "logprobs that were not asked for")
    choices, _ = join(at.client.completions.create(**body, max_tokens=5, stream=True))
    tally.equal(choices[0].text, whole.choices[0].text, "streamed echo")
    whole = at.client.completions.create(**body, max_tokens=5, logprobs=2)
    choices, _ = join(at.client.completions.create(**body, max_tokens=5, logprobs=2, stream=True))
    tally.equal(choices[0].text, whole.choices[0].text, "streamed echo with logprobs")
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        got, wanted = (getattr(c.logprobs, name) for c in (choices[0], whole.choices[0]))
        tally.equal(got, wanted, f"streamed echo: {name}")
    none = at.client.completions.create(**body, max_tokens=0, logprobs=0)
    tally.equal(none.choices[0].text, own["prompt"], "max_tokens 0 gives the prompt alone")
    tally.close(none.choices[0].logprobs.token_logprobs[1:], own["logprobs"], "max_tokens 0")
    tally.equal(none.usage.completion_tokens, 0, "max_tokens 0: completion_tokens")


def defaults(at: At, tally: Tally) -> None:
    """completions: 16 tokens, no logprobs, one choice, a seed of its own, as in OpenAI's API."""
    body = {"model": at.model, "prompt": "The", "extra_body": {"ignore_eos": True}}
    answers = [at.client.completions.create(**body) for _ in range(3)]
    for answer in answers:
        tally.equal(answer.usage.completion_tokens, 16, "completion_tokens")
        tally.equal(len(answer.choices), 1, "choices")
        tally.equal(answer.choices[0].logprobs, None, "logprobs")
        tally.equal(answer.choices[0].finish_reason, "length", "finish_reason")
    tally.true(len({a.choices[0].text for a in answers}) > 1, "texts without a seed differ")
    tally.equal(len({answer.id for answer in answers}), 3, "ids")


def embeddings(at: At, tally: Tally) -> None:
    """embeddings: numbers, base64 (the client's default) and ids give the engine's vectors."""
    for own in at.wanted["embeddings"]:
        model, wanted = f"{at.model}@{own['subnet']}", own["vector"]
        ask = at.client.embeddings.create
        plain = ask(model=model, input=own["text"], encoding_format="float")
        tally.close(plain.data[0].embedding, wanted, f"numbers {own['subnet']}", 1e-7)
        tally.equal(plain.usage.prompt_tokens, own["tokens"], "prompt_tokens")
        tally.equal(plain.usage.total_tokens, own["tokens"], "total_tokens")
        tally.equal(routing_of(plain)["name"], own["subnet"], "routing")
        for answer in (ask(model=model, input=own["text"]), ask(model=model, input=own["ids"])):
            tally.equal(answer.data[0].embedding, plain.data[0].embedding, "base64 and numbers")
        raw = ask(model=model, input=own["text"], encoding_format="base64").data[0].embedding
        floats = struct.unpack(f"<{len(wanted)}f", base64.b64decode(raw))
        tally.close(floats, wanted, "base64, as it is", 1e-7)
        tally.close(math.hypot(*wanted), 1.0, "length of a vector")
    both = at.wanted["embeddings"][:2]
    for key in ("text", "ids"):
        answer = at.client.embeddings.create(
            model=at.model, input=[own[key] for own in both], dimensions=len(both[0]["vector"])
        )
        tally.equal([item.index for item in answer.data], [0, 1], "indices")
        for item, own in zip(answer.data, both, strict=True):
            tally.close(item.embedding, own["vector"], f"one of several, {key}", 1e-7)


def models(at: At, tally: Tally) -> None:
    """models: list and retrieve tell names, max_model_len and the elastic axes."""
    cards = list(at.client.models.list())
    tally.equal([card.id for card in cards], [at.model, "ernie-5.1-prod"], "names")
    for name in (at.model, "ernie-5.1-prod", f"{at.model}@L24-k2"):
        card = at.client.models.retrieve(name)
        more = card.model_extra or {}
        tally.equal(card.id, name, "id")
        tally.equal(card.owned_by, "elastic-moe", "owned_by")
        tally.equal(more["root"], at.model, "root")
        tally.equal(more["max_model_len"], at.wanted["max_model_len"], "max_model_len")
        tally.equal(more["elastic"]["max_depth"], at.wanted["layers"], "max_depth")
        tally.true("depth" in more["elastic"]["trained"], "trained depths")


def join(stream: Any) -> tuple[list[Any], Any]:
    """A stream's choices, put together as a whole answer has them; and its last chunk."""
    found: dict[int, SimpleNamespace] = {}
    chunk = None
    for chunk in stream:
        for piece in chunk.choices:
            empty = SimpleNamespace(index=piece.index, text="", finish_reason=None, logprobs=None)
            own = found.setdefault(piece.index, empty)
            own.text += piece.text
            own.finish_reason = piece.finish_reason or own.finish_reason
            if piece.logprobs is not None:
                lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                own.logprobs = own.logprobs or SimpleNamespace(**{name: [] for name in lists})
                for name in lists:
                    getattr(own.logprobs, name).extend(getattr(piece.logprobs, name))
    return [found[index] for index in sorted(found)], chunk


def _text(case: dict[str, Any]) -> str:
    return str(case["wanted"]["choices"][0]["text"])


CHECKS = (subnets, options, prompts, echoes, echo_variants, defaults, embeddings, models)
