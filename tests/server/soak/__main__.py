"""Waves of streaming clients, of which many leave midway: python -m tests.server.soak.

`make soak-server` sends five waves of 200 clients to one server. They ask for other sub-networks,
seeds, temperatures and prompts; 30 % close their connection before the end. After each wave nothing
of it may be left: no request, block, task or connection. The server's memory after the last wave is
that after the second, within 5 %; and every answer that came to its end is what an engine gives
that runs it alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result_file import replace_lines
from elastic_moe import Completion, Engine, SamplingParams
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.server.run import Server, listen
from elastic_moe.server.settings import ServerSettings
from tests.engine.running.test_invariance import random_subnet

CLIENTS = Path(__file__).with_name("clients.py")
LEAVING = 0.3
MAX_NUM_SEQS = 64  # as `elastic-moe serve` has it
MAX_GROWTH = 1.05  # of memory, from the second wave to the last
IDLE_SECONDS = 20
WORDS = [
    "the",
    "whale",
    "snow",
    "list",
    "of",
    "def",
    "return",
    "import",
    "and",
    "a",
    "class",
    "when",
    "it",
    "None",
    "is",
    "white",
    "sings",
]


@dataclass(frozen=True)
class Request:
    """What is asked over HTTP, and the same of an engine.

    Attributes:
        leave_after: events after which the client goes; None stays to the end.
        abort: whether it goes with a reset of the connection.
    """

    messages: list[dict[str, str]] | None
    prompt: str
    subnet: str
    params: SamplingParams
    leave_after: int | None
    abort: bool

    def asked(self, model: str) -> dict[str, Any]:
        """As the clients have it."""
        params = self.params
        body: dict[str, Any] = {
            "model": f"{model}@{self.subnet}",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "top_p": params.top_p,
            "n": params.n,
            "ignore_eos": params.ignore_eos,
            "stop": list(params.stop) or None,
        }
        if self.messages is not None:
            path, body["messages"] = "/v1/chat/completions", self.messages
            body |= {} if params.logprobs is None else {"logprobs": True}
        else:
            path, body["prompt"], body["logprobs"] = "/v1/completions", self.prompt, params.logprobs
        return {
            "path": path,
            "body": body,
            "leave_after": self.leave_after,
            "abort": self.abort,
        }

    def solo(self, engine: Engine) -> Completion:
        """The answer of an engine that runs nothing else."""
        prompt: Any = self.prompt
        if self.messages is not None:
            prompt = engine.tokenizer.encode_chat(self.messages)
        return engine.generate(prompt, self.subnet, self.params)


def make_requests(engine: Engine, count: int, wave: int, most_tokens: int) -> list[Request]:
    """The same for the same wave."""
    draw, rng = random.Random(wave), np.random.default_rng(wave)
    # Of these only prefixes of layers have a name that a request can say.
    subnets = [random_subnet(engine.shape, rng).name for _ in range(60)]
    subnets = [name for name in subnets if not name.startswith("x")] + ["full"]
    shared = [" ".join(draw.choices(WORDS, k=30)) for _ in range(4)]
    leaving = set(draw.sample(range(count), round(LEAVING * count)))
    made = []
    for number in range(count):
        text = " ".join([draw.choice(shared), *draw.choices(WORDS, k=draw.randint(1, 8))])
        tokens = draw.randint(most_tokens // 2, most_tokens)
        params = SamplingParams(
            max_tokens=tokens,
            temperature=draw.choice([0.0, 0.7, 1.3]),
            seed=1000 * wave + number,
            top_p=draw.choice([1.0, 0.9]),
            n=draw.choice([1, 1, 1, 2]),
            logprobs=draw.choice([None, None, 0]),
            stop=() if number in leaving else draw.choice([(), (), ("the",)]),
            ignore_eos=number in leaving or draw.random() < 0.7,
        )
        messages = [{"role": "user", "content": text}] if draw.random() < 0.5 else None
        leave = draw.randint(1, tokens // 2) if number in leaving else None
        subnet = draw.choice(subnets)
        made.append(Request(messages, text, subnet, params, leave, draw.random() < 0.5))
    return made


class Watched:
    """A server in this process, seen from inside."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.most_at_once = engine, 0
        loops: list[asyncio.AbstractEventLoop] = []
        self.server = Server(
            engine, ServerSettings(port=0), lambda: loops.append(asyncio.get_running_loop())
        )
        self._listener = listen("127.0.0.1", 0)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._listener]}, name="soak server"
        )
        self._thread.start()
        _wait(lambda: loops, "the server starts")
        self._loop = loops[0]
        self.address = self._listener.getsockname()[:2]

    def tasks(self) -> int:
        """Of the event loop, without the one that counts."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(IDLE_SECONDS)

    def counts(self) -> dict[str, int]:
        """All that must be as before once nobody asks."""
        stats = self.engine.stats()
        return {
            "unfinished": stats.unfinished,
            "running": stats.running,
            "waiting": stats.waiting,
            "used_blocks": stats.used_blocks,
            "tasks": self.tasks(),
            "connections": len(self.server.server_state.connections),
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208  (numbers, no paths)
        }

    def wave(self, asked: list[dict[str, Any]], out: Path) -> None:
        """Have the clients of one wave ask; what they get goes to a file, not to this memory."""
        command = [sys.executable, CLIENTS, *map(str, self.address)]
        with tempfile.TemporaryFile("w+") as reported, out.open("w") as got:
            json.dump(asked, reported)
            reported.seek(0)
            clients = subprocess.Popen(command, stdin=reported, stdout=got)
            while clients.poll() is None:
                self.most_at_once = max(self.most_at_once, self.engine.stats().unfinished)
                time.sleep(0.01)
        assert clients.returncode == 0, f"the clients ended with {clients.returncode}"

    def end(self) -> None:
        """End the server and its engine."""
        self.server.stop()
        self._thread.join()
        self._listener.close()


@contextmanager
def watched(engine: Engine) -> Iterator[Watched]:
    """A server that ends with the block."""
    server = Watched(engine)
    try:
        yield server
    finally:
        server.end()


def run(
    model: str | Path,
    folder: Path,
    clients: int,
    waves: int,
    most_tokens: int,
    kv_cache_bytes: int,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Send waves of clients, look what they leave, then compare what they got.

    Args:
        folder: where what they got is kept meanwhile.
        most_tokens: of an answer.
        kv_cache_bytes: so few that the first wave fills the cache: its memory is taken then, and
            from then on old prefixes make room for new ones.

    Raises:
        AssertionError: something is left over, or an answer differs.
    """
    begun = time.monotonic()
    engine = Engine.from_pretrained(
        model, dtype=dtype, max_num_seqs=MAX_NUM_SEQS, kv_cache_bytes=kv_cache_bytes
    )
    requests, memory = [], []
    gc.collect()  # what others in this process left is not to be counted, nor to go midway
    with watched(engine) as server:
        idle = server.counts()
        for wave in range(1, waves + 1):
            own = make_requests(engine, clients, wave, most_tokens)
            server.wave([request.asked(engine.name) for request in own], folder / f"{wave}.json")
            requests += own
            _wait(lambda: left(server, idle) == {}, f"wave {wave} leaves nothing", server, idle)
            engine.check_integrity()
            gc.collect()
            memory.append(_resident_bytes())
        most, stats = server.most_at_once, engine.stats()
    found = [one for wave in range(waves) for one in _read(folder / f"{wave + 1}.json")]
    done = list(zip(requests, found, strict=True))
    seconds = time.monotonic() - begun
    ended = Counter(got["ended"] for _, got in done)
    assert not ended["broken"], [got for _, got in done if got["ended"] == "broken"][:3]
    assert ended["left"] == round(LEAVING * clients) * waves, ended
    finished = [(request, got) for request, got in done if got["ended"] == "done"]
    with Engine.from_pretrained(
        model, dtype=dtype, max_num_seqs=1, enable_prefix_caching=False
    ) as solo:
        for request, got in finished:
            assert answer(got["events"]) == wanted(solo, request), request
    return {
        "clients": clients,
        "waves": waves,
        "finished": ended["done"],
        "left": ended["left"],
        "most_at_once": most,
        "preemptions": stats.preemptions,
        "evicted_pages": stats.evicted_pages,
        "tokens": sum(_tokens(got["events"]) for _, got in finished),
        "seconds": round(seconds, 1),
        "resident_bytes": memory,
        "growth": round(memory[-1] / memory[1], 4),
        "idle": idle,
        "model": engine.name,
        "dtype": engine.dtype,
    }


def left(server: Watched, idle: dict[str, int]) -> dict[str, int]:
    """What there is more of than when nobody had asked.

    There may be fewer files: those that somebody else in this process has closed meanwhile.
    """
    return {
        name: count - idle[name] for name, count in server.counts().items() if count > idle[name]
    }


def answer(events: list[dict[str, Any]]) -> dict[int, tuple[str, str, list[float]]]:
    """Text, end and log-probabilities of every choice of a stream."""
    found: dict[int, tuple[str, str, list[float]]] = {}
    for event in events:
        for choice in event["choices"]:
            text, reason, logprobs = found.get(choice["index"], ("", "", []))
            piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            reported = choice["logprobs"] or {}
            reported = reported.get("token_logprobs") or [
                t["logprob"] for t in reported.get("content", ())
            ]
            found[choice["index"]] = (
                text + piece,
                choice["finish_reason"] or reason,
                [*logprobs, *reported],
            )
    return found


def wanted(solo: Engine, request: Request) -> dict[int, tuple[str, str, list[float]]]:
    """The same of the answer that a request gets alone."""
    return {
        choice.index: (
            choice.text,
            choice.finish_reason,
            [token.logprob for token in choice.logprobs or ()],
        )
        for choice in request.solo(solo).choices
    }


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def _tokens(events: list[dict[str, Any]]) -> int:
    return int(events[-1]["usage"]["completion_tokens"])


def _resident_bytes() -> int:
    status = Path("/proc/self/statm").read_text()
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _wait(
    held: Any, what: str, server: Watched | None = None, idle: dict[str, int] | None = None
) -> None:
    until = time.monotonic() + IDLE_SECONDS
    while not held():
        reported = "" if server is None else f": {server.counts()}, not {idle}"
        assert time.monotonic() < until, what + reported
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="elastic-mini")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--waves", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--kv-cache-mib", type=int, default=96)
    parser.add_argument("--out", type=Path, help="put the result into this .jsonl file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(
            args.model, Path(folder), args.clients, args.waves, args.tokens, args.kv_cache_mib << 20
        )
    met = found["growth"] <= MAX_GROWTH
    line = {
        "benchmark": "serving",
        "case": f"soak-{args.clients}-clients",
        **found,
        "bar": {"growth": f"<= {MAX_GROWTH}", "met": met},
        **describe_provenance(),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    if args.out is not None:
        replace_lines(args.out, [line], "case")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
