"""Result files: one JSON line per case, of which a run replaces its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_moe.files import write_text


def replace_lines(path: Path, lines: Sequence[dict[str, Any]], key: str) -> None:
    """Put lines into a file, in place of those that have the same value under `key`.

    The file is replaced as a whole, so that it is never half written.
    """
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    new = {line[key] for line in lines}
    kept = [line for line in old if json.loads(line)[key] not in new]
    write_text(path, "".join(f"{line}\n" for line in [*kept, *map(json.dumps, lines)]))
