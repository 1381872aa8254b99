"""Sixteen streams of olmoe-0.9b over HTTP, beside the same from the engine itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.serving.inside import Inside, inside
from benchmarks.verdict import Verdict, summary, verdict
from elastic_moe import Engine, SamplingParams

STREAMS, CONTEXT, NEW_TOKENS = 16, 32, 64
LEAST_SHARE = 0.95
MAKE = Path(__file__).parents[1] / "peers" / "checkpoint.py"
BARS = {"http over engine": f">= {LEAST_SHARE}"}


def measure(folder: Path, rounds: int) -> tuple[dict[str, Any], list[Verdict]]:
    """The case and its verdict; makes the checkpoint in `folder` if it is not there."""
    make_checkpoint(folder)
    http, engine_alone = [], []
    with Engine.from_pretrained(folder, max_num_seqs=STREAMS) as engine, inside(engine) as server:
        check(server)
        for number in range(rounds):
            ids = contexts(number, engine.config.vocab_size)
            order = (over_http, alone) if number % 2 else (alone, over_http)
            seconds = {}
            for way in order:
                server.forget_prefixes()
                seconds[way], _ = way(server, ids)
            tokens = STREAMS * NEW_TOKENS
            http.append(tokens / seconds[over_http])
            engine_alone.append(tokens / seconds[alone])
            print(
                f"  round {number + 1}: {http[-1]:.1f} tokens/s over HTTP, {engine_alone[-1]:.1f} "
                f"from the engine, {http[-1] / engine_alone[-1]:.3f}",
                flush=True,
            )
        about = {"model": engine.name, "dtype": engine.dtype, "backend": engine.backend}
    shares = [ours / limit for ours, limit in zip(http, engine_alone, strict=True)]
    case = {
        "case": "throughput-16",
        **about,
        "streams": STREAMS,
        "context": CONTEXT,
        "new_tokens": NEW_TOKENS,
        "http_tokens_per_second": summary(http),
        "engine_tokens_per_second": summary(engine_alone),
    }
    return case, [verdict("http over engine", shares, LEAST_SHARE)]


def check(server: Inside) -> None:
    """The streams' texts are the engine's. Also warms up. Raises: SystemExit: they are not."""
    ids = contexts(-1, server.engine.config.vocab_size)
    _, wanted = alone(server, ids)
    _, got = over_http(server, ids)
    if got != wanted:
        raise SystemExit("the streamed texts are not the engine's")


def over_http(server: Inside, ids: list[list[int]]) -> tuple[float, list[str]]:
    """Seconds and texts, read by clients in another process."""
    body = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    streamed = server.stream("/v1/completions", [{**body, "prompt": own} for own in ids])
    if streamed.tokens != [NEW_TOKENS] * STREAMS:
        raise SystemExit(f"streams of {streamed.tokens} tokens, not of {NEW_TOKENS}")
    return streamed.seconds, streamed.texts


def alone(server: Inside, ids: list[list[int]]) -> tuple[float, list[str]]:
    """The same asked of the engine, which is not even asked for pieces."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    done = server.engine.generate(ids, None, params)
    return time.perf_counter() - start, [completion.text for completion in done]


def contexts(seed: int, vocab_size: int) -> list[list[int]]:
    """Prompts of a round, as token ids."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab_size) for _ in range(CONTEXT)] for _ in range(STREAMS)]


def make_checkpoint(folder: Path) -> None:
    """Random bf16 weights of the standard case, and a tokenizer with a word for every id."""
    done = folder / "tokenizer.json"
    if done.is_file():
        return
    print(f"making {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, MAKE, folder, "standard"], check=True)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {f"word{i}": i for i in range(size)}
    model = tokenizers.models.WordLevel(words, unk_token="word0")
    tokenizers.Tokenizer(model).save(str(done))
