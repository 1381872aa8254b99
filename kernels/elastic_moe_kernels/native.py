"""The C++ extension: loading it, the instruction-set level that runs, and how many threads.

kernels/CMakeLists.txt lists the levels. The strongest that the install has and the machine runs is
used, unless the environment variable ELASTIC_MOE_ISA names another; it is read once, at first use.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from elastic_moe_kernels import constants
from elastic_moe_kernels.errors import KernelError

ISA_VARIABLE, THREADS_VARIABLE = "ELASTIC_MOE_ISA", "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What was compiled when this package was installed.

    Attributes:
        compiler: name and version, "" without one.
        levels: instruction-set levels compiled, weakest first.
        reason: why something is missing, "" if nothing is.
    """

    compiler: str
    levels: tuple[str, ...]
    reason: str


@cache
def build_info() -> BuildInfo:
    """What the install compiled; from a bare checkout, nothing."""
    try:
        info: Any = importlib.import_module("elastic_moe_kernels._build_info")
    except ImportError:
        return BuildInfo("", (), "this is a source checkout that was not installed")
    return BuildInfo(info.COMPILER, tuple(info.LEVELS), info.REASON)


@cache
def missing() -> str:
    """Why the C++ kernels cannot be used, "" if they can."""
    try:
        extension()
    except KernelError as error:
        return str(error)
    return ""


def levels() -> tuple[str, ...]:
    """The levels that are compiled and run on this machine, weakest first; () without any."""
    return () if missing() else tuple(_runnable())


@cache
def level() -> str:
    """The level that calls use unless they name one.

    Raises:
        KernelError: the extension is missing, or ELASTIC_MOE_ISA names a level that is not there.
    """
    runnable = _runnable()
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in runnable:
        raise KernelError(
            f"{ISA_VARIABLE} must be one of {', '.join(runnable)}: what this machine runs of the "
            f"levels that this install has ({', '.join(build_info().levels)}); got {wanted!r}. "
            f"Unset it to use {next(reversed(runnable))}."
        )
    return wanted or next(reversed(runnable))


@cache
def level_index(name: str | None) -> int:
    """Position of a level (None: `level()`) in the extension's list.

    Raises:
        KernelError: it is not there.
    """
    runnable = _runnable()
    name = level() if name is None else name
    if name not in runnable:
        raise KernelError(f"level must be one of {', '.join(runnable)}, got {name!r}.")
    return runnable[name]


@cache
def _runnable() -> dict[str, int]:
    """Position in the extension's list of each level that this machine runs."""
    found = enumerate(extension().levels())
    return {name: i for i, (name, runs) in found if runs}


@cache
def extension() -> ModuleType:
    """The extension.

    Raises:
        KernelError: it is not installed or does not load.
    """
    info = build_info()
    if not info.levels:
        raise KernelError(
            f"the C++ kernels are not installed: {info.reason}. With a C++17 compiler (Debian: "
            f"apt-get install g++), install elastic-moe again: `pip install .` in its source, "
            f"or `pip install --force-reinstall --no-deps --no-binary :all: elastic-moe`."
        )
    try:
        module = importlib.import_module("elastic_moe_kernels._native")
    except (ImportError, OSError) as error:
        raise KernelError(
            f"the C++ kernels are installed but do not load: {error}. Install elastic-moe again "
            f"with this Python."
        ) from error
    _check_constants(getattr(module, "CONSTANTS", {}))
    return module


def _check_constants(found: dict[str, int]) -> None:
    """Raise `KernelError` unless the extension was compiled with the numbers of `constants`."""
    expected = {name: value for name, value in vars(constants).items() if name.isupper()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise KernelError(
                f"the C++ kernels were compiled with {name} = {found.get(name)}, and this package "
                f"has {expected.get(name)}: they come from different versions. Install elastic-moe "
                f"again."
            )


@cache
def default_threads() -> int:
    """Threads of a call whose caller names no number.

    OMP_NUM_THREADS where it is set, else the cores that this process may keep busy.
    """
    try:
        wanted = int(os.environ.get(THREADS_VARIABLE, "").partition(",")[0])
    except ValueError:
        wanted = 0
    return wanted if wanted >= 1 else allowed_cores()


def check_threads(threads: int | None) -> int:
    """`threads`, or the default for None. Raises: KernelError: it is no integer of at least 1."""
    if threads is None:
        return default_threads()
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise KernelError(f"threads must be at least 1, got {threads!r:.80}.")
    return threads


def allowed_cores(system: Path = Path("/")) -> int:
    """Cores that this process may keep busy: by its affinity, and by the CPU quota of its cgroup.

    Two hardware threads of a core count as one: they share the units that these kernels fill.

    Args:
        system: where /proc and /sys are.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len({_core(system, cpu) for cpu in os.sched_getaffinity(0)})
    else:
        allowed = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "cpu", "cpu,cpuacct"):
                for quota in _quotas(system / "sys/fs/cgroup", controllers, path.strip("/")):
                    allowed = min(allowed, max(1, math.ceil(quota)))
    return allowed


def _core(system: Path, cpu: int) -> str:
    """What names the core of a hardware thread; itself where the system does not say."""
    try:
        folder = system / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
        return (folder / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(root: Path, controllers: str, path: str) -> Iterator[float]:
    """Cores that a cgroup and those around it allow, where they say so."""
    folders = [path, *map(str, Path(path).parents)] if path else [""]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if controllers:
                here = root / controllers / folder
                quota = int((here / "cpu.cfs_quota_us").read_text())
                if quota > 0:
                    yield quota / int((here / "cpu.cfs_period_us").read_text())
            else:
                most, period = (root / folder / "cpu.max").read_text().split()
                if most != "max":
                    yield int(most) / int(period)
