"""A running server with fault injection, for tests of clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from elastic_moe.errors import ServerError
from elastic_moe.testing.faults import Faults
from elastic_moe.testing.process import START_SECONDS, ServerProcess
from elastic_moe.testing.records import RequestRecord, report

ANSWER_SECONDS = 10.0  # timeout of admin endpoints


class ElasticMoEServer:
    """A server with fault injection, started by `start_server` or by another program.

    Attributes:
        url: such as http://127.0.0.1:43210.
        base_url: the same with /v1, as OpenAI clients want it.
        api_key: needed by requests.
        admin_key: needed by /admin/*.
        model: a name of its model.
        faults: its fault injection.
        pid: of its process; None if another program started it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        admin_key: str,
        model: str = "elastic-mini",
        process: ServerProcess | None = None,
    ) -> None:
        self.url, self.base_url = url, f"{url}/v1"
        self.api_key, self.admin_key, self.model = api_key, admin_key, model
        self.faults = Faults(self.admin)
        self._process = process
        self._marked = 0  # number of the last request before the present test

    def __repr__(self) -> str:
        return f"<elastic-moe server of {self.model} at {self.url}>"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def healthy(self) -> bool:
        """Whether it runs and accepts requests."""
        try:
            return self._send("GET", "/health")[0] == 200 == self._send("GET", "/ready")[0]
        except OSError:
            return False

    @property
    def requests(self) -> list[RequestRecord]:
        """The requests of the present test, oldest first."""
        return self.requests_after(self._marked)

    def requests_after(self, number: int) -> list[RequestRecord]:
        """The requests after this one; 0: all since the server began.

        Raises:
            ServerError: more came than the server keeps.
        """
        answer = self._records(number)
        records = [RequestRecord.of(record) for record in answer["requests"]]
        if records and answer["dropped"] and records[0].number > number + 1:
            raise ServerError(
                f"of the requests after {number} the server keeps only those from "
                f"{records[0].number} on. Look at them more often."
            )
        return records

    def settled(self, number: int | None = None, *, seconds: float = 2.0) -> list[RequestRecord]:
        """`requests`, or those after `number`, once none of them runs.

        A client that closes its connection knows it before the server does.

        Raises:
            ServerError: one still runs after so many seconds.
        """
        until = time.monotonic() + seconds
        while True:
            records = self.requests_after(self._marked if number is None else number)
            running = [record for record in records if record.outcome == "running"]
            if not running:
                return records
            if time.monotonic() > until:
                raise ServerError(f"requests still run after {seconds:g} s:\n{report(running)}")
            time.sleep(0.01)

    def names(self) -> list[str]:
        """The names of its model, the checkpoint's own first."""
        _, answer = self._send("GET", "/v1/models", key=self.api_key)
        return [one["id"] for one in json.loads(answer)["data"]]

    def mark(self) -> None:
        """Start `requests` from here; the plugin does so before every test."""
        self._marked = self.last_number()

    def last_number(self) -> int:
        """Number of the last request."""
        records = self._records(self._marked)["requests"]
        return int(records[-1]["number"]) if records else self._marked

    def log(self) -> str:
        """The output of its process; "" if another program started it."""
        return "" if self._process is None else self._process.log()

    def fault(self) -> str:
        """Why the server cannot answer any more; "" if it runs, as far as is known."""
        if self._process is None or self._process.alive:
            return ""
        return f"the elastic-moe server at {self.url} has ended. It wrote:\n{self._process.tail()}"

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """The parsed JSON of an admin endpoint; None for an empty response.

        Raises:
            ServerError: the request failed, or there is no response.
        """
        try:
            status, answer = self._send(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(self.fault() or f"{self.url}{path}: {error!r}.") from error
        parsed = json.loads(answer) if answer else None
        if status >= 400:
            message = parsed["error"]["message"] if parsed else "no reason given"
            raise ServerError(f"{method} {path}: {status}, {message}")
        return parsed

    def _records(self, after: int) -> Any:
        return self.admin("GET", f"/admin/requests?after={after}")

    def _send(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> tuple[int, bytes]:
        # Not urllib.request, which uses the proxy of the environment.
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.netloc, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body).encode()
            headers = {"authorization": f"Bearer {key or self.admin_key}"}
            if content is not None:
                headers["content-type"] = "application/json"
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


@contextlib.contextmanager
def start_server(
    model: str = "elastic-mini",
    *,
    routing: str | None = None,
    dtype: str | None = None,
    isa: str | None = None,
    seed: int | None = None,
    aliases: Sequence[str] = (),
    api_key: str | None = None,
    arguments: Sequence[str] = (),
    folder: Path | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator[ElasticMoEServer]:
    """Start a server on a free port of 127.0.0.1, and end it with the block.

    Args:
        model: a bundled model, or a Hugging Face folder or id.
        routing: sub-network of requests that ask for none; None for the full network.
        dtype: 'float32' or 'bfloat16'; None for the checkpoint's.
        isa: instruction-set level of the kernels, one of those of `elastic-moe info`; None for
            ELASTIC_MOE_ISA, or the best.
        seed: seed of requests that have none; None draws one for each.
        aliases: further names of the model.
        api_key: needed by requests; None generates one.
        arguments: more arguments of `elastic-moe serve`.
        folder: working directory of the server; None for the present one.
        start_seconds: time to become ready.

    Raises:
        ServerError: it did not start; the message holds its last output.
    """
    api_key = api_key or f"em-{secrets.token_urlsafe(24)}"
    admin_key = f"em-admin-{secrets.token_urlsafe(24)}"
    environment = {"ELASTIC_MOE_API_KEYS": api_key, "ELASTIC_MOE_ADMIN_KEYS": admin_key}
    # Several servers may share a machine: waiting threads should sleep soon instead of spinning.
    environment["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "3000")
    options = [model, "--inject", "on", "--drain-seconds", "1"]
    options += ["--routing", routing] if routing else []
    options += ["--dtype", dtype] if dtype else []
    options += ["--seed", str(seed)] if seed is not None else []
    for alias in aliases:
        options += ["--alias", alias]
    if isa:
        environment["ELASTIC_MOE_ISA"] = isa
        options += ["--backend", "cpu"]  # PyTorch alone has no levels to choose from
    process = ServerProcess([*options, *arguments], environment, folder, start_seconds)
    try:
        keys = {"api_key": api_key, "admin_key": admin_key}
        server = ElasticMoEServer(process.url, **keys, process=process)
        server.model = server.names()[0]
        server.admin("DELETE", "/admin/requests")
        yield server
    finally:
        process.end()
