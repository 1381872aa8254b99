"""How fast one checkpoint runs here, beside what the machine gives at most.

Rounds alternate: the limits, then each case, so that a machine's drift hits all alike. Within a
round a case's time is that of its fastest call, as the limits are; over the rounds it is the
median. All cases compute the logits of the last row of every sequence and nothing else.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_moe.errors import BenchmarkError
from elastic_moe.lab.bench.batch import Batch, Work
from elastic_moe.lab.bench.limits import READ_BYTES, Limits, LimitsProbe
from elastic_moe.lab.bench.speed import Spread
from elastic_moe.lab.load import LoadMonitor
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.routing import Subnet

PREFILL_TOKENS, CONTEXT_TOKENS, SEQUENCES, SHORT_CONTEXT_TOKENS = 512, 64, 16, 32
ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_READ_BYTES = 1 << 27
MAX_ERROR = {"bfloat16": 0.1, "float32": 1e-3}  # of our step against the reference
CHECKED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is timed: prompts of `context` tokens, then `steps` tokens for each.

    With no steps the prompts themselves are what is timed.
    """

    name: str
    sequences: int
    context: int
    steps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The fastest call of a case in one round."""

    seconds: float
    work: Work | None
    limits: Limits


def cases(max_positions: int, *, quick: bool) -> list[Case]:
    """Prefill, decode and decode of 16, as far as a model's positions go.

    Raises:
        BenchmarkError: the model has too few positions to decode anything.
    """
    steps = 4 if quick else 16
    if max_positions < CONTEXT_TOKENS + steps + 1:
        raise BenchmarkError(
            f"the model has {max_positions} positions, and at least {CONTEXT_TOKENS + steps + 1} "
            f"are needed to time decoding after {CONTEXT_TOKENS} tokens."
        )
    return [
        Case("prefill", 1, min(PREFILL_TOKENS, max_positions), 0),
        Case("decode", 1, CONTEXT_TOKENS, steps),
        Case("decode16", SEQUENCES, SHORT_CONTEXT_TOKENS, steps // 2),
    ]


def check_batch(
    batch: Batch, reference: Batch, subnet: Subnet, ids: Sequence[int], dtype: str
) -> float:
    """How far the logits are from those of a reference: root mean square of the difference.

    Returns:
        The error over the root mean square of the logits.

    Raises:
        BenchmarkError: it is beyond what rounding does.
    """
    context, token = [list(ids[:CHECKED_TOKENS])], [ids[CHECKED_TOKENS]]
    worst = 0.0
    for got, exact in (
        (batch.start(context, subnet), reference.start(context, subnet)),
        (batch.decode(token), reference.decode(token)),
    ):
        error = float(np.sqrt(np.square(got - exact).mean() / np.square(exact).mean()))
        worst = max(worst, error) if error == error else error  # NaN stays
        if not worst <= MAX_ERROR[dtype]:
            raise BenchmarkError(
                f"backend {batch.backend!r}, level {batch.level!r}: the logits differ from the "
                f"reference's by {worst:.2g} of their size, at most {MAX_ERROR[dtype]:g} is "
                f"rounding. Nothing was timed. Try another level with ELASTIC_MOE_ISA, and report "
                f"this."
            )
    return worst


def bench(
    batch: Batch,
    subnet: Subnet,
    ids: Sequence[int],
    *,
    max_positions: int,
    quick: bool = False,
    dtype: str = "bfloat16",
    started: Callable[[Limits], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time a model.

    Args:
        ids: of text, as many as there are; they repeat.
        dtype: of the multiplications that are the limit, "bfloat16" or "float32".
        started: called with the limits, before anything of the model is timed.
        progress: called with (rounds done, all).

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second`, `decode16_tokens_per_second`, each
        the median over the rounds, with `..._min` and `..._max` of the slowest and the fastest one;
        the bytes that a step touched and the shares of the limits where the backend counts;
        `limits`, and `load` (`LoadMonitor.describe`).
    """
    todo = cases(max_positions, quick=quick)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    size = QUICK_READ_BYTES if quick else READ_BYTES
    probe = LimitsProbe(dtype, read_bytes=size, threads=batch.runner.threads)
    if started is not None:
        started(probe.measure())
    load = LoadMonitor()
    samples: dict[str, list[Sample]] = {case.name: [] for case in todo}
    for number in range(rounds):
        for case in todo:
            load.read()
            limits = probe.measure(reads=3)
            samples[case.name].append(_run(batch, subnet, case, ids, limits))
        if progress is not None:
            progress(number + 1, rounds)
    result: dict[str, Any] = {"prefill_tokens": todo[0].context}
    for case in todo:
        result |= _summarize(case, samples[case.name])
    everything = [sample.limits for kept in samples.values() for sample in kept]
    result["limits"] = {
        name: statistics.median(getattr(limits, name) for limits in everything)
        for name in (
            "read_bytes_per_second",
            "read_huge_bytes_per_second",
            "matmul_flops_per_second",
        )
    } | {"dtype": everything[0].dtype, "threads": everything[0].threads}
    result["load"] = load.describe(threads=result["limits"]["threads"])
    return {**result, "rounds": rounds, "quick": quick}


def describe_run(batch: Batch) -> dict[str, Any]:
    """Backend and level of a run, with machine, versions and commit: entries of its JSON line."""
    return {
        "backend": batch.backend,
        "level": batch.level,
        **describe_provenance(batch.runner.threads),
    }


def random_ids(count: int, vocab_size: int) -> list[int]:
    """Ids for a checkpoint without a tokenizer; the same every time."""
    draw = random.Random(0)
    return [draw.randrange(vocab_size) for _ in range(count)]


def _run(batch: Batch, subnet: Subnet, case: Case, ids: Sequence[int], limits: Limits) -> Sample:
    at = 0

    def take(count: int) -> list[int]:
        nonlocal at
        at += count
        return [ids[i % len(ids)] for i in range(at - count, at)]

    contexts = [take(case.context) for _ in range(case.sequences)]
    batch.start(contexts, subnet)
    timed: list[tuple[float, Work | None]] = []
    if not case.steps:
        for _ in range(2):
            start = time.perf_counter()
            batch.start(contexts, subnet)
            timed.append((time.perf_counter() - start, batch.work()))
    else:
        batch.decode(take(case.sequences))
    for _ in range(case.steps):
        tokens = take(case.sequences)
        start = time.perf_counter()
        batch.decode(tokens)
        timed.append((time.perf_counter() - start, batch.work()))
    seconds, work = min(timed, key=lambda pair: pair[0])
    return Sample(seconds, work, limits)


def _summarize(case: Case, samples: Sequence[Sample]) -> dict[str, Any]:
    """One case's entries of the result."""
    tokens = case.sequences * (1 if case.steps else case.context)
    speed = Spread.of(sample.seconds for sample in samples).rate(tokens)
    key = f"{case.name}_tokens_per_second"
    entries: dict[str, Any] = {key: speed.median, f"{key}_min": speed.min, f"{key}_max": speed.max}
    counted = [(s.seconds, s.work, s.limits) for s in samples if s.work is not None]
    if not counted:
        return entries
    entries[f"{case.name}_touched_bytes"] = statistics.median(
        w.touched_bytes for _, w, _ in counted
    )
    entries[f"{case.name}_flops"] = statistics.median(w.flops for _, w, _ in counted)
    if case.steps:
        entries[f"{case.name}_share_of_read"] = statistics.median(
            w.touched_bytes / s / limits.read_bytes_per_second for s, w, limits in counted
        )
    else:
        entries[f"{case.name}_share_of_matmul"] = statistics.median(
            w.flops / s / limits.matmul_flops_per_second for s, w, limits in counted
        )
    return entries
