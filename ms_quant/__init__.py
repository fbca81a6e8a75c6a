"""MindSpore-native quantization for Ascend, on any machine.

The public names are imported when they are first used: ``quantize``, ``save_quantized`` and
``QuantLinear`` need MindSpore, everything else does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "quantize": "ms_quant.cells",
    "calibrate": "ms_quant.cells",
    "summary": "ms_quant.cells",
    "load_quantized": "ms_quant.cells",
    "QuantLinear": "ms_quant.cells",
    "save_quantized": "ms_quant.cells",
    "SCHEMES": "ms_quant.schemes.table",
    "ALGORITHMS": "ms_quant.algorithms",
    "MsQuantError": "ms_quant.errors",
    "quantize_checkpoint": "ms_quant.pipeline.run",
    "verify_checkpoint": "ms_quant.verify.checkpoint",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
