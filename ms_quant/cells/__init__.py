"""Quantized MindSpore Cells."""

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.swap import quantize

__all__ = ["QuantLinear", "quantize"]
