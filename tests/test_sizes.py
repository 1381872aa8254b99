"""Sizes are read as people write them."""

from __future__ import annotations

import pytest

from elastic_moe.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("123", 123), ("500MB", 500_000_000), ("16MiB", 1 << 24), ("1.5kb", 1500), ("2GiB", 2 << 30)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "-1GB", "12 parsecs", "nan", "infGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size such as 500MB or 5GB"):
        parse_size(text)
