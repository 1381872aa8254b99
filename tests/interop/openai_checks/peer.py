"""The `openai` client against two servers: one as it comes, one that takes a single request."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_moe import Engine
from tests.interop.references import references
from tests.interop.served import ADMIN_KEY, KEYS, MODEL, served

SCRIPT = "tests.interop.openai_checks.client"
ROOT = Path(__file__).parents[3]
LEAST_CHECKS = 30  # fewer, and the script ended early
Line = dict[str, Any]


def check_openai(python: Path, work: Path) -> Iterator[Line]:
    """What the client finds, line by line."""
    wanted = work / "wanted.json"
    with Engine.from_pretrained(MODEL) as engine:
        wanted.write_text(json.dumps(references(engine)))
    for name in ("wide", "narrow"):
        (work / name).mkdir()
    with (
        served(work / "wide", "--inject") as wide,
        served(work / "narrow", "--max-queue", "1", "--max-num-seqs", "1") as narrow,
    ):
        command: list[str | Path] = [python, "-m", SCRIPT]
        command += ["--url", wide.url, "--narrow-url", narrow.url]
        command += ["--key", KEYS[0], "--admin-key", ADMIN_KEY, "--wanted", wanted]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        count = 0
        for count, reported in enumerate(process.stdout, 1):  # noqa: B007  (looked at below)
            yield json.loads(reported)
        status = process.wait()
    if status or count < LEAST_CHECKS:
        raise SystemExit(f"{SCRIPT} reported {count} checks and ended with status {status}")
    for server in (wide, narrow):
        yield server.verdict()
