"""The layers of a decoder between its linears, as MindSpore Cells.

MindSpore's CPU kernels broadcast, reduce and slice five to fifteen times slower than they
multiply matrices, so sums over the last axis, products with a vector and the half-turn of the
rotary embedding are written as products with small constant matrices. Even so an operator takes
some tens of microseconds to launch, so in PyNative on CPU norms, gates and attention call native
kernels (:mod:`ms_quant.cells.direct`), if no hook and no gradient is wanted.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant import kernels
from ms_quant.cells.direct import Linear, as_type, calls_directly, floats, has_kernels, threads


def repeat_rows(row: Tensor, count: int) -> Tensor:
    """(count, n) from ``row`` of n values: an outer product with ones, which is exact."""
    return ops.matmul(ops.ones((count, 1), row.dtype), row.reshape(1, -1))


class RMSNorm(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = Parameter(np.ones(size, np.float32))
        self.mean = Tensor(np.full((size, 1), 1.0 / size, np.float32))
        self.size, self.eps = size, eps

    def __call__(self, x: Tensor) -> Tensor:
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(x)
        y = kernels.rms_norm(floats(x), floats(self.weight), self.eps, threads())
        return as_type(y, x.dtype)

    def construct(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.size)
        inverse = ops.rsqrt(ops.matmul(rows * rows, self.mean) + self.eps)
        return (rows * ops.matmul(inverse, self.weight.reshape(1, -1))).reshape(x.shape)


class Softmax(nn.Cell):
    """Softmax over the last axis, with a gradient that is fast on CPU."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.softmax(x, -1)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        size = x.shape[-1]
        product = (y * dy).reshape(-1, size)
        total = ops.matmul(product, ops.ones((size, 1), x.dtype))
        spread = ops.matmul(total, ops.ones((1, size), x.dtype)).reshape(x.shape)
        return (y * (dy - spread),)


@ops.constexpr
def _swapped_rows(a: int, b: int, c: int) -> Tensor:
    rows = np.arange(a * b * c, dtype=np.int32).reshape(a, b, c)
    return Tensor(np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1))


def transpose_heads(x: Tensor) -> Tensor:
    """(A, B, C, D) to (A, C, B, D): a gather of rows, ten times faster than a transpose."""
    a, b, c, d = x.shape
    return ops.gather(x.reshape(-1, d), _swapped_rows(a, b, c), 0).reshape(a, c, b, d)


class TransposeHeads(nn.Cell):
    """(B, S, heads, D) to (B, heads, S, D) and back, with a gradient that is fast on CPU."""

    def construct(self, x: Tensor) -> Tensor:
        return transpose_heads(x)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (transpose_heads(dy),)


class Embedding(nn.Cell):
    """Rows of a table, by token id."""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = Parameter(np.zeros((rows, size), np.float32))

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


def dense(in_features: int, out_features: int, bias: bool) -> Linear:
    return Linear(in_features, out_features, has_bias=bias, weight_init="zeros", bias_init="zeros")


def project(linear: nn.Cell, x: Tensor, decode: bool) -> Tensor:
    """The output of a linear. Only one that tells the phases apart is told which it is."""
    return linear(x, True) if decode and getattr(linear, "phased", False) else linear(x)


def rotate_half_matrix(size: int) -> np.ndarray:
    """The R with ``x @ R == concat(-x[size // 2:], x[:size // 2])``; exact, one term each."""
    half = size // 2
    turn = np.zeros((size, size), np.float32)
    turn[half:, :half] = -np.eye(half, dtype=np.float32)
    turn[:half, half:] = np.eye(half, dtype=np.float32)
    return turn


class SwiGLU(nn.Cell):
    """gate * sigmoid(gate) * up."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(gate, up)
        return as_type(kernels.swiglu(floats(gate), floats(up), threads()), gate.dtype)

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * ops.sigmoid(gate) * up


class Residual(nn.Cell):
    """x + y."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(x, y)
        with np.errstate(all="ignore"):
            return as_type(np.add(floats(x), floats(y)), x.dtype)

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y
