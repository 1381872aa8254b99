"""`isa="portable"`: the same texts and log-probabilities to the last digit, whatever the machine.

What other machines have less of is taken away from this one by their libraries' own switches.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import httpx2
import numpy as np
import pytest
from elastic_moe_kernels import native

from elastic_moe.testing import ElasticMoEServer, start_server

PROMPTS = ["The with statement is used to", "def dedent(text):\n", "Once upon a time"]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "model": "elastic-mini@L24-k2-t0.7"},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.5, "seed": 8, "n": 2},
]
GOLDEN = (  # of PROMPTS[0], WAYS[0]
    " be called\nto the function.  If the function is called, the function will\n"
    "be used to be called with"
)


def answers(server: ElasticMoEServer) -> tuple[str, list[Any]]:
    """What it calls itself, and all that it writes."""
    reported, fingerprints = [], set()
    with httpx2.Client(base_url=server.base_url, trust_env=False, timeout=60) as http:
        http.headers["authorization"] = f"Bearer {server.api_key}"
        for way in WAYS:
            asked = {"model": "elastic-mini", "max_tokens": 24, "logprobs": 3, **way}
            done = http.post("completions", json={"prompt": PROMPTS, **asked}).json()
            fingerprints.add(done["system_fingerprint"])
            reported += [(choice["text"], choice["logprobs"]) for choice in done["choices"]]
        asked = {"model": "elastic-mini", "input": PROMPTS}
        reported.append(
            [one["embedding"] for one in http.post("embeddings", json=asked).json()["data"]]
        )
    (fingerprint,) = fingerprints
    return fingerprint, reported


def callers() -> list[dict[str, str]]:
    """Environments: every other level of this machine, the last with less of a processor."""
    # Names of what numpy has code for and this processor runs; its own way to ask is private.
    core: Any = np._core._multiarray_umath
    features = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]
    old = {
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": " ".join(features),
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
    }
    levels = native.levels()[1:] or ("",)
    plain = [{"ELASTIC_MOE_ISA": level} for level in levels]
    return [*plain[:-1], {**plain[-1], **old}]


@pytest.mark.skipif(not native.levels(), reason="the C++ kernels are not installed")
def test_the_portable_level_writes_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch, elastic_moe_server: ElasticMoEServer
) -> None:
    seen = [_run(environment, monkeypatch, isa="portable") for environment in callers()]
    assert {fingerprint for fingerprint, _ in seen} == {"em-cpu-portable-bfloat16"}
    reported = seen[0][1]
    assert all(other == reported for _, other in seen)
    if platform.machine() in {"x86_64", "AMD64"}:  # where it is promised
        assert reported[0][0] == GOLDEN

    fingerprint, unpinned = answers(elastic_moe_server)
    assert fingerprint == f"em-cpu-{native.level()}-bfloat16"
    assert (unpinned == reported) == (native.level() == "portable")


def _run(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[str, list[Any]]:
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with start_server(**options) as server:
            return answers(server)
