"""Date, command, commit, machine and versions of a measurement, as every result states them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from elastic_moe_kernels import native, ops

from elastic_moe import __version__


def describe_provenance(threads: int | None = None) -> dict[str, Any]:
    """What every result states: `date`, `command`, `commit`, `machine` and `versions`.

    Args:
        threads: that the kernels took; None for their default.

    Older records have no date, no command and no numbers of the processor.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command_line(),
        "commit": describe_commit(),
        "machine": describe_machine(threads),
        "versions": describe_versions(),
    }


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """The `machine` entry of a result: CPU, cores, threads of the kernels, and the level that runs.

    A virtual machine may hide the CPU's name; `cpu_family`, `cpu_model` and `cpu_stepping` tell it.
    None where the system does not say.
    """
    cpu = _cpuinfo()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_vendor": cpu.get("vendor_id"),
        **{f"cpu_{key}": _number(cpu.get(name)) for key, name in _CPU_NUMBERS.items()},
        "cores": os.cpu_count(),
        "threads": threads or native.default_threads(),
        "isa": next((b.level for b in ops.backends() if b.level), "none"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """The `versions` entry of a result: this package, numpy, torch if it is there, and Python."""
    versions = {"elastic_moe": __version__, "numpy": np.__version__}
    if ops.available("reference"):
        versions["torch"] = importlib.metadata.version("torch")
    return {**versions, "python": platform.python_version()}


def describe_commit() -> str | None:
    """The commit of this project's clone that runs, wherever the command does; None outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


_CPUINFO = Path("/proc/cpuinfo")
_CPU_NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; {} where there is none."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _command_line() -> str:
    """The command of this process, as typed in its working directory.

    A path elsewhere is its last name alone: results are published, and folders are private.
    """
    program, *rest = sys.orig_argv or [sys.executable]
    here = [argument.replace(f"{Path.cwd()}/", "") for argument in rest]
    named = [Path(each).name if Path(each).is_absolute() else each for each in here]
    return shlex.join([Path(program).name, *named])
