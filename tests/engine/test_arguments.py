"""What the engine refuses: prompts, sampling values, devices, levels; each with a typed error."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine import request as request_module
from elastic_moe.errors import EngineError, RequestError
from tests.foreign import Foreign

TWO = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", float("inf")),
        ("max_tokens", True),
        ("max_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "a"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", "1"),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", ""),
        ("stop", [3]),
        ("stop", 3),
        ("stop", b"end"),
        ("stop", None),
        ("ignore_eos", 1),
        ("n", 0),
        ("n", 129),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [5]),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [-5]),
        ("stop_token_ids", 5),
        ("min_tokens", -1),
        ("prompt_logprobs", 21),
        ("json_schema", "{"),
        ("json_schema", [1]),
        ("json_schema", {"a": {1}}),
        ("json_object", 1),
        ("forced_text", 5),
        ("forced_text", [-1]),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", 1.0),
    ],
)
def test_bad_sampling_values_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{field} must be .* got "):
        SamplingParams(**{field: value})


def test_numpys_numbers_are_numbers_in_sampling() -> None:
    params = SamplingParams(
        max_tokens=np.int64(3), top_k=np.int32(2), temperature=np.float32(0.5), stop=["a", "b"]
    )
    assert type(params.max_tokens) is int
    assert params == SamplingParams(max_tokens=3, top_k=2, temperature=0.5, stop=("a", "b"))


IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        range(5, 8),
        [np.int64(i) for i in IDS],
        np.array(IDS),
        Foreign(np.array(IDS)),
    ],
    ids=["tuple", "range", "numpy-integers", "array", "another-library"],
)
def test_ids_of_every_integer_kind_are_one_prompt(tiny: Engine, prompt: object) -> None:
    expected = tiny.generate(IDS, None, TWO)
    assert tiny.generate(prompt, None, TWO).token_ids == expected.token_ids
    assert tiny.generate([prompt, "x"], None, TWO)[0].token_ids == expected.token_ids
    assert np.array_equal(tiny.score(prompt), tiny.score(IDS))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([True], "token 0 of the prompt is True; ids must be integers"),
        ([5, 1.5], r"token 1 of the prompt is 1\.5; ids must be integers"),
        ([5, "x"], "token 1 of the prompt is 'x'"),
        ([None], "token 0 of the prompt is None"),
        (b"hi", "must be text or a list of token ids, got bytes"),
        (5, "must be text or a list of token ids, got int 5"),
        (None, "must be text or a list of token ids, got NoneType"),
        ({5: 6}, "must be text or a list of token ids, got dict"),
        (np.array([1.0]), r"token 0 of the prompt is 1\.0"),
        (np.array([True]), "token 0 of the prompt is True"),
        (np.array([[5, 6]]), r"token 0 of the prompt is \[5, 6\]"),
        (np.array(5), "must be text or a list of token ids, got ndarray"),
        ([], "no tokens"),
    ],
)
def test_what_is_no_prompt_is_refused_at_the_call(
    tiny: Engine, prompt: object, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.stream(prompt)
    with pytest.raises(RequestError, match=message):
        tiny.score(prompt)
    with pytest.raises(RequestError, match=message):
        tiny.generate(["fine", prompt])


def test_text_that_utf8_cannot_say_is_refused(tiny: Engine) -> None:
    with pytest.raises(RequestError, match=r"character 2 is the lone surrogate '\\udcff'"):
        tiny.generate("ab\udcffc")
    with pytest.raises(RequestError, match="lone surrogate"):
        tiny.encode("\ud800")


def test_sampling_must_be_sampling_params(tiny: Engine) -> None:
    with pytest.raises(RequestError, match="sampling must be a SamplingParams, got dict"):
        tiny.stream("x", None, {"max_tokens": 3})


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_named_before_anything_is_read(device: str) -> None:
    with pytest.raises(EngineError, match=f"device .*{device}.*"):
        Engine.from_pretrained("no/such/model", device=device)


@pytest.mark.needs_torch
def test_cuda_without_cuda_is_an_engine_error(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EngineError, match=r"'cuda' is not there: .* 0 CUDA devices\. Use device="):
        Engine.from_pretrained(tiny_folder, device="cuda")


def test_a_closed_engine_refuses_a_stream_at_the_call_and_still_reads_text(
    tiny_folder: Path,
) -> None:
    engine = Engine.from_pretrained(tiny_folder)
    ids = engine.encode("a b")
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.stream("x")
    with pytest.raises(EngineError, match="closed"):
        engine.generate(["x"])
    assert engine.encode("a b") == ids
    assert engine.decode(ids) == "a b"
    assert engine.resolve("L3").depth == 3


@pytest.mark.needs_torch
def test_a_level_that_is_not_there_is_an_engine_error(tiny_folder: Path) -> None:
    code = (
        "from elastic_moe import Engine\n"
        "from elastic_moe.errors import EngineError\n"
        "from elastic_moe_kernels import ops\n"
        "assert not ops.available('cpu')\n"
        "assert not ops.backends()[1].available\n"
        f"assert Engine.from_pretrained({str(tiny_folder)!r}, backend='reference')\n"
        "for backend in ('auto', 'cpu'):\n"
        "    try:\n"
        f"        Engine.from_pretrained({str(tiny_folder)!r}, backend=backend)\n"
        "    except EngineError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "ELASTIC_MOE_ISA": "bogus"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("ELASTIC_MOE_ISA must be one of ") for line in lines)


def test_tpot_is_the_time_after_the_first_token_over_all_tokens_but_it(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves by 1 s at each look: start 0, first step 1, first token 2, end 3."""
    clock = itertools.count()
    monkeypatch.setattr(request_module.time, "perf_counter", lambda: float(next(clock)))
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    usage = tiny.generate(IDS, None, sampling).usage
    assert usage.completion_tokens == 5
    assert (usage.queue_seconds, usage.ttft_seconds) == (1.0, 2.0)
    assert usage.tpot_seconds == 1.0 / 4
    only = tiny.generate(IDS, None, SamplingParams(max_tokens=1, ignore_eos=True)).usage
    assert (only.ttft_seconds, only.tpot_seconds) == (2.0, 0.0)
