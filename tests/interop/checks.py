"""Checks of a peer: each becomes one JSON line on standard output.

Peers' scripts import this under their own Python, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

SHOWN = 5  # failures of a check that are reported


class Tally:
    """What a check found: how many cases it looked at, and which of them were wrong."""

    def __init__(self) -> None:
        self.cases = 0
        self.failures: list[str] = []

    def true(self, held: object, what: str) -> None:
        """A case that holds or does not."""
        self.cases += 1
        if not held:
            self.failures.append(what)

    def equal(self, got: object, wanted: object, what: str) -> None:
        """A value that has to be another."""
        self.true(got == wanted, f"{what}: got {got!r:.200}, wanted {wanted!r:.200}")

    def close(self, got: Any, wanted: Any, what: str, tolerance: float = 1e-5) -> None:
        """A number, or numbers, that may be off by so much."""
        one = isinstance(got, (int, float)) and isinstance(wanted, (int, float))
        pairs = [(got, wanted)] if one else list(zip(got, wanted, strict=False))
        alike = one or len(got) == len(wanted)
        far = [pair for pair in pairs if not math.isclose(*pair, rel_tol=0, abs_tol=tolerance)]
        self.true(alike and not far, f"{what}: got {got!r:.200}, wanted {wanted!r:.200}")

    def raises(self, kind: type[Exception], call: Callable[[], Any], what: str) -> Any:
        """The exception of exactly this class that a call must raise; None if it does not."""
        try:
            got = call()
        except Exception as error:  # noqa: BLE001  (whatever it is, it is reported)
            self.true(type(error) is kind, f"{what}: raised {error!r:.200}, not {kind.__name__}")
            return error if type(error) is kind else None
        self.true(False, f"{what}: got {got!r:.200}, not {kind.__name__}")
        return None


def run_checks(checks: Iterable[Callable[..., None]], *arguments: Any, only: str = "") -> None:
    """Run functions, each with these arguments and a Tally. A docstring says what one checks.

    Args:
        only: run those whose docstring holds this.
    """
    for check in checks:
        what = " ".join((check.__doc__ or check.__name__).split()).rstrip(".")
        if only not in what:
            continue
        tally, begun = Tally(), time.perf_counter()
        try:
            check(*arguments, tally)
        except Exception:  # noqa: BLE001  (the other checks go on)
            tally.true(False, traceback.format_exc(limit=-4))
        print(json.dumps(line_of(what, tally, time.perf_counter() - begun)), flush=True)


def line_of(what: str, tally: Tally, seconds: float) -> dict[str, Any]:
    """What a check found, for JSON."""
    failed = len(tally.failures)
    return {
        "check": what,
        "cases": tally.cases,
        "passed": tally.cases - failed,
        "failed": failed,
        "failures": tally.failures[:SHOWN],
        "seconds": round(seconds, 3),
    }
