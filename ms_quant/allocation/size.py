"""Sizes as people write them."""

from __future__ import annotations

import re

from ms_quant.errors import BadArgumentError

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("B", 1000), ("IB", 1024))
    for power, letter in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"([0-9][0-9_,]{0,20}(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str, what: str) -> int:
    """A size such as ``"100MB"``, ``"1.5 GiB"`` or ``"250000"``; MB are 1000 kB, MiB 1024 KiB.

    Args:
        text: the size.
        what: the argument is called so in the error.

    Raises:
        MsQuantError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise BadArgumentError(
            f"{what} is {text!r:.80}, expected a size such as 100MB, 1.5GiB or 250000"
        )
    return int(float(re.sub("[_,]", "", found[1])) * unit)
