"""MindSpore: networks whose linears are quantized."""

from ms_quant.cells.load import load_quantized
from ms_quant.cells.observations import Observations
from ms_quant.cells.observe import calibrate
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.save import save_quantized
from ms_quant.cells.summaries import Summary, summary
from ms_quant.cells.swap import quantize

__all__ = [
    "Observations",
    "QuantLinear",
    "Summary",
    "calibrate",
    "load_quantized",
    "quantize",
    "save_quantized",
    "summary",
]
