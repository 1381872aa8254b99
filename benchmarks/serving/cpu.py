"""The CPU time of the server itself per streamed token, and what sending one costs at least."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.inside import Inside, cpu_seconds, inside
from benchmarks.verdict import Verdict, summary, verdict
from elastic_moe import Engine, SamplingParams

TOKENS = {1: 400, 16: 200, 64: 100}  # streams -> tokens of each
MOST_SECONDS = 60e-6
BARS = {f"us per token, {streams} streams": "<= 60" for streams in TOKENS}
# About what an event of a stream has, as a chunk of HTTP.
CHUNK = b"e0\r\n" + b"x" * 224 + b"\r\n"


def measure(rounds: int) -> tuple[dict[str, Any], list[Verdict]]:
    """The case and its verdicts.

    Counted are the event loop's thread and the threads that it hands work to; the engine's thread
    and those of its kernels are not.
    """
    found: dict[int, list[float]] = {streams: [] for streams in TOKENS}
    floors: dict[int, list[float]] = {streams: [] for streams in TOKENS}
    speeds: dict[int, list[float]] = {streams: [] for streams in TOKENS}
    with Engine.from_pretrained("elastic-mini") as engine, inside(engine) as server:
        for streams in TOKENS:
            check(server, streams)
        for number in range(rounds):
            for streams, tokens in TOKENS.items():
                before = server.loop_seconds() + server.other_seconds()
                seconds, _ = stream(server, streams, tokens, number)
                spent = server.loop_seconds() + server.other_seconds() - before
                found[streams].append(spent / (streams * tokens))
                speeds[streams].append(streams * tokens / seconds)
                floors[streams].append(floor_seconds(streams, tokens))
            row = " ".join(f"{n}: {found[n][-1] * 1e6:.1f}" for n in TOKENS)
            print(f"  round {number + 1}, us per token: {row}", flush=True)
        about = {"model": engine.name, "dtype": engine.dtype, "backend": engine.backend}
    case = {
        "case": "cpu-per-token",
        **about,
        "new_tokens": TOKENS,
        "seconds_per_token": {n: summary(values) for n, values in found.items()},
        "bare_asyncio_seconds_per_token": {n: summary(values) for n, values in floors.items()},
        "tokens_per_second": {n: summary(values) for n, values in speeds.items()},
    }
    verdicts = [
        verdict(f"us per token, {n} streams", [v * 1e6 for v in values], 60.0, at_most=True)
        for n, values in found.items()
    ]
    return case, verdicts


def stream(server: Inside, streams: int, tokens: int, seed: int) -> tuple[float, list[str]]:
    """Seconds and texts of `streams` chats of `tokens` tokens each."""
    bodies = [
        {
            "messages": [{"role": "user", "content": f"Round {seed}, chat {i}"}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(streams)
    ]
    streamed = server.stream("/v1/chat/completions", bodies)
    if streamed.tokens != [tokens] * streams:
        raise SystemExit(f"streams of {streamed.tokens} tokens, not of {tokens}")
    return streamed.seconds, streamed.texts


def check(server: Inside, streams: int) -> None:
    """The streams' texts are the engine's. Also warms up. Raises: SystemExit: they are not."""
    _, got = stream(server, streams, TOKENS[streams], -1)
    tokenizer = server.engine.tokenizer
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": f"Round -1, chat {i}"}])
        for i in range(streams)
    ]
    params = SamplingParams(max_tokens=TOKENS[streams], ignore_eos=True)
    if got != [done.text for done in server.engine.generate(prompts, None, params)]:
        raise SystemExit("the streamed texts are not the engine's")


def floor_seconds(streams: int, tokens: int) -> float:
    """CPU time per event of an asyncio server that does nothing but write it to its connections."""
    spent: list[float] = []

    async def serve() -> None:
        done: list[asyncio.Event] = [asyncio.Event() for _ in range(streams)]
        writers: list[asyncio.StreamWriter] = []

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            done[len(writers) - 1].set()

        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reading = threading.Thread(target=_read_all, args=(port, streams))
            reading.start()
            for event in done:
                await event.wait()
            before = cpu_seconds(threading.current_thread())
            for _ in range(tokens):
                for writer in writers:
                    writer.write(CHUNK)
                await asyncio.sleep(0)
            spent.append(cpu_seconds(threading.current_thread()) - before)
            for writer in writers:
                writer.close()
            await asyncio.to_thread(reading.join)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    thread.join()
    return spent[0] / (streams * tokens)


def _read_all(port: int, streams: int) -> None:
    """Open `streams` connections and read each until it ends."""

    async def read() -> None:
        async def one() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while await reader.read(1 << 16):
                pass
            writer.close()

        await asyncio.gather(*(one() for _ in range(streams)))

    asyncio.run(read())


def median_of(case: dict[str, Any], streams: int) -> float:
    """Of a measured case, in seconds."""
    return float(case["seconds_per_token"][streams]["median"])


def rows(case: dict[str, Any]) -> Sequence[str]:
    """What a reader wants to see beside the bars."""
    return [
        f"{n} streams: {median_of(case, n) * 1e6:.1f} us per token, of which sending is at least "
        f"{case['bare_asyncio_seconds_per_token'][n]['median'] * 1e6:.1f}"
        for n in TOKENS
    ]
