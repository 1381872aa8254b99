"""The machine, versions and commit of a measurement, as every result file states them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from elastic_moe_kernels import ops

from elastic_moe import __version__


def describe_machine() -> dict[str, Any]:
    """The `machine` entry of a result: CPU, cores, threads of torch, and the level that runs."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": next((b.level for b in ops.backends() if b.level), "none"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """The `versions` entry of a result: this package, torch and Python."""
    return {
        "elastic_moe": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


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


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
