"""Sizes as people write them, such as 500MB."""

from __future__ import annotations

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes: '500MB' is 500,000,000, '16MiB' is 16,777,216.

    Raises:
        ValueError: the text is no number of bytes, at least 1, with or without a unit.
    """
    digits = text.rstrip("KMGIBkmgib")
    unit = text[len(digits) :].upper()
    try:
        size = int(float(digits) * (_UNITS[unit] if unit else 1))
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is no size such as 500MB or 5GB")
    return size
