"""The checkpoint flavours, by name. A new one is a module with a ``FLAVOUR`` and a row here."""

from __future__ import annotations

from pathlib import Path

from ms_quant.checkpoint import ascend, compressed_tensors, golden_stick, mindie_sd
from ms_quant.checkpoint.flavour import Flavour

FLAVOURS: dict[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        golden_stick.FLAVOUR,
        ascend.FLAVOUR,
        compressed_tensors.FLAVOUR,
        mindie_sd.FLAVOUR,
    )
}


def is_quantized(directory: Path) -> bool:
    """Whether a directory has the description of some flavour."""
    return any(flavour.find(directory) for flavour in FLAVOURS.values())
