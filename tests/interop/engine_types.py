"""The public face of the engine for a type checker: `mypy --strict` reads this, nothing runs it.

An `assert_type` that does not hold is an error of the type checker.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

from elastic_moe import Completion, Delta, Engine, SamplingParams
from elastic_moe.engine import Choice, RoutingStats, TokenLogprob, Usage
from elastic_moe.engine.streams import DeltaStream
from elastic_moe.routing import Subnet

PARAMS = SamplingParams(max_tokens=3)


def blocking(engine: Engine) -> None:
    assert_type(engine.generate("a"), Completion)
    assert_type(engine.generate([1, 2], "L3", PARAMS), Completion)
    assert_type(engine.generate(["a", [1, 2]], ["L3", None], [PARAMS, PARAMS]), list[Completion])
    assert_type(engine.stream("a"), DeltaStream)
    with_close = engine.stream(["a", "b"], None, [PARAMS, PARAMS])
    assert_type(next(with_close), Delta)
    with_close.close()
    for delta in engine.stream([1, 2]):
        assert_type(delta, Delta)


async def awaiting(engine: Engine) -> None:
    assert_type(await engine.agenerate("a"), Completion)
    assert_type(await engine.agenerate([1, 2], "L3", PARAMS), Completion)
    assert_type(await engine.agenerate(["a", "b"], [None, "k1"]), list[Completion])
    deltas = engine.astream(["a", "b"], ["L3", None])
    assert_type(deltas, AsyncGenerator[Delta])
    async for delta in engine.astream("a"):
        assert_type(delta, Delta)
    await deltas.aclose()


def parts(engine: Engine, completion: Completion, delta: Delta) -> None:
    assert_type(engine.encode("a"), list[int])
    assert_type(engine.decode([1]), str)
    assert_type(engine.score([1], "L3"), NDArray[np.float32])
    assert_type(engine.resolve("L3"), Subnet)
    assert_type(completion.usage, Usage)
    assert_type(completion.routing, RoutingStats)
    assert_type(completion.choices, tuple[Choice, ...])
    assert_type(completion.logprobs, tuple[TokenLogprob, ...] | None)
    assert_type(delta.completion, Completion | None)
    assert_type((delta.text, delta.prompt, delta.choice), tuple[str, int, int])
