"""Sizes as people write them."""

from __future__ import annotations

import pytest

from ms_quant.allocation.size import parse_bytes
from ms_quant.errors import BadArgumentError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("250000", 250_000),
        ("250_000", 250_000),
        ("1,500", 1500),
        ("100MB", 100 * 10**6),
        ("100 mb", 100 * 10**6),
        ("1kB", 1000),
        ("1.5GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
        ("0.5 KiB", 512),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "size") == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", "1e9", "10 MBit", "1.2.3", "ten", "nan", "1 0", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadArgumentError, match=r"^size is '.*, expected a size such as 100MB"):
        parse_bytes(text, "size")
