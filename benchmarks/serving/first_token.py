"""From the command `elastic-moe serve` to the first token that a client reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.verdict import Verdict, summary, verdict
from elastic_moe import Engine, SamplingParams

MOST_SECONDS, GIVE_UP_SECONDS, POLL_SECONDS = 3.0, 60.0, 0.01
MESSAGES = [{"role": "user", "content": "What is a list?"}]
BODY: dict[str, Any] = {
    "model": "elastic-mini",
    "messages": MESSAGES,
    "max_tokens": 4,
    "temperature": 0,
    "stream": True,
}
BARS = {"seconds to the first token": f"<= {MOST_SECONDS:g}"}


def measure(rounds: int) -> tuple[dict[str, Any], list[Verdict]]:
    """The case and its verdict. The first run only warms the cache of files."""
    with Engine.from_pretrained("elastic-mini") as engine:
        ids = engine.tokenizer.encode_chat(MESSAGES)
        wanted = engine.generate(ids, None, SamplingParams(max_tokens=BODY["max_tokens"])).text
    found = []
    for number in range(rounds + 1):
        seconds, text = first_token_seconds()
        if text != wanted:
            raise SystemExit(f"the streamed text is {text!r}, not {wanted!r}")
        print(f"  {'round ' + str(number) if number else 'warm-up'}: {seconds:.3f} s", flush=True)
        found.append(seconds)
    case = {"case": "first-token", "model": "elastic-mini", "seconds": summary(found[1:])}
    bar = verdict("seconds to the first token", found[1:], MOST_SECONDS, at_most=True)
    return case, [bar]


def first_token_seconds() -> tuple[float, str]:
    """Seconds until the first token has come, and the whole text."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [str(Path(sys.executable).with_name("elastic-moe")), "serve", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELASTIC_MOE_")}
    start = time.perf_counter()
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        seconds, text = _ask(port, start)
        server.send_signal(signal.SIGTERM)
        server.wait(GIVE_UP_SECONDS)
    finally:
        server.kill()
        server.wait()
    return seconds, text


def _ask(port: int, start: float) -> tuple[float, str]:
    """Ask again and again until there is an answer."""
    content = json.dumps(BODY).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", port), GIVE_UP_SECONDS)
            break
        except ConnectionRefusedError:
            if time.perf_counter() - start > GIVE_UP_SECONDS:
                raise SystemExit("the server did not start") from None
            time.sleep(POLL_SECONDS)
    got, seconds = b"", None
    with client:
        client.sendall(head.encode() + content)
        while data := client.recv(1 << 16):
            got += data
            if seconds is None and b'"content":' in got:
                seconds = time.perf_counter() - start
    if seconds is None:
        raise SystemExit(f"no token came: {got[:300]!r}")
    events = [part for part in got.decode().split("data: ")[1:] if part.startswith("{")]
    bodies = [json.loads(part.partition("\n")[0]) for part in events]
    pieces = [body["choices"][0]["delta"].get("content", "") for body in bodies]
    return seconds, "".join(pieces)
