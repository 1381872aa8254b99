"""Checks of single values, and how values are spelled in names and messages."""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from elastic_moe.errors import RoutingError


def as_float32(value: float) -> float:
    """`value` rounded to the nearest float32, which is what kernels compare with."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def spell_float32(value: float) -> str:
    """The shortest decimal, without exponent, that reads back as the same float32: '0.7'."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    text = next(text for text in texts if as_float32(float(text)) == as_float32(value))
    return format(Decimal(text), "f")


def is_list(value: Any) -> bool:
    """Whether a value lists values; text does not."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def as_index(value: Any) -> int | None:
    """`value` as an integer; None for what is none, bool and 2.0 included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_integer(field: str, value: Any, low: int, high: int, hint: str) -> int:
    """`value` as an integer in [low, high]; the message names `field` and ends in `hint`."""
    number = as_index(value)
    if number is None or not low <= number <= high:
        allowed = f"an integer in [{low}, {high}]"
        raise RoutingError(f"{field} must be {allowed}, got {shorten(value)}. {hint}".rstrip())
    return number


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; True is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_length(field: str, values: int, L: int) -> None:
    """Raise `RoutingError` unless there are as many values as the model has layers."""
    if values != L:
        raise RoutingError(
            f"{field} lists {values} values, but the model has {L} layers. "
            f"Give one value for all layers, or one for each of them."
        )


def shorten(value: object) -> str:
    """`repr` for an error message: at most 80 characters, and it fails on no number."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= 80 else text[:77] + "..."
