"""The checkpoint formats, by name. A new one is a module with a ``FORMAT`` and a row here."""

from __future__ import annotations

from pathlib import Path

from ms_quant.formats.ascend import format as ascend
from ms_quant.formats.compressed_tensors import format as compressed_tensors
from ms_quant.formats.format import CheckpointFormat
from ms_quant.formats.golden_stick import format as golden_stick
from ms_quant.formats.mindie_sd import format as mindie_sd

FORMATS: dict[str, CheckpointFormat] = {
    format.name: format
    for format in (
        golden_stick.FORMAT,
        ascend.FORMAT,
        compressed_tensors.FORMAT,
        mindie_sd.FORMAT,
    )
}


def is_quantized(directory: Path) -> bool:
    """Whether a directory has the description of some format."""
    return any(format.find(directory) for format in FORMATS.values())
