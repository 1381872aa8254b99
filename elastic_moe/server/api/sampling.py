"""A request's body as `SamplingParams`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from elastic_moe.engine import SamplingParams
from elastic_moe.protocol.sampling import ResponseFormat, SamplingRequest
from elastic_moe.server.errors import ApiError

MAX_STOPS = 16


def sampling_params(
    body: SamplingRequest,
    *,
    max_tokens: int,
    default_seed: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What a body says of sampling; what it leaves open is as in OpenAI's API.

    Args:
        max_tokens: tokens to write, at most.
        default_seed: where the body names none; None draws one.
        logprobs, prompt_logprobs: as in `SamplingParams`.

    Raises:
        RequestError, ApiError: values that do not go together.
    """
    stop = body.stop or ()
    if len(stop) > MAX_STOPS and not isinstance(stop, str):
        raise ApiError(
            400, f"stop must have at most {MAX_STOPS} texts, got {len(stop)}.", param="stop"
        )
    seed = default_seed if body.seed is None else body.seed
    if seed is None:
        seed = secrets.randbits(64)  # drawn anew every time, as by a remote API
    json_object, schema = _json(body.response_format)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),  # -1 is vLLM's word for all
        min_p=_or(body.min_p, 0.0),
        seed=seed % (1 << 64),
        stop=stop,
        stop_token_ids=body.stop_token_ids or (),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_bias(body.logit_bias),
        min_tokens=body.min_tokens or 0,
        ignore_eos=body.ignore_eos,
        n=body.n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        json_object=json_object,
        json_schema=schema,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise ApiError(
                400, f"logit_bias: keys must be token ids, got {key[:40]!a}.", param="logit_bias"
            )
    return {int(key): value for key, value in bias.items()}


def _json(wanted: ResponseFormat | None) -> tuple[bool, Mapping[str, object] | None]:
    """Whether the text must be any JSON object, and the schema that it must obey."""
    if wanted is None or wanted.type == "text":
        return False, None
    if wanted.type == "json_object":
        return True, None
    if wanted.json_schema is None:
        raise ApiError(
            400, "response_format: json_schema is missing.", param="response_format.json_schema"
        )
    schema = wanted.json_schema.schema_
    return (True, None) if schema is None else (False, schema)
