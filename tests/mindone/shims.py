"""Operators that mindone asks for and MindSpore has no CPU kernel of, put together from others.

They are set before mindone is imported; it looks them up when it calls them. Values are those of
the operators, in float32.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops


def _numpy(values: np.ndarray, dtype) -> Tensor:
    x = Tensor(np.ascontiguousarray(values))
    return x if dtype is None else x.astype(dtype)


def arange(start=0, end=None, step=1, *, dtype=None) -> Tensor:
    start, end = (0, start) if end is None else (start, end)
    values = np.arange(start, end, step)
    return _numpy(values.astype("f4") if values.dtype.kind == "f" else values, dtype)


def linspace(start, end, steps, *, dtype=None) -> Tensor:
    return _numpy(np.linspace(start, end, steps, dtype="f4"), dtype)


def full(size, value, *, dtype=None) -> Tensor:
    return _numpy(np.full(size, value, None if dtype else "f4"), dtype)


def randn(*size, generator=None, dtype=None) -> Tensor:
    size = size[0] if isinstance(size[0], tuple | list) else size
    return _numpy(np.random.default_rng(0).standard_normal(size).astype("f4"), dtype)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] * b[None]


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    axes = tuple(range(-len(tuple(np.atleast_1d(normalized_shape))), 0))
    centred = x - x.mean(axes, keep_dims=True)
    y = centred * ops.rsqrt((centred * centred).mean(axes, keep_dims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def gelu(x, approximate="none") -> Tensor:
    return ops.gelu(x, approximate)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Of (B, N, S, D), in place of the flash operators."""
    scores = ops.matmul(query, key.swapaxes(-2, -1)) * (scale or 1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == ms.bool_:
        attn_mask = ops.where(attn_mask, Tensor(0.0, ms.float32), Tensor(-np.inf, ms.float32))
    scores = scores if attn_mask is None else scores + attn_mask
    return ops.matmul(ops.softmax(scores, -1), value)


class LayerNorm(nn.Cell):
    def __init__(self, shape, eps=1e-5, elementwise_affine=True, bias=True, dtype=None):
        super().__init__()
        self.normalized_shape, self.eps = tuple(int(n) for n in np.atleast_1d(shape)), eps
        affine = elementwise_affine
        self.weight = Parameter(Tensor(np.ones(self.normalized_shape, "f4"))) if affine else None
        zeros = np.zeros(self.normalized_shape, "f4")
        self.bias = Parameter(Tensor(zeros)) if affine and bias else None

    def construct(self, x):
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class GELU(nn.Cell):
    def __init__(self, approximate="none"):
        super().__init__()
        self.approximate = approximate

    def construct(self, x):
        return gelu(x, self.approximate)


class _PatchConv(nn.Cell):
    """A convolution whose stride is its kernel: a product with each patch."""

    dims = 2

    def __init__(self, channels, out, kernel_size, stride=1, padding=0, bias=True, **_):
        super().__init__()
        size = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        assert size == ((stride,) * self.dims if isinstance(stride, int) else tuple(stride))
        self.size = size
        fan = channels * math.prod(size)
        rng = np.random.default_rng(channels + out)
        weight = rng.standard_normal((out, channels, *size)) / math.sqrt(fan)
        self.weight = Parameter(Tensor(weight.astype("f4")))
        self.bias = Parameter(Tensor(np.zeros(out, "f4"))) if bias else None

    def construct(self, x):
        grid = [n // k for n, k in zip(x.shape[2:], self.size, strict=True)]
        split = [n for pair in zip(grid, self.size, strict=True) for n in pair]
        x = x.reshape(*x.shape[:2], *split)
        d = self.dims
        order = (0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2))
        rows = x.transpose(order).reshape(x.shape[0], math.prod(grid), -1)
        y = ops.matmul(rows, self.weight.reshape(self.weight.shape[0], -1).T)
        y = y if self.bias is None else y + self.bias
        return y.swapaxes(1, 2).reshape(x.shape[0], -1, *grid)


class PatchConv3d(_PatchConv):
    dims = 3


def einsum(equation, *operands) -> Tensor:
    return Tensor(np.einsum(equation, *(x.asnumpy() for x in operands)))


def install() -> None:
    """Puts them in their places, for this process."""
    F = mint.nn.functional
    mint.arange, mint.linspace, mint.full = arange, linspace, full
    mint.randn, mint.outer = randn, outer
    mint.stack = lambda tensors, dim=0: ops.stack(list(tensors), axis=dim)
    mint.ones_like = lambda x, *, dtype=None: ops.ones(x.shape, dtype or x.dtype)
    mint.zeros_like = lambda x, *, dtype=None: ops.zeros(x.shape, dtype or x.dtype)
    mint.einsum = einsum
    F.layer_norm, F.gelu = layer_norm, gelu
    mint.nn.LayerNorm, mint.nn.GELU = LayerNorm, GELU
    mint.nn.Conv2d, mint.nn.Conv3d = _PatchConv, PatchConv3d
    Tensor.clone = Tensor.copy
    repeat = Tensor.repeat_interleave
    Tensor.repeat_interleave = lambda self, repeats, dim=None, **_: repeat(self, repeats, dim)


def replace_flash_attention() -> None:
    """The same of mindone's own, after it was imported."""
    from mindone.diffusers.models import attention_dispatch, attention_processor

    attention_dispatch.scaled_dot_product_attention = attention
    attention_processor.Attention.scaled_dot_product_attention = lambda self, *args, **kwargs: (
        attention(*args, **kwargs)
    )
