"""`SamplingParams` from the body of a request."""

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
    """Sampling parameters of a request; absent ones get OpenAI's defaults.

    Args:
        max_tokens: tokens to generate at most.
        default_seed: if the body has no seed; None draws one.
        logprobs, prompt_logprobs: as in `SamplingParams`.

    Raises:
        RequestError, ApiError: a value is out of range, or contradicts another.
    """
    stop = body.stop or ()
    if len(stop) > MAX_STOPS and not isinstance(stop, str):
        raise ApiError(
            400, f"stop must have at most {MAX_STOPS} texts, got {len(stop)}.", param="stop"
        )
    seed = default_seed if body.seed is None else body.seed
    if seed is None:
        seed = secrets.randbits(64)  # other answers at every call, as from a remote API
    json_object, schema = _json_constraint(body.response_format)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),  # vLLM writes -1 for all
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


def _json_constraint(
    response_format: ResponseFormat | None,
) -> tuple[bool, Mapping[str, object] | None]:
    """Whether any JSON object is allowed only, and the schema that the text must match."""
    if response_format is None or response_format.type == "text":
        return False, None
    if response_format.type == "json_object":
        return True, None
    if response_format.json_schema is None:
        raise ApiError(
            400, "response_format: json_schema is missing.", param="response_format.json_schema"
        )
    schema = response_format.json_schema.schema_
    return (True, None) if schema is None else (False, schema)
