"""How many calibration tokens the experts of a checkpoint saw, as its record says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ms_quant.errors import BadFileError

KEY = "routing"
SHOWN = 3
_NUMBERS = {"tokens": int, "least": int, "mean": float, "most": int}
_LISTS = "none", "seen_on_others"


def expert_lines(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Sentences about the experts; none where the record says nothing of them.

    Args:
        record: the content of ``ms_quant.json``.
        where: that file, for errors.

    Raises:
        MsQuantError: the entry is malformed.
    """
    entries = record.get(KEY)
    if entries is None:
        return ()
    if not isinstance(entries, Mapping) or not entries:
        raise BadFileError(f"{where}: {KEY} is {entries!r:.80}, expected an entry for each block")
    for block, entry in entries.items():
        if not _is_entry(entry):
            raise BadFileError(
                f"{where}: {KEY}: {block} is {entry!r:.80}, expected counts of tokens"
            )
    return tuple(_lines(entries))


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and all(type(entry.get(key)) is kind for key, kind in _NUMBERS.items())
        and all(isinstance(entry.get(key), list) for key in _LISTS)
    )


def _lines(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    block, fewest = min(entries.items(), key=lambda item: item[1]["least"])
    mean = sum(entry["mean"] for entry in entries.values()) / len(entries)
    yield (
        f"an expert saw {mean:,.0f} calibration tokens in the mean, and {fewest['least']:,} in "
        f"{block} at the least"
    )
    others = sum(len(entry["seen_on_others"]) for entry in entries.values())
    if others:
        yield f"{others} experts were seen on tokens that do not go to them, too"
    none = [
        f"{block} expert {expert}" for block, entry in entries.items() for expert in entry["none"]
    ]
    if none:
        more = f" and {len(none) - SHOWN} more" if len(none) > SHOWN else ""
        yield f"experts that no token went to, {len(none)}: {', '.join(none[:SHOWN])}{more}"
