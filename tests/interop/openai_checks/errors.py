"""Checks of the `openai` client: errors, headers, and faults that it retries."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import openai

from tests.interop.checks import Tally
from tests.interop.openai_checks.asking import At


def wrong_requests(at: At, tally: Tally) -> None:
    """errors: what cannot be served is a BadRequestError that names the parameter."""
    model = at.model
    body: dict[str, Any]
    for param, body in (
        ("prompts", {"extra_body": {"prompts": 1}}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 2}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"extra_body": {"temperature": "hot"}}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("stop", {"stop": [""]}),
        ("logprobs", {"logprobs": 21}),
        ("logit_bias", {"logit_bias": {"the": 1}}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("routing_config", {"extra_body": {"routing_config": {"depth": 0}}}),
        ("routing_config", {"extra_body": {"routing_config": {"depth": at.wanted["layers"] + 1}}}),
        ("routing_config", {"extra_body": {"routing_config": {"top_k": 1, "topK": 1}}}),
        ("routing_config.top", {"extra_body": {"routing_config": {"top": 1}}}),
        ("routing_config", {"model": f"{model}@L24", "extra_body": {"routing_config": {}}}),
        ("routing_config", {"model": f"{model}@L99"}),
        ("profile", {"extra_body": {"profile": "none-such"}}),
    ):
        own = {"model": model, "prompt": "The", "max_tokens": 1, **body}
        error = tally.raises(
            openai.BadRequestError, partial(at.client.completions.create, **own), f"{body}"
        )
        if error is not None:
            tally.true((error.param or "").startswith(param), f"{body}: param {error.param}")
            tally.equal(error.type, "invalid_request_error", f"{body}: type")
    for param, body in (
        ("top_logprobs", {"top_logprobs": 2}),
        ("max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("messages.0.role", {"messages": [{"role": "robot", "content": "x"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ):
        own = {"model": model, "messages": at.wanted["messages"], **body}
        error = tally.raises(
            openai.BadRequestError,
            partial(at.client.chat.completions.create, **own),
            f"{body}",
        )
        if error is not None:
            tally.equal(error.param, param, f"{body}: param")


def long_prompts(at: At, tally: Tally) -> None:
    """errors: a prompt that is too long is context_length_exceeded, with both numbers."""
    limit = at.wanted["max_model_len"]
    ids = [7] * limit
    for call in (
        lambda: at.client.completions.create(model=at.model, prompt=ids, max_tokens=1),
        lambda: at.client.completions.create(model=at.model, prompt=ids[:10], max_tokens=limit),
        lambda: at.client.chat.completions.create(
            model=at.model, messages=[{"role": "user", "content": "x y " * limit}], stream=True
        ),
        lambda: at.client.embeddings.create(model=at.model, input=[7] * (limit + 1)),
    ):
        error = tally.raises(openai.BadRequestError, call, "too long")
        if error is not None:
            tally.equal(error.code, "context_length_exceeded", "code")
            tally.true(str(limit) in error.message, f"{error.message} has {limit}")


def keys(at: At, tally: Tally) -> None:
    """errors: a wrong key is an AuthenticationError; each of the server's keys opens it."""
    for key in ("key-two", "key-on", at.key + "x", "ACCESS_KEY", at.admin_key):
        client = at.new(api_key=key)
        error = tally.raises(openai.AuthenticationError, client.models.list, f"key {key}")
        if error is not None:
            tally.equal(error.code, "invalid_api_key", "code")
            tally.true(at.key not in str(error), "no key is shown")
    for key in ("key-one", "ACCESS_KEY:SECRET_KEY"):
        tally.true(list(at.new(api_key=key).models.list()), f"key {key}")


def unknown_models(at: At, tally: Tally) -> None:
    """errors: an unknown model is a NotFoundError, wherever it is asked for."""
    client, name = at.client, "gpt-none"
    for call in (
        lambda: client.models.retrieve(name),
        lambda: client.completions.create(model=name, prompt="The"),
        lambda: client.chat.completions.create(model=name, messages=at.wanted["messages"]),
        lambda: client.embeddings.create(model=name, input="The"),
        lambda: client.completions.create(model=f"{name}@L24", prompt="The"),
    ):
        error = tally.raises(openai.NotFoundError, call, "unknown model")
        if error is not None:
            tally.equal(error.code, "model_not_found", "code")
            tally.equal(error.param, "model", "param")


def rate_limits(at: At, tally: Tally) -> None:
    """errors: a full queue is a RateLimitError, which a client with retries waits out."""
    narrow = {"base_url": f"{at.narrow_url}/v1"}
    own = {"model": at.model, "prompt": "The", "max_tokens": 300}
    more = {"extra_body": {"ignore_eos": True}, "stream": True}
    client = at.new(**narrow)
    with client.completions.create(**own, **more) as stream:
        next(iter(stream))
        error = tally.raises(
            openai.RateLimitError, lambda: client.completions.create(**own), "a full queue"
        )
        if error is not None:
            tally.equal(error.type, "rate_limit_error", "type")
            tally.equal(error.code, "queue_full", "code")
            tally.true(int(error.response.headers["retry-after"]) >= 1, "Retry-After")
        patient = at.new(**narrow, max_retries=8)
        answer = patient.completions.create(model=at.model, prompt="The", max_tokens=2)
        tally.equal(answer.usage.completion_tokens, 2, "after retries")
    answer = client.completions.create(model=at.model, prompt="The", max_tokens=2)
    tally.equal(answer.usage.completion_tokens, 2, "once the stream is closed")


def headers(at: At, tally: Tally) -> None:
    """headers: x-elastic-subnet, request ids and rate limits, with_raw_response and streams."""
    own = {"model": f"{at.model}@L24-k2", "prompt": "The", "max_tokens": 4}
    raw = at.client.completions.with_raw_response.create(
        **own, extra_headers={"x-request-id": "mine-1"}
    )
    tally.equal(raw.headers["x-elastic-subnet"], "L24-k2", "x-elastic-subnet")
    tally.equal(raw.headers["x-request-id"], "mine-1", "x-request-id that was given")
    tally.equal(raw.parse().usage.completion_tokens, 4, "the body behind the headers")
    tally.true(int(raw.headers["x-ratelimit-limit-requests"]) > 0, "x-ratelimit-limit-requests")
    answers = [at.client.completions.create(**own) for _ in range(3)]
    tally.equal(len({answer._request_id for answer in answers}), 3, "request ids")
    chat = {"model": own["model"], "messages": at.wanted["messages"], "max_tokens": 4}
    with at.client.chat.completions.with_streaming_response.create(**chat, stream=True) as raw:
        tally.equal(raw.headers["x-elastic-subnet"], "L24-k2", "x-elastic-subnet of a stream")
        tally.true(raw.headers["content-type"].startswith("text/event-stream"), "content-type")
        lines = [line for line in raw.iter_lines() if line]
        tally.true(all(line.startswith("data: ") for line in lines), "every line is data")
        tally.equal(lines[-1], "data: [DONE]", "the last event")
    raw = at.client.embeddings.with_raw_response.create(model=own["model"], input="The")
    tally.equal(raw.headers["x-elastic-subnet"], "L24-k2", "x-elastic-subnet of embeddings")
    error = tally.raises(
        openai.BadRequestError,
        lambda: at.client.completions.create(**own, n=0, extra_headers={"x-request-id": "mine-2"}),
        "a bad request",
    )
    if error is not None:
        tally.equal(error.request_id, "mine-2", "request id of an error")


def faults(at: At, tally: Tally) -> None:
    """faults: what is injected is the exception that the client knows, and is retried."""
    own: dict[str, Any] = {"model": at.model, "prompt": "The", "max_tokens": 4, "temperature": 0}
    for status, kind in (
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ):
        reported = {"x-inject-error": str(status)}
        tally.raises(
            kind,
            partial(at.client.completions.create, **own, extra_headers=reported),
            f"injected {status}",
        )
    dropped = {"x-inject-drop-after": "0"}
    tally.raises(
        openai.APIConnectionError,
        lambda: at.client.completions.create(**own, extra_headers=dropped),
        "dropped at once",
    )
    stalled = {"x-inject-stall-after": "0"}
    tally.raises(
        openai.APITimeoutError,
        lambda: at.client.completions.create(**own, extra_headers=stalled, timeout=0.5),
        "stalled",
    )
    wanted = at.client.completions.create(**own).choices[0].text
    put(at, {"rules": [{"error": 503, "count": 1}, {"error": 429, "retry_after": 1, "count": 1}]})
    begun = time.monotonic()
    answer = at.new(max_retries=3).completions.create(**own)
    seconds = time.monotonic() - begun
    tally.equal(answer.choices[0].text, wanted, "after two faults")
    tally.true(seconds >= 1, f"Retry-After was waited for: {seconds:.2f} s")
    put(at, {"rules": []})
    forced = {"x-force-text": "caf%C3%A9"}
    answer = at.client.completions.create(**own, extra_headers=forced)
    tally.equal(answer.choices[0].text, "café", "x-force-text")


def put(at: At, plan: dict[str, Any]) -> None:
    """Set what goes wrong, with the client's own way to reach other endpoints."""
    admin = at.new(base_url=at.url, api_key=at.admin_key)
    admin.put("/admin/faults", body=plan, cast_to=object)


CHECKS = (
    wrong_requests,
    long_prompts,
    keys,
    unknown_models,
    rate_limits,
    headers,
    faults,
)
