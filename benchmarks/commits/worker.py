"""One commit's side of the pipe: worker.py, run in its checkout by its interpreter.

Reads the name of a slice a line, runs it, answers with a line of JSON. Uses only names that both
commits have: the public API, the native extension's step methods, `benchmarks.serving.inside`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path.cwd())]  # in place of this file's folder

import numpy as np  # noqa: E402

from benchmarks.serving.inside import inside  # noqa: E402
from elastic_moe import Engine, SamplingParams  # noqa: E402

NATIVE_STEPS = ("step", "advance")
TWELVE = [f"L{depth}-k{k}" for depth in (48, 42, 36, 30, 24, 18) for k in (2, 3)]


class NativeTime:
    """Adds up the seconds inside native steps, by wrapping the methods of their class."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        native = sys.modules["elastic_moe_kernels._native"]  # an engine has loaded it
        for kind in vars(native).values():
            if isinstance(kind, type):
                for method in NATIVE_STEPS:
                    if hasattr(kind, method):
                        setattr(kind, method, self._timed(getattr(kind, method)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


class Slices:
    """What is timed: each method runs for less than a second and returns seconds per unit."""

    def __init__(self, stack: ExitStack) -> None:
        self.engine = stack.enter_context(
            Engine.from_pretrained("elastic-mini", backend="cpu", dtype="bfloat16")
        )
        self.native = NativeTime()
        self.server = stack.enter_context(inside(self.engine))
        self.draws = np.random.default_rng(0)

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        """Token ids that no cached prefix serves."""
        return self.draws.integers(300, 4000, (count, length)).tolist()  # type: ignore[no-any-return]

    def _write(self, prompts: list[list[int]], tokens: int, routing: Any = None) -> float:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        self.engine.generate(prompts, routing, params)
        return time.perf_counter() - start

    def decode(self) -> float:
        """Seconds per token of one sequence, 160 tokens after a prompt of 32."""
        return self._write(self._prompts(1, 32), 160) / 160

    def decode16(self) -> float:
        """Seconds per step of 16 sequences, 30 tokens each."""
        return self._write(self._prompts(16, 8), 30) / 30

    def prefill(self) -> float:
        """Seconds per token of a prompt of 512."""
        return self._write(self._prompts(1, 512), 1) / 512

    def outside(self) -> float:
        """Seconds per step outside the native call, 16 sequences."""
        return self._outside(None)

    def outside_mixed(self) -> float:
        """The same with 12 sub-networks at once."""
        return self._outside([TWELVE[i % 12] for i in range(16)])

    def _outside(self, routing: list[str] | None) -> float:
        native, calls = self.native.seconds, self.native.calls
        seconds = self._write(self._prompts(16, 8), 30, routing)
        return (seconds - (self.native.seconds - native)) / (self.native.calls - calls)

    def stream(self) -> float:
        """CPU seconds of the server per streamed token, one stream of 200 tokens."""
        return self._stream(1, 200)

    def stream16(self) -> float:
        """The same with 16 streams of 30 tokens."""
        return self._stream(16, 30)

    def _stream(self, streams: int, tokens: int) -> float:
        bodies = [
            {
                "messages": [{"role": "user", "content": f"{self.draws.integers(1 << 30)}"}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for _ in range(streams)
        ]
        before = self.server.loop_seconds() + self.server.other_seconds()
        self.server.stream("/v1/chat/completions", bodies)
        spent = self.server.loop_seconds() + self.server.other_seconds() - before
        return spent / (streams * tokens)


def main() -> None:
    with ExitStack() as stack:
        slices = Slices(stack)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(getattr(slices, line.strip())()), flush=True)


main()
