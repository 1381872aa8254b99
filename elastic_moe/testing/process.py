"""`elastic-moe serve` as a child process: waits until it is ready, and ends it."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic_moe.errors import ServerError

START_SECONDS = 120.0  # large checkpoints load slowly
END_SECONDS = 5.0  # between SIGTERM and SIGKILL
TAIL_LINES = 20


class ServerProcess:
    """A server in a child process, ready to answer.

    It watches a pipe to this process, so it exits even if this process is killed. It has a process
    group of its own, so Ctrl-C at a terminal does not stop it before the tests end.

    Args:
        arguments: of `elastic-moe serve`.
        environment: changes to the environment of this process.
        folder: its working directory; None for the present one.
        start_seconds: time to become ready.

    Raises:
        ServerError: it did not become ready; the message holds its last output.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="elastic-moe-")
        self._log, self._url = Path(self._folder.name, "log"), Path(self._folder.name, "url")
        own = ["--port", "0", "--url-file", str(self._url), "--end-with-stdin"]
        # -P: a file torch.py beside the tests is not torch.
        command = [sys.executable, "-P", "-m", "elastic_moe.cli", "serve", *own, *arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                cwd=folder,
                process_group=0,
            )
        try:
            self.url = self._wait(time.monotonic() + start_seconds, shlex.join(arguments))
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tail(self) -> str:
        """The last lines of its output, and its exit status if it has ended."""
        lines = self.log().splitlines()
        tail = lines[-TAIL_LINES:]
        if len(lines) > len(tail):
            tail.insert(0, f"... {len(lines) - len(tail)} lines before")
        if not self.alive:
            tail.append(f"the server has ended with exit status {self._process.returncode}")
        return "\n".join(tail)

    def log(self) -> str:
        """Its whole output, stdout and stderr."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Terminate it, kill it if it does not exit, and delete its log."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._folder.cleanup()

    def _wait(self, deadline: float, arguments: str) -> str:
        """The URL, once the server has written it."""
        while not self._url.exists():
            if not self.alive:
                raise ServerError(f"elastic-moe serve {arguments} did not start:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"elastic-moe serve {arguments} is not ready in time. It wrote:\n{self.tail()}"
                )
            time.sleep(0.01)
        return self._url.read_text(encoding="utf-8").strip()
