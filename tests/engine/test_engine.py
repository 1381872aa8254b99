"""The engine runs what it is told, from any thread, and says what it ran."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import threading
import tomllib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import get_overloads, get_type_hints

import pytest
import torch

from elastic_moe import Completion, Delta, ElasticRoutingConfig, Engine, SamplingParams
from elastic_moe.engine.streams import DeltaStream
from elastic_moe.errors import ContextLengthError, EngineError, RequestError, RoutingError
from elastic_moe.model.checkpoints.saving import save_checkpoint
from elastic_moe.model.reference.loading import load_model
from tests.conftest import random_weights

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
NAMES = ["full", "L3", "L4-k1", "w2", "t0.9", "p4", "L5-k2-w3-t0.5-p6"]


def test_score_is_the_models_forward_under_the_same_subnet(tiny: Engine) -> None:
    model = load_model(tiny.folder, dtype="float32")
    ids = tiny.encode("The yield expression is used when defining a generator.")
    for name in NAMES:
        expected = model(torch.tensor([ids]), tiny.resolve(name))[0]
        assert torch.allclose(
            torch.from_numpy(tiny.score(ids, name)), expected, rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(
        torch.from_numpy(tiny.score(ids)), torch.from_numpy(tiny.score(ids, "L5"))
    )


def test_generated_tokens_and_logprobs_are_those_of_scoring(tiny: Engine) -> None:
    prompt = tiny.encode("A class definition")
    for name in NAMES:
        done = tiny.generate(prompt, name, GREEDY)
        logprobs = torch.from_numpy(tiny.score([*prompt, *done.token_ids], name)).log_softmax(-1)[
            len(prompt) - 1 :
        ]
        for row, token, reported in zip(logprobs, done.token_ids, done.logprobs, strict=False):
            assert token == int(row.argmax())
            assert reported.token_id == token
            assert reported.logprob == pytest.approx(float(row[token]), abs=2e-4)
            assert reported.top[0][0] == token
            assert reported.top[0][1] >= reported.top[1][1]


def test_tensors_are_prompts_and_bad_ones_are_named(tiny: Engine) -> None:
    ids = [5, 6, 7]
    expected = tiny.generate(ids, None, GREEDY)
    assert tiny.generate(torch.tensor(ids), None, GREEDY).token_ids == expected.token_ids
    assert tiny.generate([torch.tensor(ids), "x"], None, GREEDY)[0].token_ids == expected.token_ids
    for prompt, message in (
        (torch.tensor([1.0]), r"token 0 of the prompt is 1\.0"),
        (torch.tensor([True]), "token 0 of the prompt is True"),
        (torch.tensor([[5, 6]]), r"token 0 of the prompt is \[5, 6\]"),
        (torch.tensor(5), "must be text or a list of token ids, got Tensor"),
    ):
        with pytest.raises(RequestError, match=message):
            tiny.score(prompt)


def test_each_way_to_write_a_routing_runs_the_same_subnet(tiny: Engine) -> None:
    ids = tiny.encode("import this")
    config = ElasticRoutingConfig.full(active_layers=[0, 1, 2], routing_top_k=2)
    by_name, by_config = (
        torch.from_numpy(tiny.score(ids, "L3-k2")),
        torch.from_numpy(tiny.score(ids, config)),
    )
    assert torch.equal(by_name, by_config)
    assert torch.equal(by_name, torch.from_numpy(tiny.score(ids, tiny.resolve("L3-k2"))))


def test_a_completion_reports_what_ran(tiny: Engine) -> None:
    done = tiny.generate("def f(x):", "L4-k2-t1", GREEDY)
    assert done.routing.name == "L4-k2-t1"
    assert done.routing.depth == 4
    assert done.routing.mean_experts == 1.0  # a threshold of 1 keeps the best alone
    assert done.routing.active_params == tiny.resolve("L4-k2-t1").active_params
    assert done.routing.flops_per_token < tiny.resolve("L4-k2").flops_per_token(10)
    assert done.usage.prompt_tokens == len(tiny.encode("def f(x):"))
    assert done.usage.completion_tokens == len(done.token_ids) == 8
    assert done.finish_reason == "length"
    assert 0 < done.usage.ttft_seconds < 60
    assert 0 < done.usage.tpot_seconds < 60
    assert done.text == tiny.decode(done.token_ids)


def test_lists_of_prompts_pair_with_lists_of_settings(tiny: Engine) -> None:
    prompts = ["one", tiny.encode("two"), "three"]
    routings = ["L3", None, "k1"]
    samplings = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 4)]
    together = tiny.generate(prompts, routings, samplings)
    assert [len(done.token_ids) for done in together] == [2, 3, 4]
    assert [done.routing.name for done in together] == ["L3", "full", "k1"]
    for prompt, routing, sampling, done in zip(prompts, routings, samplings, together, strict=True):
        assert tiny.generate(prompt, routing, sampling).token_ids == done.token_ids
    assert tiny.generate([]) == []
    shared = tiny.generate(["one", "three"], "k1", samplings[0])
    assert [done.routing.name for done in shared] == ["k1", "k1"]
    with pytest.raises(RequestError, match="routing lists 2 values for 3 prompts"):
        tiny.generate(prompts, ["L3", "L4"])


def test_a_stream_adds_up_to_its_completion(tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.5, seed=3, ignore_eos=True)
    deltas = list(tiny.stream("Ünïcödé 😀", None, sampling))
    completion = deltas[-1].completion
    assert completion is not None
    assert [d.completion for d in deltas[:-1]] == [None] * 29
    assert "".join(d.text for d in deltas) == completion.text == tiny.decode(completion.token_ids)
    assert tuple(t for d in deltas for t in d.token_ids) == completion.token_ids


@pytest.mark.parametrize("length", [1, 3, 12])
def test_a_stop_text_ends_the_text_before_it_and_is_never_streamed(
    tiny: Engine, length: int
) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=11, ignore_eos=True)
    whole = tiny.generate("Once", None, sampling).text
    assert len(whole) > 40
    stop = whole[20 : 20 + length]
    at = whole.find(stop)
    stopping = SamplingParams(
        max_tokens=40, temperature=1.0, seed=11, ignore_eos=True, stop=("\0never", stop)
    )
    deltas = list(tiny.stream("Once", None, stopping))
    assert "".join(d.text for d in deltas) == whole[:at]
    assert deltas[-1].finish_reason == "stop"


def test_an_end_token_ends_the_text_unless_ignored(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.generate("Once", None, GREEDY)
    end = whole.token_ids[3]
    at = whole.token_ids.index(end)
    monkeypatch.setattr(tiny.tokenizer, "eos_ids", frozenset({end}))
    done = tiny.generate("Once", None, SamplingParams(max_tokens=8))
    assert done.token_ids == whole.token_ids[: at + 1]
    assert done.finish_reason == "stop"
    assert done.text == tiny.decode(whole.token_ids[:at])  # the end token is no text
    assert tiny.generate("Once", None, GREEDY).token_ids == whole.token_ids


def test_dropping_a_stream_leaves_the_engine_usable(tiny: Engine) -> None:
    stream = tiny.stream("Once", None, SamplingParams(max_tokens=50))
    next(stream)
    del stream
    assert tiny.generate("Once", None, GREEDY).usage.completion_tokens == 8


def test_threads_share_an_engine_and_get_their_own_answers(tiny: Engine) -> None:
    alone = [tiny.generate(f"prompt {n}", NAMES[n % 7], GREEDY).token_ids for n in range(8)]
    found: dict[int, tuple[int, ...]] = {}

    def work(n: int) -> None:
        found[n] = tiny.generate(f"prompt {n}", NAMES[n % 7], GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(8)] == alone


def test_async_calls_equal_the_blocking_ones(tiny: Engine) -> None:
    async def both() -> tuple[object, list[str]]:
        done = tiny.agenerate("async", "L3", GREEDY)
        texts = [delta.text async for delta in tiny.astream("async", "L3", GREEDY)]
        return await done, texts

    done, texts = asyncio.run(both())
    expected = tiny.generate("async", "L3", GREEDY)
    assert done.token_ids == expected.token_ids
    assert "".join(texts) == expected.text


def test_bad_requests_are_refused_at_the_call(tiny: Engine) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        tiny.generate([[]])
    with pytest.raises(RequestError, match=r"token 1 of the prompt is 4096; .* \[0, 4096\)"):
        tiny.score([1, 4096])
    with pytest.raises(
        ContextLengthError, match=r"700 tokens .* 64.* 764.* 640 positions"
    ) as caught:
        tiny.stream([5] * 700)
    assert (caught.value.prompt_tokens, caught.value.limit_tokens) == (700, 640)
    with pytest.raises(RoutingError, match=r"depth must be an integer in \[1, 6\], got 7"):
        tiny.stream("x", "L7")
    with pytest.raises(RoutingError, match="max_depth is 48, but the model has 6 layers"):
        tiny.score([1], ElasticRoutingConfig())
    assert tiny.generate([5] * 638, None, SamplingParams(max_tokens=2)).usage.prompt_tokens == 638


def test_a_closed_engine_refuses_to_run(tiny_folder: object) -> None:
    with Engine.from_pretrained(tiny_folder) as engine:
        stream = engine.stream("x", None, SamplingParams(max_tokens=600, ignore_eos=True))
        next(stream)
    with pytest.raises(EngineError, match="closed before the request had ended"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        engine.score([1])


def _use_in_child(engine: Engine, queue: object) -> None:
    try:
        engine.score([1])
    except EngineError as error:
        queue.put(str(error))
    else:
        queue.put("ran")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_use_after_fork_raises(tiny: Engine) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_use_in_child, args=(tiny, queue))
    child.start()
    assert "after a fork" in queue.get(timeout=60)
    child.join()


def test_backends_are_what_was_asked_for(tiny_folder: object) -> None:
    assert Engine.from_pretrained(tiny_folder, backend="reference").backend == "reference"
    with pytest.raises(EngineError, match="backend must be"):
        Engine.from_pretrained(tiny_folder, backend="gpu")
    assert Engine.from_pretrained(tiny_folder).dtype == "bfloat16"
    assert Engine.from_pretrained(tiny_folder, dtype="float32").dtype == "float32"


def test_the_three_configurations_of_the_design_run_on_the_bundled_model(mini: Engine) -> None:
    layers = list(range(48))
    texts = {
        "L32-k2-t0.65": {},
        "L36-k2-w6-t0.7": {
            "activeLayers": layers[:36],
            "expertWidth": 6,
            "sparsityThreshold": 0.7,
        },
        "k2-t0.5": {
            "activeLayers": layers,
            "sparsityThreshold": 0.5,
            "fallbackStrategy": "retry",
        },
    }
    answers = set()
    for name, text in texts.items():
        config = ElasticRoutingConfig.parse_json(json.dumps(text))
        done = mini.generate("The import statement", config, GREEDY)
        assert done.routing.name == name
        assert 1 <= done.routing.mean_experts < 2
        answers.add(tuple(entry.logprob for entry in done.logprobs))
    assert len(answers) == 3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_generation(
    temperature: float, backend: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "huge")
    weights = random_weights()
    weights["layers.2.mlp.experts.down_proj"].fill(3e38)
    config = json.loads((tiny_folder / "config.json").read_text())
    save_checkpoint(tmp_path / "huge", weights, config)
    engine = Engine.from_pretrained(tmp_path / "huge", dtype="float32", backend=backend)
    with pytest.raises(EngineError, match="the logits after 3 tokens are not numbers"):
        engine.generate([1, 2, 3], sampling=SamplingParams(max_tokens=2, temperature=temperature))


def test_calls_say_what_they_return() -> None:
    """To a type checker: `tests/interop/engine_types.py`, which `mypy --strict` reads."""
    returned = {
        name: [get_type_hints(overload)["return"] for overload in get_overloads(method)]
        for name, method in vars(Engine).items()
        if name in ("generate", "agenerate", "stream", "astream")
    }
    both = [Completion, list[Completion]]
    assert returned["generate"] == returned["agenerate"] == both
    assert returned["stream"] == [DeltaStream] * 2
    assert returned["astream"] == [AsyncGenerator[Delta]] * 2
    types = Path(__file__).parents[1] / "interop" / "engine_types.py"
    checked = tomllib.loads((types.parents[2] / "pyproject.toml").read_text())["tool"]["mypy"]
    assert checked["strict"] is True
    assert any(types.is_relative_to(types.parents[2] / folder) for folder in checked["files"])
    assert all(f"engine.{name}(" in types.read_text() for name in returned)
