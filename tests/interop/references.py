"""What the server must answer: the engine's own answers, asked directly, as JSON for the peers.

Every case is the body of a request, and what must come back. Where a body names no sub-network, its
model's name has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from elastic_moe import Completion, Engine, SamplingParams

PROMPTS = (
    "The whale is a mammal, and it",
    "def main() -> None:\n    ",
    "In the beginning there was naïve ☃ snow",
)
MESSAGES = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is a list in Python?"},
]
# Sub-network -> its knobs, in the spelling of this project and in that of a TypeScript client.
SUBNETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "L24-k2": ({"depth": 24, "top_k": 2}, {"activeLayers": [*range(24)], "routingTopK": 2}),
    "L36-k2-w6-t0.7": (
        {"max_depth": 48, "depth": 36, "top_k": 2, "expert_width": 6, "sparsity": 0.7},
        {
            "maxDepth": 48,
            "activeLayers": [*range(36)],
            "routingTopK": 2,
            "expertWidth": 6,
            "sparsityThreshold": 0.7,
        },
    ),
    "p8": ({"expert_pool": 8}, {"expertPool": 8}),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["whale", "snow"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "big": {"type": "boolean"},
    },
    "required": ["kind", "count", "big"],
    "additionalProperties": False,
}
GREEDY = {"temperature": 0.0, "max_tokens": 12}
DRAWN = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
# What a request may say beside its sub-network; the names are those of `SamplingParams`.
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature 0": GREEDY,
    "a seed": DRAWN,
    "a negative seed": {**DRAWN, "seed": -3},
    "n": {**DRAWN, "n": 3},
    "n at temperature 0": {**GREEDY, "n": 2},
    "top_p": {**DRAWN, "top_p": 0.5},
    "top_k": {**DRAWN, "top_k": 5},
    "top_k -1": {**DRAWN, "top_k": -1},
    "min_p": {**DRAWN, "min_p": 0.2},
    "frequency_penalty": {**GREEDY, "frequency_penalty": 1.5, "max_tokens": 24},
    "presence_penalty": {**GREEDY, "presence_penalty": -1.5, "max_tokens": 24},
    "repetition_penalty": {**GREEDY, "repetition_penalty": 1.4, "max_tokens": 24},
    "logit_bias": {**GREEDY, "logit_bias": {"300": 50, "301": -100}},
    "stop, a text": {**GREEDY, "stop": "e", "max_tokens": 40},
    "stop, texts": {**GREEDY, "stop": ["\n", "a", "xyzzy"], "max_tokens": 40},
    "stop_token_ids": {**GREEDY, "stop_token_ids": [*range(100, 400)], "max_tokens": 40},
    "ignore_eos": {**GREEDY, "ignore_eos": True},
    "min_tokens": {**DRAWN, "min_tokens": 12},
}
WRITTEN = {"temperature": 1.0, "max_tokens": 200}
FORMATS: dict[str, dict[str, Any]] = {
    "json_object": {"type": "json_object"},
    "json_schema": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
}
EMBEDDED = ("A whale.", "Snow is white, and a whale is not.")


def references(engine: Engine) -> dict[str, Any]:
    """Every case, by what it is about."""
    chat_ids = engine.tokenizer.encode_chat(MESSAGES)
    prompt = PROMPTS[0]
    return {
        "model": engine.name,
        "max_model_len": engine.config.max_positions,
        "layers": engine.shape.num_layers,
        "prompts": PROMPTS,
        "prompt_ids": [engine.encode(own) for own in PROMPTS],
        "messages": MESSAGES,
        "schema": SCHEMA,
        "completion_subnets": [
            _case(engine, own, {"prompt": own, **GREEDY, "logprobs": 3}, name)
            for name in SUBNETS
            for own in PROMPTS
        ],
        "completion_options": [
            _case(engine, prompt, {"prompt": prompt, **options, "logprobs": 2}, "L24-k2", what)
            for what, options in OPTIONS.items()
        ],
        "chat_subnets": [
            _case(engine, chat_ids, {"messages": MESSAGES, **GREEDY}, name, top=3)
            for name in SUBNETS
        ],
        "chat_options": [
            _case(engine, chat_ids, {"messages": MESSAGES, **options}, "L24-k2", what, top=2)
            for what, options in OPTIONS.items()
        ],
        "chat_formats": [
            _formatted(engine, chat_ids, what, wanted) for what, wanted in FORMATS.items()
        ],
        "scores": [_score(engine, own, name) for name in SUBNETS for own in PROMPTS],
        "embeddings": [_embedding(engine, own, name) for name in SUBNETS for own in EMBEDDED],
        "crowd": [
            _case(
                engine,
                PROMPTS[i % 3],
                {"prompt": PROMPTS[i % 3], **DRAWN, "seed": i, "max_tokens": 40},
                [*SUBNETS][i % 4],
            )
            for i in range(16)
        ],
    }


def _formatted(
    engine: Engine, ids: Sequence[int], what: str, wanted: dict[str, Any]
) -> dict[str, Any]:
    """A case whose JSON is whole: drawn by the first seed that makes it so."""
    for seed in range(50):
        body = {"messages": MESSAGES, **WRITTEN, "seed": seed, "response_format": wanted}
        case = _case(engine, ids, body, "full", what)
        if case["wanted"]["choices"][0]["finish_reason"] == "stop":
            return case
    raise SystemExit(f"{what}: no seed gives JSON that ends within {WRITTEN['max_tokens']} tokens")


def _case(
    engine: Engine,
    prompt: str | Sequence[int],
    body: dict[str, Any],
    subnet: str,
    what: str | None = None,
    top: int | None = None,
) -> dict[str, Any]:
    """One request, and what must come back.

    Args:
        top: of a chat: likeliest tokens that are reported, else as `body` says.
    """
    knobs, camel = SUBNETS[subnet]
    top = body.get("logprobs") if top is None else top
    done = engine.generate(prompt, subnet, _params(body, top))
    return {
        "what": what or subnet,
        "subnet": subnet,
        "body": body,
        "top": top,
        "routing_configs": [knobs, camel],
        "wanted": _told(engine, done),
    }


def _params(body: dict[str, Any], top: int | None) -> SamplingParams:
    """A body's sampling, as the engine has it."""
    own = {k: v for k, v in body.items() if k not in {"prompt", "messages", "logprobs"}}
    wanted = own.pop("response_format", None)
    if wanted is not None and wanted["type"] == "json_object":
        own["json_object"] = True
    elif wanted is not None:
        own["json_schema"] = wanted["json_schema"]["schema"]
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): value for token, value in own["logit_bias"].items()}
    own["seed"] = own.get("seed", 0) % (1 << 64)
    own["top_k"] = max(0, own.get("top_k", 0))
    return SamplingParams(**own, logprobs=top)


def _told(engine: Engine, done: Completion) -> dict[str, Any]:
    return {
        "choices": [
            {
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "token_ids": choice.token_ids,
                "logprobs": None
                if choice.logprobs is None
                else [
                    {
                        "logprob": token.logprob,
                        "bytes": list(engine.tokenizer.token_bytes(token.token_id)),
                        "top": [value for _, value in token.top],
                    }
                    for token in choice.logprobs
                ],
            }
            for choice in done.choices
        ],
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
        "routing": {
            "name": done.routing.name,
            "model": engine.name,
            "depth": done.routing.depth,
            "active_params": done.routing.active_params,
        },
    }


def logprobs_of(engine: Engine, ids: Sequence[int], subnet: str) -> torch.Tensor:
    """(T - 1, V) float64: log-probabilities of the tokens after the first, by `Engine.score`."""
    return torch.log_softmax(torch.from_numpy(engine.score(ids, subnet)[:-1]).double(), dim=-1)


def of_tokens(rows: torch.Tensor, ids: Iterable[int]) -> list[float]:
    """The log-probability of one token in each row."""
    return rows.gather(1, torch.tensor([*ids])[:, None])[:, 0].tolist()


def _score(engine: Engine, prompt: str, subnet: str) -> dict[str, Any]:
    """A prompt's log-probabilities."""
    ids = engine.encode(prompt)
    rows = logprobs_of(engine, ids, subnet)
    return {
        "prompt": prompt,
        "subnet": subnet,
        "ids": ids,
        "logprobs": of_tokens(rows, ids[1:]),
        "best": rows.max(dim=-1).values.tolist(),
    }


def _embedding(engine: Engine, text: str, subnet: str) -> dict[str, Any]:
    done = engine.embed(text, subnet)
    return {
        "text": text,
        "ids": engine.encode(text),
        "subnet": subnet,
        "vector": done.vector.tolist(),
        "tokens": done.prompt_tokens,
    }
