"""Entries of a record as a report uses them: what is malformed counts as not recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ms_quant.pipeline.measured import KEY as MEASURED
from ms_quant.report.strange import readable


def entry(value: Any, *keys: str) -> Mapping[str, Any]:
    """The object at a path of keys; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return float(value) if good else None


def findings(record: Mapping[str, Any], block: int, group: str) -> Mapping[str, Any]:
    """What the record says was measured of a group."""
    return entry(record, MEASURED, f"block {block}", "groups", group)


def expert_tokens(record: Mapping[str, Any]) -> dict[int, list[int]]:
    """Block to how many tokens came to each of its experts."""
    found = {}
    for key, value in entry(record, MEASURED).items():
        counts = value.get("expert_tokens") if isinstance(value, Mapping) else None
        index = block_of(key)
        good = isinstance(counts, list) and all(type(one) is int and one >= 0 for one in counts)
        if index is not None and counts and good:
            found[index] = counts
    return dict(sorted(found.items()))


def block_of(key: str) -> int | None:
    """ "block 12" -> 12."""
    number = key.removeprefix("block ")
    return int(number) if number.isdecimal() and number.isascii() and len(number) < 7 else None


def pair(value: Any) -> tuple[float, float] | None:
    """Two finite numbers, or None."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    first, second = number(value[0]), number(value[1])
    return None if first is None or second is None else (first, second)


def chosen_text(chosen: Mapping[str, Any], algorithm: str) -> str:
    """What the algorithms chose for a group, in words."""
    found = []
    searches = "loss" in chosen and not {"alpha", "exponent"} & chosen.keys()
    if searches and any(name in algorithm for name in ("osl", "awq")):
        found.append("no smoothing (none was better)")
    for key, value in chosen.items():
        if key == "damping":
            found.append(f"fallback: damping raised to {_short(value)}")
        elif key not in ("loss", "flat_loss"):
            found.append(f"{key} {_short(value)}")
    return ", ".join(found)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_short, value[:4]))
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_short(part)}" for key, part in list(value.items())[:4])
    return f"{value:.3g}" if isinstance(value, float) else readable(value)[:40]
