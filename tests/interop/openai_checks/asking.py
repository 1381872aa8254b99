"""How the checks of the `openai` client ask, and compare with what the engine said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, OpenAI

from tests.interop.checks import Tally

# What OpenAI's API does not have goes through `extra_body`.
EXTRA = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "routing_config",
    "profile",
}
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class At:
    """Where a server is, and what it must answer.

    Attributes:
        url, key, admin_key: of the server.
        narrow_url: of one that takes a single request at a time.
        wanted: as `references.references` made it.
        client: an `OpenAI` that tries nothing twice. Untyped, since checks also send what its types
            forbid.
    """

    url: str
    key: str
    admin_key: str
    narrow_url: str
    wanted: dict[str, Any]
    client: Any

    @property
    def model(self) -> str:
        return str(self.wanted["model"])

    def new(self, **options: Any) -> Any:
        """Another `OpenAI`."""
        return OpenAI(**{**self._options, **options})

    def new_async(self, **options: Any) -> Any:
        """An `AsyncOpenAI`."""
        return AsyncOpenAI(**{**self._options, **options})

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "base_url": f"{self.url}/v1",
            "api_key": self.key,
            "max_retries": 0,
            "timeout": TIMEOUT_SECONDS,
        }


def arguments(body: dict[str, Any], model: str) -> dict[str, Any]:
    """A body as keyword arguments of `create`."""
    plain = {key: value for key, value in body.items() if key not in EXTRA}
    extra = {key: value for key, value in body.items() if key in EXTRA}
    return {"model": model, **plain, **({"extra_body": extra} if extra else {})}


def chat_arguments(case: dict[str, Any], model: str) -> dict[str, Any]:
    """Arguments of a chat; one that tells log-probabilities where the case has some."""
    own = arguments(case["body"], model)
    if case["top"] is not None:
        own |= {"logprobs": True, "top_logprobs": case["top"]}
    return own


def routing_of(answer: Any) -> dict[str, Any]:
    """What an answer, or a chunk, says of its sub-network; the client keeps keys it is new to."""
    return dict((answer.model_extra or {}).get("routing") or {})


def same_choices(tally: Tally, got: list[Any], case: dict[str, Any], *, chat: bool) -> None:
    """Texts, ends and log-probabilities of all choices."""
    wanted, what = case["wanted"]["choices"], f"{case['what']} ({case['subnet']})"
    tally.equal([choice.index for choice in got], [*range(len(wanted))], f"{what}: indices")
    for one, own in zip(got, wanted, strict=False):
        text = one.message.content if chat else one.text
        tally.equal(text, own["text"], f"{what}: text")
        tally.equal(one.finish_reason, own["finish_reason"], f"{what}: finish_reason")
        if own["logprobs"] is not None:
            (same_chat_logprobs if chat else same_text_logprobs)(
                tally, one.logprobs, own["logprobs"], what
            )


def same_chat_logprobs(
    tally: Tally, reported: Any, wanted: list[dict[str, Any]], what: str
) -> None:
    """`logprobs` of a chat's choice."""
    tokens = reported.content
    tally.equal([t.bytes for t in tokens], [own["bytes"] for own in wanted], f"{what}: bytes")
    tally.close(
        [t.logprob for t in tokens], [own["logprob"] for own in wanted], f"{what}: logprobs"
    )
    for token, own in zip(tokens, wanted, strict=False):
        top = [one.logprob for one in token.top_logprobs]
        tally.close(top, own["top"], f"{what}: top_logprobs")


def same_text_logprobs(
    tally: Tally, reported: Any, wanted: list[dict[str, Any]], what: str
) -> None:
    """`logprobs` of a completion's choice."""
    tally.close(reported.token_logprobs, [own["logprob"] for own in wanted], f"{what}: logprobs")
    for top, own in zip(reported.top_logprobs, wanted, strict=False):
        tally.close(sorted(top.values(), reverse=True), own["top"], f"{what}: top_logprobs")
    tally.equal(len(reported.tokens), len(wanted), f"{what}: tokens")
    tally.equal(reported.text_offset[0], 0, f"{what}: first offset")
    tally.equal(reported.text_offset, sorted(reported.text_offset), f"{what}: offsets ascend")


def same_account(tally: Tally, answer: Any, case: dict[str, Any]) -> None:
    """Usage, and the sub-network that ran."""
    wanted, what = case["wanted"], f"{case['what']} ({case['subnet']})"
    tokens = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    tally.equal(tokens, (wanted["prompt_tokens"], wanted["completion_tokens"]), f"{what}: usage")
    tally.equal(answer.usage.total_tokens, sum(tokens), f"{what}: total_tokens")
    same_routing(tally, routing_of(answer), case)


def same_routing(tally: Tally, routing: dict[str, Any], case: dict[str, Any]) -> None:
    """What an answer says of its sub-network."""
    what = f"{case['what']} ({case['subnet']})"
    reported = {key: routing.get(key) for key in case["wanted"]["routing"]}
    tally.equal(reported, case["wanted"]["routing"], f"{what}: routing")
    k, experts = routing.get("top_k", 0), routing.get("mean_experts", math.nan)
    whole = routing.get("sparsity") == 0
    tally.true(experts == k if whole else 1 <= experts < k, f"{what}: {experts} experts of {k}")


def spellings(case: dict[str, Any], model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, more of the body) for every way to ask for a case's sub-network."""
    yield f"{model}@{case['subnet']}", {}
    for knobs in case["routing_configs"]:
        yield model, {"routing_config": knobs}
    yield f"{model}@{case['subnet']}", {"routing_config": case["routing_configs"][0]}
