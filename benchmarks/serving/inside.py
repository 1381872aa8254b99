"""A server whose threads can be looked at, and clients of it in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from elastic_moe import Engine
from elastic_moe.server.run import Server, listen
from elastic_moe.server.settings import ServerSettings

CLIENTS = Path(__file__).with_name("clients.py")
ENGINE_THREAD = "elastic-moe engine"


@dataclass(frozen=True)
class Streamed:
    """What a batch of streams was.

    Attributes:
        seconds: from the first request to the end of the last answer.
        texts: of the first choice of each.
        tokens: written for each, as its usage says.
    """

    seconds: float
    texts: list[str]
    tokens: list[int]

    @classmethod
    def of(cls, reply: dict[str, Any]) -> Self:
        """Read what the clients got. Raises: SystemExit: not every answer is whole."""
        texts, tokens = [], []
        for answer in reply["answers"]:
            head, _, rest = answer.partition("\r\n\r\n")
            events = [part for part in rest.split("data: ")[1:] if part.startswith("{")]
            bodies = [json.loads(part.partition("\n")[0]) for part in events]
            if " 200 " not in head.partition("\r\n")[0] or "data: [DONE]" not in rest:
                raise SystemExit(f"an answer is not whole: {answer[:500]}")
            choices = [choice for body in bodies for choice in body["choices"]]
            pieces = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices]
            texts.append("".join(pieces))
            tokens.append(bodies[-1]["usage"]["completion_tokens"])
        return cls(reply["seconds"], texts, tokens)


class Inside:
    """A server in a thread of this process, as `elastic-moe serve` has it in its main thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._server = Server(engine, ServerSettings(port=0))
        self._listener = listen("127.0.0.1", 0)
        run = {"sockets": [self._listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, name="server")
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.address = list(self._listener.getsockname()[:2])
        self._clients = subprocess.Popen(
            [sys.executable, CLIENTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def stream(self, path: str, bodies: Sequence[dict[str, Any]]) -> Streamed:
        """Have the clients ask for all of these at once."""
        more = {"stream": True, "stream_options": {"include_usage": True}, "model": self.model}
        requests = [{"path": path, "body": {**more, **body}} for body in bodies]
        assert self._clients.stdin is not None
        assert self._clients.stdout is not None
        asked = {"address": self.address, "requests": requests}
        self._clients.stdin.write(json.dumps(asked) + "\n")
        self._clients.stdin.flush()
        reply = self._clients.stdout.readline()
        if not reply:
            raise SystemExit("the clients have ended")
        return Streamed.of(json.loads(reply))

    @property
    def model(self) -> str:
        return self.engine.name

    def loop_seconds(self) -> float:
        """CPU time of the event loop's thread."""
        return cpu_seconds(self._thread)

    def other_seconds(self) -> float:
        """That of the threads that it hands work to, such as reading prompts."""
        pool = [t for t in threading.enumerate() if t.name.startswith("asyncio_")]
        return sum(cpu_seconds(thread) for thread in pool)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        core = self.engine._running_core()
        core.call(core.forget_prefixes)

    def close(self) -> None:
        """End the clients and the server."""
        self._clients.terminate()
        self._clients.wait()
        self._server.stop()
        self._thread.join()
        self._listener.close()


@contextmanager
def inside(engine: Engine) -> Iterator[Inside]:
    """A server that ends with the block."""
    server = Inside(engine)
    try:
        yield server
    finally:
        server.close()


def cpu_seconds(thread: threading.Thread) -> float:
    """CPU time of a thread of this process, exact to the nanosecond."""
    path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
    return int(path.read_text().split()[0]) / 1e9
