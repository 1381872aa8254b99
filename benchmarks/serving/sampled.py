"""Sixteen sampled streams beside sixteen greedy ones, in turns within one engine.

"same texts" has a temperature so low that the greedy tokens come, by the sampler's full work: what
sampling costs. "sampled" draws other texts, which may run more experts or fewer: what users see.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serving.throughput import CONTEXT, NEW_TOKENS, STREAMS, contexts, make_checkpoint
from benchmarks.verdict import Verdict, summary, verdict
from elastic_moe import Engine, SamplingParams

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
WAYS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=1.0, top_p=0.95),
    "same texts": replace(GREEDY, temperature=1e-6, top_p=0.95),
}
LEAST_SHARE = {"elastic-mini": 0.95, "olmoe-0.9b": 0.98}
BARS = {f"same texts over greedy, {name}": f">= {least}" for name, least in LEAST_SHARE.items()}


def measure(folder: Path, rounds: int) -> tuple[dict[str, Any], list[Verdict]]:
    """The case of both models and their verdicts; makes the checkpoint in `folder`."""
    make_checkpoint(folder)
    models, verdicts = [], []
    for name, least in LEAST_SHARE.items():
        case, shares = measure_model(name if name == "elastic-mini" else folder, rounds)
        models.append(case)
        verdicts.append(verdict(f"same texts over greedy, {name}", shares, least))
    sizes = {"streams": STREAMS, "context": CONTEXT, "new_tokens": NEW_TOKENS}
    return {"case": "sampled-16", **sizes, "models": models}, verdicts


def measure_model(model: str | Path, rounds: int) -> tuple[dict[str, Any], list[float]]:
    """Tokens per second of each way, and the share of "same texts" in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    with Engine.from_pretrained(model, max_num_seqs=STREAMS) as engine:
        for number in range(-1, rounds):  # the first warms up
            ids = contexts(number, engine.config.vocab_size)
            texts = {}
            for name in WAYS if number % 2 else reversed(WAYS):
                core = engine._running_core()
                core.call(core.forget_prefixes)
                sampling = [replace(WAYS[name], seed=seed) for seed in range(STREAMS)]
                start = time.perf_counter()
                done = engine.generate(ids, None, sampling)
                seconds = time.perf_counter() - start
                texts[name] = [completion.token_ids for completion in done]
                if number >= 0:
                    speeds[name].append(STREAMS * NEW_TOKENS / seconds)
            if texts["same texts"] != texts["greedy"]:
                raise SystemExit("the lowest temperature does not give the greedy texts")
        about = {"model": engine.name, "dtype": engine.dtype, "backend": engine.backend}
    shares = {
        name: [own / greedy for own, greedy in zip(speeds[name], speeds["greedy"], strict=True)]
        for name in ("sampled", "same texts")
    }
    print(
        f"  {about['model']}: "
        + ", ".join(f"{n} {summary(s)['median']:.3f}" for n, s in shares.items())
    )
    return {
        **about,
        **{f"{n.replace(' ', '_')}_tokens_per_second": summary(s) for n, s in speeds.items()},
        **{f"{n.replace(' ', '_')}_over_greedy": summary(s) for n, s in shares.items()},
    }, shares["same texts"]
