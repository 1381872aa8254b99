"""schemathesis over the whole /openapi.json: nothing that it sends may be a fault of the server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.interop.checks import Tally, line_of
from tests.interop.served import ADMIN_KEY, Served, served

HERE = Path(__file__).parent
SEED = 1
EXAMPLES = 100  # of each operation, beside those that walk through its schema
LEAST_CASES, LEAST_ACCEPTED = 1000, 50
HANG_SECONDS = 60
# All checks but these. A body may be refused although its schema allows it: what two fields must be
# together, and which names and tokens there are, a JSON schema does not say.
LEFT_OUT = "positive_data_acceptance"
Line = dict[str, Any]


def check_fuzz(python: Path, work: Path) -> Iterator[Line]:
    """Everything on one server; then what injects faults, on one that may, and nothing else.

    A plan of faults would be found, as a fault of the server, in what is asked for meanwhile.
    """
    for name, options, only in (
        ("whole", (), ()),
        ("admin", ("--inject",), ("--include-path-regex", "^/admin/")),
    ):
        folder = work / name
        folder.mkdir()
        profiles = ("--profiles", str(folder / "profiles.toml"))
        with served(folder, *profiles, *options, keys=()) as server:
            yield fuzz(python, folder, server, only)
        yield server.verdict()


def with_arguments(description: dict[str, Any], *, admin: bool) -> list[str]:
    """Operations of /openapi.json that can refuse a request, such as "POST /tokenize".

    They have a body, or are a GET with parameters. A DELETE finds what it names by chance alone.
    """
    return [
        f"{method.upper()} {path}"
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        if path.startswith("/admin/") == admin
        and ("requestBody" in operation or (method == "get" and "parameters" in operation))
    ]


def fuzz(python: Path, work: Path, server: Served, only: tuple[str, ...]) -> Line:
    """One run of schemathesis.

    Args:
        only: options that choose the operations below /admin/; empty for all.
    """
    report, begun = work / "report.json", time.perf_counter()
    command: list[str | Path] = [python.with_name("schemathesis")]
    command += ["run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {ADMIN_KEY}"]
    command += ["--checks", "all", "--exclude-checks", LEFT_OUT, "--continue-on-failure"]
    command += ["--request-timeout", str(HANG_SECONDS), "--max-examples", str(EXAMPLES)]
    command += ["--seed", str(SEED), "--generation-database", "none", "--no-color"]
    command += ["--warnings", "off", "--report", "json", "--report-json-path", report, *only]
    hooks = {"PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "fuzz_hooks"}
    done = subprocess.run(
        command, cwd=work, env={**os.environ, **hooks}, capture_output=True, text=True, check=False
    )
    if not report.is_file():
        raise SystemExit(f"schemathesis failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    reached = with_arguments(server.description(), admin=bool(only))
    return judge(json.loads(report.read_text()), reached, only, time.perf_counter() - begun)


def judge(
    reported: dict[str, Any], reached: list[str], only: tuple[str, ...], seconds: float
) -> Line:
    """What a report of schemathesis comes to.

    Args:
        reached: operations that must have been asked for something that they take.
    """
    tally = Tally()
    for failure in reported["failures"]:
        where = ", ".join(failure["operations"])
        tally.failures.append(f"{failure['title']}, {failure['count']} times: {where}")
    tally.failures += [f"error: {error}" for error in reported["errors"]]
    cases, tested = reported["test_cases"]["generated"], reported["operations"]
    accepted = {
        operation: sum(phase["accepted"] for phase in phases.values())
        for operation, phases in reported["valid_rates"].items()
    }
    for held, what in (
        (reported["complete"], f"it stopped early: {reported['stop_reason']}"),
        (tested["tested"] == tested["selected"], f"operations tested: {tested}"),
        (only or cases >= LEAST_CASES, f"{cases} cases, not {LEAST_CASES}"),
        *((accepted.get(one), f"{one} took nothing of what it was asked") for one in reached),
        (
            only or sum(accepted.values()) >= LEAST_ACCEPTED,
            f"only {sum(accepted.values())} requests were accepted",
        ),
    ):
        if not held:
            tally.failures.append(what)
    wrong = reported["test_cases"]["with_failures"]
    line = line_of(
        f"schemathesis: {tested['tested']} operations of /openapi.json"
        f"{' below /admin' if only else ''}, every check but {LEFT_OUT}, seed {SEED}",
        tally,
        seconds,
    )
    return {**line, "cases": cases, "passed": cases - wrong, "accepted": sum(accepted.values())}
