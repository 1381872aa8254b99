"""Counters and histograms of requests, updated when they end, in the event loop's thread."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from elastic_moe.engine.outputs import Completion
from elastic_moe.server.observe.access_record import AccessRecord

MAX_SUBNETS = 100  # clients choose the names, and each stays in memory
OTHER_SUBNETS = "other"
ABORTED = "abort"
_SMOOTHING = 0.1  # weight of the newest generation in `run_seconds`

# Bounds in seconds: vLLM's, so that queries for one of its buckets find it, and shorter ones.
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_E2E = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_EXPERTS = (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)


class Histogram:
    """Counts of values up to each bound, as Prometheus has them.

    Attributes:
        sum: of all values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value `times` times, at the cost of one."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Pairs of bound and cumulative count; the last bound is "+Inf"."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


class Metrics:
    """Counts since the server started, and histograms of seconds or tokens.

    A generation is a prompt that was completed; its times are the engine's, of the first choice.
    Requests that were cancelled have no times.

    Attributes:
        responses: by endpoint and status.
        subnets: requests by sub-network: at most `MAX_SUBNETS` names, then `OTHER_SUBNETS`.
        timeouts: by limit: "read" or "request".
        rejected: requests answered 429.
        disconnected: requests whose client closed the connection early.
        failed: responses that started and ended with an error.
        finished: generations by finish_reason; `ABORTED` counts cancelled requests.
        ttft: from the call to the first token.
        itl: mean time between two tokens of a generation, counted once per pause. Sum and count
            are exact. The spread within a generation is lost: to observe each token would cost the
            event loop more than to send it.
        tpot: the same, counted once per generation.
        e2e: from the call to the last token.
        queue, prefill, decode: its parts: up to the first step, then up to the first token, then
            up to the last.
        inference: prefill and decode.
        prompt_tokens, completion_tokens: per generation.
        mean_experts: experts that ran per token and MoE layer; per generation.
        run_seconds: smoothed `inference` of recent generations; None before the first.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.subnets: Counter[str] = Counter()
        self.timeouts = Counter({"read": 0, "request": 0})
        self.finished = Counter({"stop": 0, "length": 0, ABORTED: 0})
        self.rejected = self.disconnected = self.failed = 0
        self.ttft = Histogram(_TTFT)
        self.itl = Histogram(_ITL)
        self.tpot = Histogram(_ITL)
        self.e2e = Histogram(_E2E)
        self.queue = Histogram(_E2E)
        self.prefill = Histogram(_E2E)
        self.decode = Histogram(_E2E)
        self.inference = Histogram(_E2E)
        self.prompt_tokens = Histogram(_TOKENS)
        self.completion_tokens = Histogram(_TOKENS)
        self.mean_experts = Histogram(_EXPERTS)
        self.run_seconds: float | None = None

    def observe(self, record: AccessRecord) -> None:
        """Count a request that has ended."""
        if record.status is not None:
            self.responses[record.endpoint, record.status] += 1
        self.rejected += record.status == 429
        self.disconnected += record.disconnected and record.timed_out is None
        self.failed += record.failed
        if record.timed_out is not None:
            self.timeouts[record.timed_out] += 1
        if record.subnet is not None:
            known = record.subnet in self.subnets or len(self.subnets) < MAX_SUBNETS
            self.subnets[record.subnet if known else OTHER_SUBNETS] += 1
            self.finished[ABORTED] += record.disconnected or record.timed_out is not None
        for completion in record.completions:
            self._observe_generation(completion)

    def _observe_generation(self, done: Completion) -> None:
        usage, pauses = done.usage, max(0, len(done.token_ids) - 1)
        decode = pauses * usage.tpot_seconds
        e2e = usage.ttft_seconds + decode
        self.finished[done.finish_reason] += 1
        self.ttft.observe(usage.ttft_seconds)
        self.e2e.observe(e2e)
        self.queue.observe(usage.queue_seconds)
        self.prefill.observe(usage.ttft_seconds - usage.queue_seconds)
        self.decode.observe(decode)
        self.inference.observe(e2e - usage.queue_seconds)
        if pauses:
            self.itl.observe(usage.tpot_seconds, pauses)
            self.tpot.observe(usage.tpot_seconds)
        self.prompt_tokens.observe(usage.prompt_tokens)
        self.completion_tokens.observe(usage.completion_tokens)
        self.mean_experts.observe(done.routing.mean_experts)
        newest = e2e - usage.queue_seconds
        smoothed = newest if self.run_seconds is None else self.run_seconds
        self.run_seconds = smoothed + _SMOOTHING * (newest - smoothed)
