"""Processes of the contestants: each runs one request at a time and idles in between."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Process:
    """One contestant: `python -m benchmarks.peers.contestants.SCRIPT` in the project's folder.

    Attributes:
        versions: what it runs on, by its own account.

    Raises:
        SystemExit: it does not start, or ends, or reports an error.
    """

    def __init__(self, python: str | Path, script: str, *arguments: object) -> None:
        self._name = " ".join([script, *(str(a) for a in arguments)])
        self._log = ROOT / "build" / f"{script}.log"
        self._log.parent.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.peers.contestants.{script}", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("a"),
            text=True,
        )
        self.versions: dict[str, str] = self._reply()

    def ask(self, do: str, **request: Any) -> Any:
        """Send one request and wait for its result."""
        if self._process.stdin is None:
            raise SystemExit(f"{self._name} has no pipe")
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the process and wait for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def _reply(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            status = self._process.wait(timeout=60)
            raise SystemExit(f"{self._name} ended with status {status}, see {self._log}")
        reply = json.loads(line)
        if "error" in reply:
            raise SystemExit(f"{self._name} failed:\n{reply['error']}")
        return reply["result"]
