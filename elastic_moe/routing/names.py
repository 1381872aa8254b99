"""Names of sub-networks: from values to text and back.

A name joins one part for each axis that is not full by '-'. A part is the axis's letter and a
value: a count or a real value as a number, a set as its size or as 'x' and the hexadecimal bits of
its members. Where layers differ, runs of equal values follow one another: k4x12,2x36 is top_k 4
for 12 layers, then 2 for 36.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from elastic_moe.errors import RoutingError
from elastic_moe.routing.axes import AXES, Axis
from elastic_moe.routing.checks import check_integer, check_length, shorten, spell_float32
from elastic_moe.routing.shape import ModelShape

FULL = "full"
_NUMBER = "[0-9]{1,9}"  # 9 digits are beyond any range; `int` refuses 4301
_VALUE = {"count": _NUMBER, "real": r"[0-9]+(?:\.[0-9]+)?", "set": f"(?:{_NUMBER}|x[0-9a-f]+)"}
_BY_FINGERPRINT = re.compile(r"x[0-9a-f]{8}")  # names of per-layer values before they had runs


def is_name(text: str) -> bool:
    """Whether a text has the form of a sub-network's name, whatever model has such a one."""
    return bool(_BY_FINGERPRINT.fullmatch(text)) or split_name(text) is not None


def split_name(name: str) -> dict[str, str] | None:
    """A name's parts by axis, as written: 'k2-L24' -> {'top_k': '2', 'depth': '24'}; None: no name.

    Parts may stand in any order.
    """
    if name == FULL:
        return {}
    parts: dict[str, str] = {}
    letters = {axis.letter: axis for axis in AXES}
    for part in name.split("-"):
        axis = letters.get(part[:1])
        if axis is None or axis.name in parts or not _form(axis).fullmatch(part, 1):
            return None
        parts[axis.name] = part[1:]
    return parts


def is_listed(part: str) -> bool:
    """Whether a part of a name gives values per layer or lists members, and so is no number."""
    return "x" in part


def read_name(shape: ModelShape, name: str) -> dict[str, Any]:
    """The arguments of `resolve` that a name means.

    Raises:
        RoutingError: the text is no name, or does not list one value for each layer. `resolve`
            checks the values.
    """
    if _BY_FINGERPRINT.fullmatch(name):
        raise RoutingError(
            f"sub-network {name!r} has values per layer and cannot be built from its name. "
            f"Use the configuration that it came from."
        )
    parts = split_name(name)
    if parts is None:
        known = " ".join(f"{axis.letter} ({axis.wire})" for axis in AXES)
        raise RoutingError(
            f"{shorten(name)} is no sub-network name. Write 'full', or parts joined by '-', such "
            f"as 'L36-k2-w6-t0.7-p8': {known}, each with its value; an absent part means the full "
            f"value. k4x12,2x36 is top_k 4 for 12 layers, then 2 for 36; Lx5 and px5 list layers "
            f"and experts 0 and 2 as bits."
        )
    return dict(_read(axis, parts[axis.name], shape) for axis in AXES if axis.name in parts)


def write_name(values: Mapping[Axis, Sequence[Any]]) -> str:
    """The name of these values.

    Args:
        values: of each axis that is not full, one value per layer; of one that layers have no value
            of their own on, a list of that alone. A set is a tuple of ids, ascending.
    """
    return "-".join(axis.letter + write(axis, column) for axis, column in values.items()) or FULL


def write(axis: Axis, column: Sequence[Any]) -> str:
    """A part of a name, without its letter: '2', or '4x12,2x36' where values differ."""
    runs = [(value, len(list(group))) for value, group in groupby(column)]
    if len(runs) == 1:
        return write_value(axis, column[0])
    return ",".join(f"{write_value(axis, value)}x{count}" for value, count in runs)


def write_value(axis: Axis, value: Any) -> str:
    """One value: '2', '0.7', '8' for the first 8 members of a set, 'x5' for members 0 and 2."""
    if axis.kind == "real" and 0 <= value <= axis.largest:
        return spell_float32(value)
    if isinstance(value, tuple):
        if value == tuple(range(len(value))):
            return str(len(value))
        return f"x{sum(1 << member for member in value):x}"
    return str(value)


@cache
def _form(axis: Axis) -> re.Pattern[str]:
    value = _VALUE[axis.kind]
    run = f"{value}x{_NUMBER}"
    return re.compile(f"{value}|{run}(?:,{run})*" if axis.per_layer else value)


def _read(axis: Axis, text: str, shape: ModelShape) -> tuple[str, Any]:
    """(argument of `resolve`, value) of a part."""
    if re.fullmatch(_VALUE[axis.kind], text):
        key = axis.members if axis.members is not None and is_listed(text) else axis.name
        return key, _read_value(axis, text)
    runs = [item.rpartition("x") for item in text.split(",")]
    check_length(axis.name, sum(int(count) for _, _, count in runs), shape.num_layers)
    column: list[Any] = []
    for value, _, count in runs:
        one = _read_value(axis, value)
        if axis.kind == "set" and isinstance(one, int):  # a list of numbers would be ids
            one = range(check_integer(axis.name, one, 1, axis.most(shape), axis.hint))
        column += [one] * int(count)
    return axis.name, column


def _read_value(axis: Axis, text: str) -> Any:
    if axis.kind == "real":
        return float(text)
    if not text.startswith("x"):
        return int(text)
    bits = f"{int(text[1:], 16):b}"
    return [i for i, bit in enumerate(reversed(bits)) if bit == "1"]
