"""A server that peers talk to: `elastic-moe serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.interop.checks import SHOWN, Tally, line_of

MODEL = "elastic-mini"
KEYS = ("key-one", "ACCESS_KEY:SECRET_KEY")
ADMIN_KEY = "admin-key"
START_SECONDS, END_SECONDS = 60, 45
# What a log must not hold: a fault of the server, or a warning of Python that nobody expected.
FAULT = re.compile(r'^\S+ error |Traceback|  File "|Warning:')


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: without a path.
        name: what its log is kept under.
        log: what it writes to stderr.
        status: its exit status, once it has ended; None if it had to be killed.
    """

    name: str
    url: str
    log: Path
    status: int | None = None

    def description(self) -> dict[str, Any]:
        """/openapi.json of a server without keys."""
        with urlopen(f"{self.url}/openapi.json", timeout=START_SECONDS) as answer:
            described: dict[str, Any] = json.load(answer)
        return described

    def verdict(self) -> dict[str, Any]:
        """A check of how it ended, once it has, and of its log."""
        tally, begun = Tally(), time.perf_counter()
        tally.equal(self.status, 0, "exit status after SIGTERM")
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        faults = [line for line in lines if FAULT.search(line)]
        tally.true(not faults, f"{len(faults)} lines of the log: {' | '.join(faults[:SHOWN])}")
        what = f"server {self.name}: no traceback or warning of Python, and a good end"
        return line_of(what, tally, time.perf_counter() - begun)


@contextmanager
def served(
    work: Path, *options: str, keys: Sequence[str] = KEYS, admin_keys: Sequence[str] = (ADMIN_KEY,)
) -> Iterator[Served]:
    """Serve elastic-mini with these options until the block ends, then end it by SIGTERM.

    Args:
        work: folder for its log.

    Raises:
        SystemExit: it does not start.
    """
    where = work / "url"
    log = work / "server.log"
    command: list[str | Path] = [Path(sys.executable).with_name("elastic-moe"), "serve", MODEL]
    command += [
        "--port",
        "0",
        "--url-file",
        where,
        "--end-with-stdin",
        "--log-level",
        "warning",
        *options,
    ]
    environment = {
        **os.environ,
        "ELASTIC_MOE_API_KEYS": ",".join(keys),
        "ELASTIC_MOE_ADMIN_KEYS": ",".join(admin_keys),
    }
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr
        )
    try:
        server = Served(work.name, _wait_for(where, process, log), log)
        yield server
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.status = process.wait(END_SECONDS)
    finally:
        process.kill()
        process.wait()


def _wait_for(where: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(FileNotFoundError):
            return where.read_text().strip()
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")
