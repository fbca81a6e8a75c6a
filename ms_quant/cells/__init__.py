"""Quantized MindSpore Cells."""

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.save import save_quantized
from ms_quant.cells.swap import quantize

__all__ = ["QuantLinear", "quantize", "save_quantized"]
