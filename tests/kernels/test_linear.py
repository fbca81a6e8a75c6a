"""The native linears against their definition in NumPy, on every instruction set that is here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.kernels import available, best_isa, native, pack
from ms_quant.numerics.activation import Float, PerToken, Phased, StaticInt8, static_activation
from ms_quant.numerics.affine import LIMITS
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat, WeightFormat
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler at install time")
ISAS = [name for name in native.ISAS if available() and native.has_isa(name)]
SIZES = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130, 257]
EPSILON = 2.0**-24


def made(
    format: WeightFormat, shape: tuple[int, int], activation: Any, seed: int = 0, bias: bool = True
) -> QuantizedLinear:
    """A linear of any codes at all, also those that no rounding gives."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape, np.float32) * np.exp(rng.standard_normal((shape[0], 1)))
    grid = format.fit(weight.astype(np.float32), "weight")
    low, high = LIMITS[format.bits]
    codes = rng.integers(low, high + 1, shape).astype(np.int8)
    vector = rng.standard_normal(shape[0]).astype(np.float32) if bias else None
    return QuantizedLinear(codes, grid, vector, activation)


def tokens(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Some of them zero, tiny, huge, or in the middle of two codes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp(4 * rng.standard_normal((rows, 1)))
    x[::5] = 0
    x[1::5] = rng.integers(-127, 127, x[1::5].shape) + 0.5
    x[1::5, :1] = 127
    x[3::5] *= 1e-38
    return x.astype(np.float32)


def static(columns: int, per_channel: bool, seed: int = 0) -> Any:
    x = tokens(8, columns, seed)
    low, high = x.min(axis=0) / 2, x.max(axis=0) / 2
    smooth = np.exp(np.random.default_rng(seed).standard_normal(columns)).astype(np.float32)
    found = static_activation(low, high, smooth if per_channel else None, DTYPES["float32"], "x")
    return found if per_channel else replace(found, folds_bias=True)


def multiplied(columns: int, dtype: str, seed: int) -> Any:
    """A static input that is not divided by its scale, of any reciprocal."""
    found = static(columns, False, seed)
    step = np.full(columns, found.scale.astype(DTYPES[dtype]), np.float32)
    return replace(found, input_scale=step, multiplied_in=DTYPES[dtype])


def integer_linears(shape: tuple[int, int], seed: int) -> list[QuantizedLinear]:
    eight, four = AffineFormat(8), AffineFormat(4)
    phased = Phased().restore(static(shape[1], False, seed))
    product = multiplied(shape[1], "bfloat16", seed)
    per_tensor = AffineFormat(8, per_tensor=True)
    smooth = np.exp(np.random.default_rng(seed).standard_normal(shape[1])).astype(np.float32)
    return [
        made(eight, shape, PerToken(8), seed),
        made(eight, shape, PerToken(8, 0.8), seed, bias=False),
        replace(made(eight, shape, PerToken(8), seed), smooth=smooth),
        made(four, shape, PerToken(8), seed),
        made(four, shape, PerToken(4), seed),
        made(four, shape, PerToken(4, 0.9), seed, bias=False),
        made(eight, shape, static(shape[1], True, seed), seed),
        made(eight, shape, static(shape[1], False, seed), seed),
        replace(made(per_tensor, shape, StaticInt8().restore(static(shape[1], True)), seed)),
        made(eight, shape, phased, seed),
        made(eight, shape, product, seed),
        made(eight, shape, Phased(True).restore(product), seed, bias=False),
        replace(made(eight, shape, multiplied(shape[1], "float32", seed), seed), smooth=smooth),
    ]


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 12, 13, 15, 16, 17, 30, 31, 32, 33, 49]),
    columns=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_integer_sums_are_bit_exact(
    isa: str, rows: int, columns: int, outputs: int, seed: int, threads: int
) -> None:
    x = tokens(rows, columns, seed)
    for linear in integer_linears((outputs, columns), seed):
        packed = pack(linear, isa)
        assert packed is not None
        for decode in (False, True):
            found, expected = packed(x, decode, threads), linear.forward(x, decode)
            np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"),
    [(515, 70, 40), (40, 4100, 33), (300, 5000, 70), (522, 2051, 17)],
)
def test_many_rows_and_inputs(isa: str, rows: int, columns: int, outputs: int) -> None:
    x = tokens(rows, columns)
    for format in (AffineFormat(8), AffineFormat(4)):
        linear = made(format, (outputs, columns), PerToken(8))
        packed = pack(linear, isa)
        assert packed is not None
        np.testing.assert_array_equal(packed(x, threads=2), linear.forward(x))


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums(isa: str) -> None:
    """All codes -128 or 127: 16-bit sums of pairs would saturate."""
    columns = 2048
    for code in (-128, 127):
        linear = made(AffineFormat(8), (3, columns), PerToken(8), bias=False)
        linear = replace(linear, weight=np.full((3, columns), code, np.int8))
        for value in (-1.0, 1.0):
            x = np.full((18, columns), value, np.float32)
            packed = pack(linear, isa)
            assert packed is not None
            np.testing.assert_array_equal(packed(x), linear.forward(x))


def exact(linear: QuantizedLinear, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a weight-only or grouped linear computes, in float64, and the sum of all magnitudes."""
    if linear.smooth is not None:
        x = linear.smoothed(x)
    seen = linear.activation.fake(x).astype(np.float64)
    weight = linear.grid.values(linear.weight).astype(np.float64)
    bias = np.zeros(1) if linear.bias is None else linear.bias.astype(np.float64)
    largest = np.abs(weight)
    if hasattr(linear.grid, "zero_point"):  # codes and zero points are multiplied apart
        size = linear.weight.shape[1] // linear.grid.scale.shape[1]
        parts = np.abs(linear.grid.zero_point.astype(np.float64)) * linear.grid.scale
        largest = largest + 2 * np.repeat(parts, size, axis=1)
    return seen @ weight.T + bias, np.abs(seen) @ largest.T + np.abs(bias)


FLOATS: list[tuple[WeightFormat, Any, int]] = [
    (AffineFormat(8), Float(), 1),
    (AffineFormat(8, symmetric=False), Float(), 1),
    (AffineFormat(8, group_size=32), Float(), 32),
    (AffineFormat(4), Float(), 1),
    (AffineFormat(4, symmetric=False), Float(), 1),
    (AffineFormat(4, group_size=32, symmetric=False), Float(), 32),
    (AffineFormat(4, group_size=64), Float(), 64),
    (AffineFormat(8, group_size=96, symmetric=False), Float(), 96),
    (AffineFormat(4, group_size=40), Float(), 40),
    (TwoLevelFormat(32), PerToken(8), 32),
    (TwoLevelFormat(64), PerToken(8), 64),
    (TwoLevelFormat(192), PerToken(8), 192),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 17, 29, 33, 514])
@pytest.mark.parametrize(("format", "activation", "multiple"), FLOATS)
def test_float_sums_are_within_their_bound(
    isa: str, rows: int, format: WeightFormat, activation: Any, multiple: int
) -> None:
    """docs/kernels.md: (K + 8) * 2**-24 times the sum of all magnitudes."""
    sizes = [(1, 1), (3, 33), (7, 40)]
    if rows == 514:
        sizes.append((30, 70))  # so many that sums wait for the next part of the inputs
    for count, outputs in sizes:
        columns = count * multiple if multiple > 1 else 10 * count + 3
        linear = made(format, (outputs, columns), activation, seed=rows)
        x = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
        if isinstance(activation, Float):
            smooth = np.exp(np.random.default_rng(1).standard_normal(columns)).astype(np.float32)
            linear = replace(linear, smooth=smooth if count == 3 else None)
        packed = pack(linear, isa)
        assert packed is not None
        expected, size = exact(linear, x)
        error = np.abs(packed(x, threads=2) - expected)
        assert (error <= (columns + 8) * EPSILON * size + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_of_every_magnitude(isa: str, bits: int) -> None:
    """Also those whose parts would be subnormal, and those whose products nearly overflow."""
    rng = np.random.default_rng(bits)
    linear = made(AffineFormat(bits, symmetric=False), (40, 130), Float())
    x = rng.standard_normal((80, 130)) * 10.0 ** rng.uniform(-37, 34, (80, 1))
    x[::3] *= 10.0 ** rng.uniform(-4, 0, x[::3].shape)
    x = x.astype(np.float32)
    x[5, 7] = 1e-40
    packed = pack(linear, isa)
    assert packed is not None
    expected, size = exact(linear, x)
    error = np.abs(packed(x, threads=2) - expected)
    assert (error <= (130 + 8) * EPSILON * size + 1e-44 * 130).all()


def largest_beside(x: np.ndarray, group: int) -> np.ndarray:
    """For each input the largest magnitude of its row, group and 512 inputs."""
    found = np.empty(x.shape)
    for start in range(0, x.shape[1], group):
        for begin in range(start, start + group, 512):
            part = slice(begin, min(begin + 512, start + group))
            found[:, part] = np.abs(x[:, part]).max(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 24, 25])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 24, 128, 520, 1032])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_beside_much_larger_ones(
    isa: str, rows: int, bits: int, group: int, symmetric: bool
) -> None:
    """docs/kernels.md: also 2**-30 of the largest. Weights of the large inputs are 0, so that what
    the others lose can be seen."""
    columns = 2 * group or 1300
    linear = made(
        AffineFormat(bits, group_size=group or None, symmetric=symmetric), (33, columns), Float()
    )
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-6, 0, (rows, columns))
    large = rng.integers(0, columns, 5)
    x[:, large] *= 10.0 ** rng.uniform(0, 12, (rows, 5))
    x = x.astype(np.float32)
    codes = linear.weight.copy()
    codes[:, large] = 0
    linear = replace(linear, weight=codes)
    packed = pack(linear, isa)
    assert packed is not None
    expected, size = exact(linear, x)
    _, of_largest = exact(linear, largest_beside(x, group or columns))
    bound = (columns + 8) * EPSILON * size + 2.0**-30 * of_largest
    assert (np.abs(packed(x, threads=2) - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38, 1e-30, 1e-44])
def test_an_odd_row_among_few_changes_no_other(isa: str, value: float) -> None:
    linear = made(AffineFormat(4, group_size=32), (33, 64), Float())
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    packed = pack(linear, isa)
    assert packed is not None
    before = packed(x)
    x[3, 32:] = value
    rest = [0, 1, 2, 4]
    np.testing.assert_array_equal(packed(x)[rest], before[rest])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, 3.4e38])
def test_what_overflows_in_one_row_stays_there(isa: str, value: float) -> None:
    linear = made(AffineFormat(8), (33, 70), Float())
    linear = replace(linear, weight=np.maximum(linear.weight, 1))
    x = np.random.default_rng(0).standard_normal((40, 70), np.float32)
    packed = pack(linear, isa)
    assert packed is not None
    before = packed(x)
    x[20:26, 3] = value
    found = packed(x)
    rest = np.r_[:20, 26:40]
    np.testing.assert_array_equal(found[rest], before[rest])
    if np.isinf(value):
        np.testing.assert_array_equal(found[20:26], linear.forward(x)[20:26])


def test_no_rows() -> None:
    packed = pack(made(AffineFormat(8), (5, 7), PerToken(8)))
    assert packed is not None
    assert packed(np.zeros((0, 7), np.float32)).shape == (0, 5)


def test_what_has_no_kernel_is_left_to_the_reference() -> None:
    linear = made(AffineFormat(8), (6, 10), PerToken(8))
    branch = LowRank(np.zeros((1, 10), np.float32), np.zeros((6, 1), np.float32))
    assert pack(replace(linear, branch=branch)) is None
    assert pack(made(AffineFormat(8, group_size=5), (6, 10), Float())) is None
    assert pack(made(AffineFormat(8, group_size=5), (6, 10), PerToken(8))) is None
    assert pack(replace(linear, weight=np.zeros((0, 10), np.int8))) is None


def test_a_transform_is_the_callers() -> None:
    """And what comes before it, too."""
    eye = np.eye(2, dtype=np.float32)
    linear = made(AffineFormat(4), (6, 4), PerToken(4))
    whole = replace(linear, kronecker=Kronecker(eye, eye), smooth=np.full(4, 2, np.float32))
    packed, x = pack(whole), tokens(3, 4)
    assert packed is not None
    np.testing.assert_array_equal(packed(x), linear.forward(x))


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from([0, *SIZES]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_rows_are_quantized_bit_for_bit(
    isa: str, rows: int, columns: int, bits: int, seed: int
) -> None:
    x = tokens(rows, columns, seed)
    codes, scales = native.quantize_rows(x, bits, 0.9, isa, threads=2)
    expected = PerToken(bits, 0.9).codes(x)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


@pytest.mark.parametrize("isa", ISAS)
def test_scales_of_rows_are_rounded_up_to_bfloat16(isa: str) -> None:
    x = tokens(40, 130, 5)
    bfloat16 = DTYPES["bfloat16"]
    codes, scales = native.quantize_rows(x, isa=isa, cleared=16)
    grid = AffineFormat(8).fit(x, "x", bfloat16)
    np.testing.assert_array_equal(scales, grid.scale)
    np.testing.assert_array_equal(codes, grid.round(x))
    assert (scales != native.quantize_rows(x, isa=isa)[1]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_every_quotient_near_the_middle_of_two_codes(isa: str) -> None:
    """There the product with the reciprocal and the quotient may have different neighbours."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scale = np.float32(np.exp(rng.normal()))
        middles = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
        steps = rng.integers(-3, 4, middles.shape).astype(np.int32)
        x = (middles.view(np.int32) + steps).view(np.float32)
        x = np.append(x, np.float32(127) * scale)[None]
        np.testing.assert_array_equal(native.quantize_rows(x, isa=isa)[0], PerToken(8).codes(x)[0])


def test_damaged_blobs_are_refused() -> None:
    linear = made(AffineFormat(8), (6, 10), PerToken(8))
    packed = pack(linear)
    assert packed is not None
    x = tokens(2, 10)
    for name in ("weights", "params"):
        blob = getattr(packed, name)
        for short in (0, 40, 127, blob.size - 1):
            part = np.ascontiguousarray(blob[:short])
            with pytest.raises(MsQuantError, match="packed weight or its parameters are damaged"):
                replace(packed, **{name: part})(x)
        wrong = blob.copy()
        wrong[0] ^= 1
        with pytest.raises(MsQuantError, match="damaged"):
            replace(packed, **{name: wrong})(x)
    other = pack(made(AffineFormat(8), (6, 11), PerToken(8)))
    assert other is not None
    with pytest.raises(MsQuantError, match="damaged"):
        replace(packed, params=other.params)(x)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(
        MsQuantError, match=r"instruction set 'mmx' is not here, expected one of sca"
    ):
        pack(made(AffineFormat(8), (6, 10), PerToken(8)), "mmx")
    assert best_isa() == ISAS[-1]


def test_several_threads_call_at_once() -> None:
    linear = made(AffineFormat(8), (300, 256), PerToken(8))
    packed = pack(linear)
    assert packed is not None
    inputs = [tokens(9, 256, seed) for seed in range(4)]
    expected = [linear.forward(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not np.array_equal(packed(inputs[index], threads=3), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_threads_that_sleep_between_calls() -> None:
    linear = made(AffineFormat(8), (300, 256), PerToken(8))
    packed, x = pack(linear), tokens(9, 256)
    assert packed is not None
    for pause in (0, 1e-4, 2e-4, 3e-4, 1e-3, 1e-2) * 5:
        time.sleep(pause)
        np.testing.assert_array_equal(packed(x, threads=3), linear.forward(x))


FORKED = """
import os, signal
import numpy as np
from ms_quant.kernels import pack
from ms_quant.numerics.linear import quantize_linear
rng = np.random.default_rng(0)
weight, x = rng.standard_normal((200, 64), "f4"), rng.standard_normal((20, 64), "f4")
linear = quantize_linear(weight, None, None, np.dtype("f4"))
packed = pack(linear)
before = packed(x, threads=2)
child = os.fork()
signal.alarm(20)
for _ in range(100):
    assert np.array_equal(packed(x, threads=2), before)
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_works_after_a_fork() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


REFUSED = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
room = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(room), 0, 8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from ms_quant import kernels
assert kernels.best_isa() == "avx512_vnni", kernels.best_isa()
"""


@pytest.mark.skipif("amx" not in ISAS, reason="this machine has no AMX")
def test_without_permission_for_tiles_there_is_no_amx() -> None:
    """Linux gives none to a process whose signals have too little room to save tiles."""
    subprocess.run([sys.executable, "-c", REFUSED], check=True, timeout=60)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("column", [0, 5, 69, 130])
def test_nan_in_a_row_is_nan_in_its_outputs(isa: str, column: int) -> None:
    """Also where codes would hide it: a model whose activations overflow must not look well."""
    linears = integer_linears((9, 131), 0)
    linears += [made(format, (9, 131), Float()) for format in (AffineFormat(8), AffineFormat(4))]
    x = tokens(20, 131)
    x[2, column] = np.nan
    for linear in linears:
        packed = pack(linear, isa)
        assert packed is not None
        for decode in (False, True):
            found = packed(x, decode)
            assert np.isnan(found[2]).all()
            assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_quantized_rows_with_nan_have_no_scale() -> None:
    x = tokens(3, 70)
    x[1, 69] = np.nan
    assert np.isnan(native.quantize_rows(x)[1]).tolist() == [[False], [True], [False]]
