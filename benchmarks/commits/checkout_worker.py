"""A script that runs in another checkout, by its interpreter, and answers line by line."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self


class CheckoutWorker:
    """A process that says "ready", and then answers each line with a line of JSON.

    Args:
        checkout: a clone with a .venv.
        script: what runs there, with its arguments.
        environment: of the process, whole.
    """

    def __init__(
        self, checkout: Path, script: Sequence[str | Path], environment: Mapping[str, str]
    ) -> None:
        self.checkout = checkout
        self._process = subprocess.Popen(
            [checkout / ".venv" / "bin" / "python", *script],
            cwd=checkout,
            env=dict(environment),
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def ask(self, line: str) -> Any:
        """The answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker in {self.checkout} has ended")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def commit_of(checkout: Path) -> str:
    """Its commit, short."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def lower_quartile(values: Sequence[float]) -> float:
    """Noise only ever adds, so the faster half tells more."""
    return statistics.quantiles(values, n=4)[0]
