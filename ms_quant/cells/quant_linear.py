"""QuantLinear: one Cell for every scheme."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant.cells import ascend
from ms_quant.models.decoder import repeat_rows
from ms_quant.numerics.affine import QMAX, QMIN, SMALLEST_SCALE
from ms_quant.numerics.linear import QuantizedLinear

EXACT_K = 1024  # a float32 sum of this many products of int8 is exact: 1024 * 2**14 = 2**24


def _frozen(array: np.ndarray) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(array)), requires_grad=False)


class QuantLinear(nn.Cell):
    r"""A linear with int8 weights and int8 activations.

    The products of int8 activations and int8 weights are summed exactly, as int32 would, and the
    result is bit-equal to :meth:`ms_quant.numerics.linear.QuantizedLinear.forward`. On CPU the
    sum is a float32 matrix product over chunks of at most 1,024 inputs, which is exact, added in
    int32. On Ascend MindSpore's quantization operators are called instead.

    .. math::
        y = (\mathrm{int8}(x / s_{in} + z) W^T + b_q) \cdot s_{deq} + b

    Args:
        linear (QuantizedLinear): the int8 weight, its scales and bias.
        device_target (str, optional): ``"CPU"`` or ``"Ascend"``. Default: ``None``, the current
            device target.

    Inputs:
        - **x** (Tensor) - float, of shape :math:`(*, in)`.

    Outputs:
        Tensor of shape :math:`(*, out)`, of the type of `x`.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> from mindspore import Tensor
        >>> from ms_quant.cells import QuantLinear
        >>> from ms_quant.numerics.linear import quantize_linear
        >>> weight = np.eye(4, dtype=np.float32)
        >>> linear = quantize_linear(weight, None, None, np.dtype(np.float32))
        >>> print(QuantLinear(linear)(Tensor(np.ones((1, 4), np.float32))).shape)
        (1, 4)
    """

    def __init__(self, linear: QuantizedLinear, device_target: str | None = None):
        super().__init__()
        self.out_channels, self.in_channels = linear.weight.shape
        self.weight = _frozen(linear.weight)
        self.static = linear.activation is not None
        if linear.activation is not None:
            self.input_scale = _frozen(linear.activation.input_scale)
            offset = np.full(self.in_channels, linear.activation.offset, np.int8)
            self.input_offset = _frozen(offset)
            self.offset = float(linear.activation.offset)
            self.deq_scale = _frozen(linear.deq_scale)
            self.quant_bias = _frozen(linear.quant_bias)
        else:
            self.weight_scale = _frozen(linear.weight_scale)
        self.has_bias = linear.bias is not None
        if linear.bias is not None:
            self.bias = _frozen(linear.bias)
        target = device_target or ms.get_context("device_target")
        self.operators = ascend.Operators() if target == "Ascend" else None
        self.matmul = ops.MatMul(transpose_b=True)
        self.row_max = ops.ReduceMax(keep_dims=True)

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1] + (self.out_channels,)
        rows = x.reshape(-1, self.in_channels)
        if rows.shape[0] == 0:
            return ops.zeros(shape, x.dtype)
        if self.operators is not None:
            return ascend.forward(self, rows).reshape(shape)
        if self.static:
            y = self._static(rows.astype(ms.float32))
        else:
            y = self._dynamic(rows.astype(ms.float32))
        if self.has_bias:
            y = y + repeat_rows(self.bias, rows.shape[0])
        return y.reshape(shape).astype(x.dtype)

    def _static(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        steps = rows / repeat_rows(self.input_scale, count) + self.offset
        qx = ops.clip_by_value(ops.round(steps), float(QMIN), float(QMAX))
        if self.in_channels <= EXACT_K:
            # Both terms are integers below 2**24 + 1, so one float32 addition rounds their exact
            # sum, as converting the int32 sum would.
            total = self._chunk(qx, 0) + repeat_rows(self.quant_bias.astype(ms.float32), count)
        else:
            total = (self._sum(qx) + self.quant_bias).astype(ms.float32)
        return total * repeat_rows(self.deq_scale, count)

    def _dynamic(self, rows: Tensor) -> Tensor:
        x_scale = self.row_max(ops.abs(rows), -1) / float(QMAX)
        x_scale = ops.select(x_scale >= float(SMALLEST_SCALE), x_scale, ops.ones_like(x_scale))
        steps = rows / ops.matmul(x_scale, ops.ones((1, self.in_channels), rows.dtype))
        qx = ops.clip_by_value(ops.round(steps), float(QMIN), float(QMAX))
        total = self._chunk(qx, 0)
        if self.in_channels > EXACT_K:
            total = self._sum(qx).astype(ms.float32)
        total = total * ops.matmul(x_scale, ops.ones((1, self.out_channels), rows.dtype))
        return total * repeat_rows(self.weight_scale, rows.shape[0])

    def _chunk(self, qx: Tensor, start: int) -> Tensor:
        """Exact float32 products over at most EXACT_K inputs from ``start``."""
        stop = min(start + EXACT_K, self.in_channels)
        if start == 0 and stop == self.in_channels:
            return self.matmul(qx, self.weight.astype(ms.float32))
        return self.matmul(qx[:, start:stop], self.weight[:, start:stop].astype(ms.float32))

    def _sum(self, qx: Tensor) -> Tensor:
        total = self._chunk(qx, 0).astype(ms.int32)
        for start in range(EXACT_K, self.in_channels, EXACT_K):
            total = total + self._chunk(qx, start).astype(ms.int32)
        return total

    def extend_repr(self) -> str:
        kind = "static" if self.static else "per-token"
        return f"in={self.in_channels}, out={self.out_channels}, int8 weights, {kind} activations"
