"""The checkpoint flavours, by name. A new one is a module with a ``FLAVOUR`` and a row here."""

from __future__ import annotations

from pathlib import Path

from ms_quant.checkpoint import ascend, golden_stick
from ms_quant.checkpoint.flavour import Flavour

FLAVOURS: dict[str, Flavour] = {
    flavour.name: flavour for flavour in (golden_stick.FLAVOUR, ascend.FLAVOUR)
}


def find_flavour(directory: Path) -> Flavour | None:
    """The flavour whose description a directory has, or None."""
    found = (flavour for flavour in FLAVOURS.values() if (directory / flavour.document).exists())
    return next(found, None)
