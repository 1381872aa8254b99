"""The contestants' side of the pipe: one request a line, one reply a line; idle in between.

Runs under each contestant's own Python, so it needs nothing but the standard library and numpy.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Ids = Sequence[Sequence[int]]


class Contestant(Protocol):
    """A way to run a model: as `elastic_moe.lab.bench.batch.Batch`, with arrays for logits."""

    def start(self, contexts: Ids, keep: bool) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> np.ndarray: ...


def serve(handlers: dict[str, Callable[..., Any]], versions: dict[str, str]) -> None:
    """Answer requests until standard input ends. What libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    send({"result": {"python": platform.python_version(), **versions}})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = handlers[request.pop("do")](**request)
        except Exception:  # noqa: BLE001  (whatever it is, the asking side must hear of it)
            send({"error": traceback.format_exc()})
        else:
            send({"result": result})


def model_handlers(contestant: Contestant) -> dict[str, Callable[..., Any]]:
    """What can be asked of whatever runs a whole model."""

    def time_prefill(contexts: Ids, repeats: int) -> dict[str, Any]:
        contestant.start(contexts, keep=False)
        return timed(lambda _: contestant.start(contexts, keep=False), range(repeats), contestant)

    def time_decode(contexts: Ids, tokens: Ids) -> dict[str, Any]:
        """The first of `tokens`, one per sequence, warms up."""
        contestant.start(contexts, keep=True)
        contestant.decode(tokens[0])
        return timed(contestant.decode, tokens[1:], contestant)

    def logits(contexts: Ids, tokens: Ids, path: str) -> None:
        """Save (1 + steps, S, V) float32: after the contexts, and after each token."""
        rows = [np.array(contestant.start(contexts, keep=True), dtype=np.float32)]
        rows += [np.array(contestant.decode(ids), dtype=np.float32) for ids in tokens]
        np.save(path, np.stack(rows))

    return {"time_prefill": time_prefill, "time_decode": time_decode, "logits": logits}


class LayerContestant(Protocol):
    """A way to run MoE layers one by one."""

    def prepare(self, rows: int, who: str) -> int:
        """Make inputs of `rows` rows for contestant `who`; returns the number of layers."""
        ...

    def run(self, layer: int) -> object: ...

    def result(self, layer: int) -> np.ndarray:
        """Run it by itself; (T, D)."""
        ...


def layer_handlers(contestant: LayerContestant) -> dict[str, Callable[..., Any]]:
    """What can be asked of whatever runs one MoE layer at a time."""

    def time_layers(rows: int, repeats: int, who: str) -> dict[str, Any]:
        """Seconds per layer, over cycles through all layers' weights."""
        layers = contestant.prepare(rows, who)

        def cycle(_: object) -> None:
            for layer in range(layers):
                contestant.run(layer)

        cycle(None)
        best = timed(cycle, range(repeats))
        return {**best, "seconds": best["seconds"] / layers}

    def outputs(rows: int, path: str, who: str) -> None:
        """Save (layers, T, D) float32."""
        layers = range(contestant.prepare(rows, who))
        np.save(path, np.stack([np.array(contestant.result(i), np.float32) for i in layers]))

    return {"time_layers": time_layers, "outputs": outputs}


def timed(
    call: Callable[[Any], object], arguments: Sequence[Any], contestant: object = None
) -> dict[str, Any]:
    """Seconds of the fastest call, what it did if the contestant counts, and seconds of all."""
    count: Callable[[], dict[str, Any]] = getattr(contestant, "work", dict)
    calls = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        calls.append({"seconds": time.perf_counter() - start, **count()})
    best = min(calls, key=lambda c: c["seconds"])
    return {**best, "all_seconds": [c["seconds"] for c in calls]}
