"""An environment for every peer, made from a file that pins all it holds."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
ENVIRONMENTS = Path(__file__).parents[2] / "build" / "interop"


def environment(peer: str) -> Path:
    """The Python of a peer's environment, which is made anew when its requirements change.

    Raises:
        SystemExit: it cannot be made.
    """
    requirements, folder = REQUIREMENTS / f"{peer}.txt", ENVIRONMENTS / peer
    python, made = folder / "bin" / "python", folder / "made-from"
    wanted = f"{platform.python_version()} {hashlib.sha256(requirements.read_bytes()).hexdigest()}"
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"making {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder)
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "install", "--no-deps", "-r", requirements)  # nothing that is not written there
    _run(*pip, "check")
    made.write_text(wanted)
    return python


def version(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps(m.version({package!r})))"
    return str(json.loads(_run(python, "-c", code)))


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reported = " ".join(map(str, command))
        raise SystemExit(f"{reported} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout
