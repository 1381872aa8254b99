"""Every endpoint and option through the `openai` Python client, 2.x or 3.x.

    PYTHON -m tests.interop.openai_checks.client --url URL --narrow-url URL --wanted FILE

Prints one JSON line per check. `tests.interop.run` starts the servers and makes FILE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openai import OpenAI

from tests.interop.checks import run_checks
from tests.interop.openai_checks import chat, errors, many, text, tools
from tests.interop.openai_checks.asking import TIMEOUT_SECONDS, At

MODULES = (chat, text, tools, errors, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--narrow-url", required=True, help="takes a single request at a time")
    parser.add_argument("--key", required=True)
    parser.add_argument("--admin-key", required=True)
    parser.add_argument("--wanted", type=Path, required=True)
    parser.add_argument("--only", default="", help="checks whose line holds this text")
    args = parser.parse_args()
    client = OpenAI(
        base_url=f"{args.url}/v1", api_key=args.key, max_retries=0, timeout=TIMEOUT_SECONDS
    )
    wanted = json.loads(args.wanted.read_text())
    at = At(args.url, args.key, args.admin_key, args.narrow_url, wanted, client)
    for module in MODULES:
        run_checks(module.CHECKS, at, only=args.only)


main()
