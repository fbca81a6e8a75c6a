"""MindSpore's Ascend operators behind QuantLinear. Never run on a device.

Argument order, types and layouts follow MindSpore's operator documentation and are tested on
CPU with a recording double in place of the operators.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor
from mindspore.ops.auto_generate import DynamicQuantExt, QuantBatchMatmul, QuantV2

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.activation import PerToken, StaticActivation
from ms_quant.numerics.linear import QuantizedLinear


class Operators:
    """The operators of one QuantLinear."""

    def __init__(self) -> None:
        self.quant = QuantV2()
        self.dynamic_quant = DynamicQuantExt()
        self._matmul: dict = {}

    def matmul(self, dtype):
        """QuantBatchMatmul with a weight of shape (out, in) and outputs of ``dtype``."""
        if dtype not in self._matmul:
            self._matmul[dtype] = QuantBatchMatmul(
                transpose_x1=False, transpose_x2=True, dtype=dtype
            )
        return self._matmul[dtype]


def operators(linear: QuantizedLinear) -> Operators:
    """The operators of a linear.

    Raises:
        MsQuantError: there are none here for its scheme.
    """
    activation = linear.activation
    per_channel = isinstance(activation, StaticActivation) and not activation.folds_bias
    if not linear.integer or not (per_channel or activation == PerToken(8)):
        raise BadArgumentError(
            "QuantLinear: this scheme has no Ascend operators here yet, expected W8A8 or "
            "W8A8_DYNAMIC; on CPU every scheme runs"
        )
    return Operators()


def forward(cell, rows: Tensor) -> Tensor:
    """What ``cell`` computes for ``rows`` (tokens, in), float16 or bfloat16."""
    y = _product(cell, rows)
    return y + cell.bias.astype(y.dtype) if cell.has_bias else y


def _product(cell, rows: Tensor) -> Tensor:
    operators, matmul = cell.operators, cell.operators.matmul(rows.dtype)
    if not cell.static:
        qx, x_scale = operators.dynamic_quant(rows)
        return matmul(qx, cell.weight, cell.weight_scale, None, None, x_scale)
    # QuantV2 computes round(x * scale + offset): it takes the reciprocal of what is stored.
    scale = (1.0 / cell.input_scale).astype(rows.dtype)
    offset = cell.input_offset.astype(rows.dtype)
    qx = operators.quant(rows, scale, offset, False, "ROUND", ms.int8)
    return matmul(qx, cell.weight, cell.deq_scale, None, cell.quant_bias, None)
