from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from elastic_moe import Engine
from elastic_moe.server.run import Server, listen, url_of
from elastic_moe.server.settings import ServerSettings


@dataclass
class Running:
    """A server in this process, and clients of it."""

    engine: Engine
    server: Server
    url: str
    http: httpx2.Client
    openai: OpenAI

    def post(self, path: str, **body: Any) -> httpx2.Response:
        content = json.dumps(body)  # also what strict clients do not send: NaN, lone surrogates
        return self.http.post(path, content=content, headers={"content-type": "application/json"})

    def complete(self, prompt: Any = "The", model: str = "tiny", **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", model=model, prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream that ends well."""
        answer = self.post(path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        *events, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def operations(self) -> dict[str, dict[str, Any]]:
        """What /openapi.json says, such as operations["POST /v1/completions"]."""
        paths = self.http.get("/openapi.json").raise_for_status().json()["paths"]
        return {
            f"{method.upper()} {path}": operation
            for path, methods in paths.items()
            for method, operation in methods.items()
        }

    def body_fields(self, path: str) -> set[str]:
        """Keys that a POST to this path may have."""
        description = self.server.app.openapi()
        schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = schema["schema"]["$ref"].rpartition("/")[-1]
        return set(description["components"]["schemas"][name]["properties"])

    def refused(self, status: int, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """The error that a request gets, with a model and a prompt if its path takes them."""
        usual = {"model": "tiny", "prompt": "The"}
        fields = self.body_fields(path)
        asked = {**{key: v for key, v in usual.items() if key in fields}, **body}
        answer = self.post(path, **{key: v for key, v in asked.items() if v is not ...})
        assert answer.status_code == status, answer.text
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.json()["error"]

    def idle(self) -> None:
        """Wait until nothing runs, then look at the books."""
        until = time.monotonic() + 20
        while self.engine.stats().unfinished:
            assert time.monotonic() < until
            time.sleep(0.005)
        self.engine.check_integrity()


def slow(engine: Engine) -> None:
    """Steps of 20 ms and more: how long a request is there does not depend on the machine."""
    run = engine.runner.run

    def late(*args: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return run(*args, **options)

    engine.runner.run = late  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def start(tiny_folder: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers on free ports of loopback; all end with the session."""
    ends: list[Callable[[], None]] = []

    def start(
        settings: dict[str, Any] | None = None, folder: Path = tiny_folder, **options: Any
    ) -> Running:
        engine = Engine.from_pretrained(folder, dtype="float32", **options)
        # Without a seed of its own, what a test sees would depend on the day.
        usual: dict[str, Any] = {"aliases": ("ernie-5.1-prod",), "port": 0, "seed": 0}
        own = ServerSettings(**{**usual, **(settings or {})})
        server = Server(engine, own)  # first: it may refuse
        listener = listen(own.host, own.port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        key = own.api_keys[0] if own.api_keys else "none"
        http = httpx2.Client(
            base_url=url_of(listener), timeout=60, headers={"authorization": f"Bearer {key}"}
        )
        openai = OpenAI(base_url=f"{url_of(listener)}/v1", api_key=key, max_retries=0, timeout=60)

        def end() -> None:
            http.close()
            openai.close()
            server.stop()
            thread.join()
            listener.close()

        ends.append(end)
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return Running(engine, server, url_of(listener), http, openai)

    yield start
    for end in ends:
        end()


@pytest.fixture(scope="session")
def served(start: Callable[..., Running]) -> Running:
    return start()
