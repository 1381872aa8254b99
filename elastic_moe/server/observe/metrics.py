"""Numbers of what the server has done. Counted when requests end, in the event loop's thread."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from elastic_moe.engine.outputs import Completion
from elastic_moe.server.observe.account import OTHER, Account

MAX_SUBNETS = 100  # that are told apart; clients choose the names, and each is kept for ever
ABORTED = "abort"
_SMOOTHING = 0.1  # how much the newest request counts in what is remembered of their times

# In seconds: those of vLLM, so that queries for one of its buckets find it, and shorter ones.
_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_EXPERTS = (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)


class Histogram:
    """How many values were not above each bound. Takes a value many times at no more cost.

    Attributes:
        sum: of all values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Bounds and how many values were not above them, as Prometheus writes them."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


class Metrics:
    """Attributes are counts since the server began, and histograms of seconds or tokens.

    Generations are those that were finished, one for every prompt; times are the engine's own, of
    the first choice. A request that ends otherwise leaves no times, as nobody waited for them.

    Attributes:
        responses: by endpoint and status.
        subnets: requests by the name of their sub-network, at most `MAX_SUBNETS` names and "other".
        timeouts: by what was late: "read" or "request".
        rejected: requests that were answered 429.
        gone: requests whose client went before the end.
        broken: answers that began and ended with an error.
        finished: generations by reason; requests that were cancelled count as "abort".
        first_token: from the call to the first token.
        between_tokens: the mean time between two tokens of each generation, counted once for each
            of its pauses. Sum and count are exact; only what differs within one generation is not
            told apart, as to look at every token would cost the event loop more than sending it.
        per_token: the same, counted once for each generation.
        whole: from the call to the last token.
        queued, prefill, decode, inference: its parts: to the first step, from there to the first
            token, from there to the last; inference is the latter two.
        prompt_tokens, written_tokens: of each generation.
        mean_experts: that ran per token and MoE layer, of each generation.
        run_seconds: the smoothed time that a generation runs; None before the first has ended.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.subnets: Counter[str] = Counter()
        self.timeouts = Counter({"read": 0, "request": 0})
        self.finished = Counter({"stop": 0, "length": 0, ABORTED: 0})
        self.rejected = self.gone = self.broken = 0
        self.first_token = Histogram(_FIRST)
        self.between_tokens = Histogram(_BETWEEN)
        self.per_token = Histogram(_BETWEEN)
        self.whole = Histogram(_WHOLE)
        self.queued = Histogram(_WHOLE)
        self.prefill = Histogram(_WHOLE)
        self.decode = Histogram(_WHOLE)
        self.inference = Histogram(_WHOLE)
        self.prompt_tokens = Histogram(_TOKENS)
        self.written_tokens = Histogram(_TOKENS)
        self.mean_experts = Histogram(_EXPERTS)
        self.run_seconds: float | None = None

    def ended(self, account: Account) -> None:
        """Count a request that has ended."""
        if account.status is not None:
            self.responses[account.endpoint, account.status] += 1
        self.rejected += account.status == 429
        self.gone += account.outcome == "gone"
        self.broken += account.failed
        if account.late is not None:
            self.timeouts[account.late] += 1
        if account.subnet is not None:
            known = account.subnet in self.subnets or len(self.subnets) < MAX_SUBNETS
            self.subnets[account.subnet if known else OTHER] += 1
            self.finished[ABORTED] += account.outcome in ("gone", "timeout")
        for completion in account.completions:
            self._generated(completion)

    def _generated(self, done: Completion) -> None:
        usage, pauses = done.usage, max(0, len(done.token_ids) - 1)
        decode = pauses * usage.tpot_seconds
        whole = usage.ttft_seconds + decode
        self.finished[done.finish_reason] += 1
        self.first_token.observe(usage.ttft_seconds)
        self.whole.observe(whole)
        self.queued.observe(usage.queue_seconds)
        self.prefill.observe(usage.ttft_seconds - usage.queue_seconds)
        self.decode.observe(decode)
        self.inference.observe(whole - usage.queue_seconds)
        if pauses:
            self.between_tokens.observe(usage.tpot_seconds, pauses)
            self.per_token.observe(usage.tpot_seconds)
        self.prompt_tokens.observe(usage.prompt_tokens)
        self.written_tokens.observe(usage.completion_tokens)
        self.mean_experts.observe(done.routing.mean_experts)
        ran = whole - usage.queue_seconds
        before = ran if self.run_seconds is None else self.run_seconds
        self.run_seconds = before + _SMOOTHING * (ran - before)
