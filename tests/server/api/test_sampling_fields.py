"""Every field of a body reaches the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_moe import SamplingParams
from elastic_moe.engine.input_processor import InputProcessor
from elastic_moe.protocol import ChatRequest, CompletionRequest
from elastic_moe.server.api.sampling import sampling_params
from tests.server.conftest import Running

BODY: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "seed": 11,
    "stop": ["x", "yz"],
    "stop_token_ids": [7, 8],
    "frequency_penalty": 0.25,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"5": -3, "6": 2.5},
    "min_tokens": 2,
    "ignore_eos": True,
    "n": 3,
}
WANT = {**BODY, "logit_bias": {5: -3.0, 6: 2.5}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}


def test_bodies_say_all_that_sampling_has() -> None:
    for body in (ChatRequest(**CHAT, **BODY), CompletionRequest(**TEXT, **BODY)):
        got = sampling_params(body, max_tokens=9, default_seed=5, logprobs=2, prompt_logprobs=1)
        assert got == SamplingParams(max_tokens=9, logprobs=2, prompt_logprobs=1, **WANT)


def test_what_is_left_out_is_as_in_the_remote_api() -> None:
    for body in (ChatRequest(**CHAT), CompletionRequest(**TEXT, top_k=-1)):
        got = sampling_params(body, max_tokens=9, default_seed=5, logprobs=None)
        assert got == SamplingParams(max_tokens=9, temperature=1.0, seed=5)


def test_a_seed_that_nobody_names_is_drawn_anew() -> None:
    for body in (ChatRequest(**CHAT), CompletionRequest(**TEXT)):
        got = [
            sampling_params(body, max_tokens=9, default_seed=None, logprobs=None) for _ in range(9)
        ]
        assert len({params.seed for params in got}) == 9


@pytest.fixture(scope="module")
def seeded(start: Callable[..., Running]) -> Running:
    return start({"seed": 11})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_seed_of_the_server_is_for_requests_that_name_none(
    start: Callable[..., Running], seeded: Running, path: str
) -> None:
    own = CHAT if "chat" in path else TEXT
    asked = {**own, "model": "tiny", "max_tokens": 12, "ignore_eos": True}

    def texts(running: Running, **more: Any) -> list[str]:
        choices = [running.post(path, **asked, **more).json()["choices"][0] for _ in range(3)]
        return [one["message"]["content"] if "chat" in path else one["text"] for one in choices]

    assert len({*texts(seeded), *texts(seeded, seed=11)}) == 1
    assert len({*texts(seeded), *texts(seeded, seed=12)}) == 2
    assert len(set(texts(start({"seed": None})))) == 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_endpoints_hand_all_of_it_to_the_engine(
    served: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    seen: list[SamplingParams] = []
    make = InputProcessor._request

    def watched(
        inputs: InputProcessor, prompt: Any, routing: Any, sampling: Any, *rest: Any
    ) -> Any:
        seen.append(sampling)
        return make(inputs, prompt, routing, sampling, *rest)

    monkeypatch.setattr(InputProcessor, "_request", watched)
    chat = "chat" in path
    own = CHAT if chat else TEXT
    reported = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    for stream in (False, True):
        asked = {**own, **BODY, **reported, "model": "tiny", "max_tokens": 6, "stream": stream}
        answer = served.post(path, **asked)
        assert answer.status_code == 200, answer.text
    assert seen == [SamplingParams(max_tokens=6, logprobs=2, **WANT)] * 2
