"""How fast a sub-network runs: prefill and decode of one sequence, skipping work for real."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from elastic_moe.engine.running.runner import Chunk, ModelRunner
from elastic_moe.lab.load import LoadMonitor
from elastic_moe.routing import Subnet

PREFILL_TOKENS = 512
DECODE_CONTEXT_TOKENS = 64


class Spread(NamedTuple):
    """A figure over the rounds of a measurement."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        kept = list(values)
        return cls(min(kept), statistics.median(kept), max(kept))

    def rate(self, amount: float) -> Spread:
        """Of seconds for `amount`: `amount` per second. The slowest round has the lowest."""
        return Spread(amount / self.max, amount / self.median, amount / self.min)


def measure_speed(
    runner: ModelRunner,
    subnets: Sequence[Subnet],
    ids: Sequence[int],
    *,
    rounds: int,
    decode_tokens: int,
    load: LoadMonitor | None = None,
) -> Iterator[tuple[int, list[tuple[Spread, Spread]]]]:
    """Time every sub-network in turn, round after round, so that a machine's drift hits all alike.

    Args:
        ids: at least 512 tokens of real text.
        rounds: how often each sub-network is timed.
        decode_tokens: tokens decoded per round, after a context of 64.
        load: read before each measurement.

    Yields:
        (measurements done, []) after each, and last (all, [(prefill, decode) tokens per second]).
    """
    prompt = list(ids[:PREFILL_TOKENS])
    seconds: list[list[tuple[float, float]]] = [[] for _ in subnets]
    done = 0
    _time_once(runner, subnets[0], prompt, 1)  # warms up
    for _ in range(rounds):
        for subnet, kept in zip(subnets, seconds, strict=True):
            if load is not None:
                load.read()
            kept.append(_time_once(runner, subnet, prompt, decode_tokens))
            done += 1
            yield done, []
    speeds = [
        (
            Spread.of(prefill for prefill, _ in kept).rate(len(prompt)),
            Spread.of(decode for _, decode in kept).rate(decode_tokens),
        )
        for kept in seconds
    ]
    yield done, speeds


def _time_once(
    runner: ModelRunner, subnet: Subnet, prompt: Sequence[int], decode_tokens: int
) -> tuple[float, float]:
    """Seconds of one prefill (last row's logits), and of decoding `decode_tokens` tokens."""
    sequence = runner.open(subnet, len(prompt))
    started = time.perf_counter()
    _ = runner.run([Chunk(sequence, prompt)]).logits.argmax().item()
    prefill = time.perf_counter() - started

    context = prompt[:DECODE_CONTEXT_TOKENS]
    sequence = runner.open(subnet, len(context) + decode_tokens)
    token = int(runner.run([Chunk(sequence, context)]).logits.argmax())
    started = time.perf_counter()
    for _ in range(decode_tokens):
        token = int(runner.run([Chunk(sequence, [token])]).logits.argmax())
    return prefill, time.perf_counter() - started
