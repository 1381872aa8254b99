"""Which implementations there are, and which of them runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import NO_TORCH, has_torch
from elastic_moe_kernels.errors import KernelError

Implementation = Literal["auto", "reference", "cpu"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the ops, and what this install and machine have of it.

    Attributes:
        level: the instruction-set level in use, None where there are none.
        levels: all levels that are compiled and run here, weakest first.
        detail: how it was built, or why it (or a part of it) is missing.
    """

    name: str
    available: bool
    level: str | None
    levels: tuple[str, ...]
    detail: str


def backends() -> list[Backend]:
    """Every implementation that exists, whether or not this install has it."""
    no_torch = _why_no_reference()
    detail = no_torch or f"torch {importlib.metadata.version('torch')}"
    reference_backend = Backend("reference", not no_torch, None, (), detail)
    why_not = _why_not_cpu()
    if why_not:
        return [reference_backend, Backend("cpu", False, None, (), why_not)]
    info = native.build_info()
    detail = info.compiler
    idle = [name for name in info.levels if name not in native.levels()]
    if idle:
        detail += f"; compiled, but this machine lacks it: {', '.join(idle)}"
    if info.reason:
        detail += f"; {info.reason}"
    return [reference_backend, Backend("cpu", True, native.level(), native.levels(), detail)]


def available(name: str) -> bool:
    """Whether the implementation `name` can run in this install."""
    return name in _WHY_NOT and not _WHY_NOT[name]()


def require(name: str) -> None:
    """Raise `KernelError` with the reason and the remedy unless `name` can run here."""
    if name not in _WHY_NOT:
        raise KernelError(f"implementation must be 'reference' or 'cpu', got {name!r}.")
    why_not = _WHY_NOT[name]()
    if why_not:
        raise KernelError(why_not)


def _why_no_reference() -> str:
    """Why the PyTorch reference cannot run; "" if it can. Does not load torch."""
    return "" if has_torch() else NO_TORCH


def _why_not_cpu() -> str:
    """Why the C++ kernels cannot run (missing, or a wrong ELASTIC_MOE_ISA); "" if they can."""
    if native.missing():
        return native.missing()
    try:
        native.level()
    except KernelError as error:
        return str(error)
    return ""


_WHY_NOT = {"reference": _why_no_reference, "cpu": _why_not_cpu}


@cache
def warn_if_degraded() -> None:
    """Warn, once per process, if the C++ kernels are not installed, but torch is.

    "auto" then runs the reference: the results are right, but slow.
    """
    if not native.missing() or _why_no_reference():
        return
    problem = (
        f"the PyTorch reference runs instead of the C++ kernels, and is slower: {native.missing()}"
    )
    warnings.warn(problem, RuntimeWarning, stacklevel=3)


def choose(
    implementation: Implementation,
    unfit: str,
    level: str | None = None,
    *,
    reference_needs_torch: bool = True,
) -> Literal["reference", "cpu"]:
    """Settle "auto".

    Args:
        unfit: why the C++ kernel cannot take these arguments, as the end of a sentence; "" if it
            can.
        level: the instruction-set level that the caller named, if any.

    Raises:
        KernelError: the implementation does not exist or is not installed, cannot take the
            arguments, or has no levels though one was named; the level is no string.
    """
    if implementation == "auto":
        implementation = "reference" if unfit or native.missing() else "cpu"
    elif implementation == "cpu" and unfit:
        raise KernelError(f"implementation 'cpu' {unfit} Or use implementation='reference'.")
    elif implementation not in ("reference", "cpu"):
        raise KernelError(
            f"implementation must be 'auto', 'reference' or 'cpu', got {implementation!r}."
        )
    if not isinstance(level, str | None):
        raise KernelError(f"level must be a string or None, got {type(level).__name__}.")
    if level is not None and implementation == "reference":
        raise KernelError(
            f"level {level!r} was named, but this call runs on the reference, which has none. "
            f"Leave level out, or use implementation='cpu'."
        )
    if implementation == "reference" and reference_needs_torch and _why_no_reference():
        raise KernelError(" ".join(filter(None, (native.missing(), _why_no_reference()))))
    return implementation


def load_reference() -> Any:
    """The module `reference`, which loads torch."""
    return importlib.import_module("elastic_moe_kernels.reference")
