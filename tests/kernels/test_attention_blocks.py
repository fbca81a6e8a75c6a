"""Codes of queries, keys and values natively against NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.attention import operands
from ms_quant.errors import BadArgumentError
from ms_quant.kernels import block_means, quantize_heads
from ms_quant.numerics.minifloat import E4M3, decode, encode

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler at install time")


def in_numpy(monkeypatch, make):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda: False)
        return make()


def same(found, expected):
    np.testing.assert_array_equal(found.scales.view(np.uint32), expected.scales.view(np.uint32))
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert (found.block, found.element) == (expected.block, expected.element)
    assert found.codes.dtype == expected.codes.dtype


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 300, 150))),
    block=st.sampled_from([(128, 128), (256, 128), (1, 1000), (300, 1), (7, 5), (1, 1)]),
    heads=st.sampled_from([0, 1, "each"]),
    inside=st.booleans(),
    spread=st.sampled_from([1e-43, 1e-38, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_blocks_have_the_bits_of_numpy(shape, block, heads, inside, spread, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * spread).astype(np.float32)
    x[rng.random(shape) < 0.1] = 0
    x[:, 0, : shape[2] // 2] *= np.float32(-0.0)  # blocks of zeros of both signs
    if inside:
        x = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    order = None
    if heads:
        rows = 1 if heads == 1 else shape[1]
        order = np.stack([rng.permutation(shape[2]) for _ in range(rows)])
    scale = rng.random(shape[1]).astype(np.float32) * np.float32(max(spread, 1e-30)) + 1e-30
    with pytest.MonkeyPatch.context() as patch:
        for make in (
            lambda: operands.fp8_blocks(x, block, order),
            lambda: operands.int8_blocks(x, block, order),
            lambda: operands.fp8_per_channel(x, order),
            lambda: operands.int8_per_head(x, scale, order=order),
        ):
            same(make(), in_numpy(patch, make))


def test_every_code_and_what_lies_between(monkeypatch):
    """All e4m3 numbers, the ties between two, and the floats beside a tie."""
    numbers = np.sort(decode(np.arange(127, dtype=np.uint8), E4M3))
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(end)) for end in (0, 1000)]
    x = np.concatenate([numbers, ties, *beside])
    x = np.concatenate([x, -x]).astype(np.float32).reshape(1, 1, 1, -1)
    one = np.full((1, 1, 1, 1), 448 / 448, np.float32)
    made = quantize_heads(x, "e4m3", (1, 1024), scales=one)
    np.testing.assert_array_equal(made.codes, encode(x, E4M3))
    steps = np.arange(-130, 131, dtype=np.float32) / 2  # ties of int8, and beyond its ends
    steps = np.concatenate([steps, steps * 3]).reshape(1, 1, 1, -1)
    made = quantize_heads(steps, "int8", (1, 1024), scales=one)
    np.testing.assert_array_equal(made.codes, np.clip(np.rint(steps), -128, 127))


def test_threads_change_nothing():
    x = np.random.default_rng(0).standard_normal((2, 3, 500, 64), np.float32)
    order = np.random.default_rng(1).permutation(500)
    one = quantize_heads(x, "e4m3", (128, 128), order=order[None], threads=1)
    for threads in (2, 5):
        again = quantize_heads(x, "e4m3", (128, 128), order=order[None], threads=threads)
        np.testing.assert_array_equal(again.codes, one.codes)
        np.testing.assert_array_equal(again.scales, one.scales)
        means = block_means(x, 16, order, threads=threads)
        np.testing.assert_array_equal(means, block_means(x, 16, order, threads=1))


X = np.zeros((1, 2, 10, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_heads(X, "int8", (0, 8)), r"blocks of \(0, 8\) of heads of 8"),
        (
            lambda: quantize_heads(X, "int8", (5, 8), scales=np.ones((1, 2, 1, 1), np.float32)),
            r"scales has shape \(1, 2, 1, 1\), expected \(1, 2, 2, 1\)",
        ),
        (lambda: quantize_heads(X, "int8", (5, 8), order=np.zeros((1, 10), int)), "no permutation"),
        (lambda: quantize_heads(X.astype("f8"), "int8", (5, 8)), "x is float64, expected float32"),
        (lambda: block_means(X, 4, np.arange(9)), r"order has shape \(9,\), expected \(10,\)"),
        (lambda: block_means(X, 0), "blocks of 0 tokens, expected 1 or more"),
        (lambda: block_means(X[0], 4), r"x has shape \(2, 10, 8\), expected \(batch, heads, tok"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(BadArgumentError, match=message):
        call()
