"""The checkpoint flavours, by name. A new one is a module with a ``FLAVOUR`` and a row here."""

from __future__ import annotations

from pathlib import Path

from ms_quant.formats.ascend import format as ascend
from ms_quant.formats.compressed_tensors import format as compressed_tensors
from ms_quant.formats.format import Flavour
from ms_quant.formats.golden_stick import format as golden_stick
from ms_quant.formats.mindie_sd import format as mindie_sd

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
