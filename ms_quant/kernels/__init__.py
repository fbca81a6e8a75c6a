"""Quantized linears in C++ for CPUs, and what they need. docs/kernels.md"""

from ms_quant.kernels.attention_blocks import block_means, quantize_heads
from ms_quant.kernels.attention_operands import MOST_HEAD_SIZE, Codes
from ms_quant.kernels.block import attention, masked_softmax, rms_norm, rope, swiglu
from ms_quant.kernels.hadamard import sylvester
from ms_quant.kernels.matrix import column_stats, has_product, matmul, product, syrk
from ms_quant.kernels.native import (
    ISAS,
    available,
    best_isa,
    has_isa,
    library_path,
    note,
    quantize_rows,
    set_operator_threads,
    threads_of,
)
from ms_quant.kernels.packing import PackedLinear, layout_of, pack, transforms
from ms_quant.kernels.sparse_attention import block_attention
from ms_quant.kernels.step import row_products, step_attention
from ms_quant.kernels.stored_rows import quantize_stored
from ms_quant.kernels.watched import WatchedArrays, WatchedLinear

__all__ = [
    "ISAS",
    "MOST_HEAD_SIZE",
    "Codes",
    "PackedLinear",
    "WatchedArrays",
    "WatchedLinear",
    "attention",
    "available",
    "best_isa",
    "block_attention",
    "block_means",
    "column_stats",
    "has_isa",
    "has_product",
    "layout_of",
    "library_path",
    "masked_softmax",
    "matmul",
    "note",
    "pack",
    "product",
    "quantize_heads",
    "quantize_rows",
    "quantize_stored",
    "rms_norm",
    "rope",
    "row_products",
    "set_operator_threads",
    "step_attention",
    "swiglu",
    "sylvester",
    "syrk",
    "threads_of",
    "transforms",
]
