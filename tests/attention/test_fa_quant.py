"""Quantized attention: codes against loops, every kind against its decoded operands, rotations."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from slow_attention import everything, slow_attention

from ms_quant.attention import operands
from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import KINDS, fa_quant, quantize_operands
from ms_quant.attention.operands import fa_block_quant, head_scales
from ms_quant.attention.rotation import check_rotation, rotate, walsh_rotation
from ms_quant.errors import MsQuantError

RNG = np.random.default_rng(0)
DYNAMIC = [kind for kind in KINDS if kind != "INT8"]


def qkv(length, size=64, batch=1, heads=2, seed=0):
    return np.random.default_rng(seed).standard_normal((3, batch, heads, length, size), np.float32)


def relative(x, reference):
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def slow_blocks(x, rows, columns):
    """Codes and scales of one head, block by block, in float32 scalars."""
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros((-(-len(x) // rows), -(-x.shape[1] // columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = np.float32(np.abs(block).max()) / np.float32(448)
        if scales[i, j]:
            steps = np.clip(block / scales[i, j], -448, 448).astype(ml_dtypes.float8_e4m3fn)
            codes[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = steps.view(np.uint8)
    return codes, scales


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize(("length", "size", "rows"), [(1, 1, 128), (300, 192, 128), (257, 64, 256)])
def test_fa_block_quant_is_the_loop(length, size, rows, layout):
    x = RNG.standard_normal((2, 3, length, size)).astype(np.float32)
    x[1, 2] = 0
    codes, scales = fa_block_quant(x if layout == "BNSD" else x.swapaxes(1, 2), rows, layout=layout)
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float32)
    for b, h in np.ndindex(2, 3):
        expected, expected_scales = slow_blocks(x[b, h], rows, 128)
        np.testing.assert_array_equal(scales[b, h], expected_scales)
        np.testing.assert_array_equal(codes[b, h], expected)


def test_golden_block():
    """amax 7: scale 1/64. 0.1 = 6.4 steps -> 6.5; 0.0001 = .0064 -> .00586 (3 * 2**-9)."""
    x = np.array([7, -7, 0.1, 0.0001, 0, -0.1], np.float32).reshape(1, 1, 3, 2)
    codes, scales = fa_block_quant(x, 128)
    assert scales.ravel() == [1 / 64]
    assert codes.ravel().tolist() == [0x7E, 0xFE, 0x4D, 0x03, 0x00, 0xCD]


def test_a_block_of_zeros_has_scale_and_codes_0():
    x = np.zeros((1, 1, 256, 8), np.float32)
    x[0, 0, 200] = 1e-44  # its amax / 448 is 0 in float32: the values are lost
    codes, scales = fa_block_quant(x, 128)
    assert not codes.any()
    assert not scales.any()


def test_nan_and_infinity_are_refused():
    x = np.zeros((1, 1, 4, 4), np.float32)
    x[0, 0, 1, 1] = np.inf
    with pytest.raises(MsQuantError, match="x: 1 of 16 values are NaN or inf"):
        fa_block_quant(x, 128)
    zeros = np.zeros_like(x)
    for name, arrays in (("q", (x, zeros, zeros)), ("v", (zeros, zeros, x))):
        with pytest.raises(MsQuantError, match=f"^{name}: 1 of 16"):
            fa_quant(*arrays)


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("length", [1, 130, 300])
def test_values_are_near_and_attention_is_over_them(kind, length):
    q, k, v = qkv(length, size=32, batch=2)
    made = quantize_operands(q, k, v, kind=kind)
    # half a step at the largest number: int8 1/254, e4m3 16/448 (or 32/512 where MX saturates 480),
    # e2m1 1/4 of the largest (and 7.99 saturates to 6)
    bound = {"FP8_DYNAMIC": 1 / 28, "MXFP8_DYNAMIC": 1 / 8, "MXFP4_DYNAMIC": 1 / 4}
    limits = (*[bound.get(kind, 1 / 254)] * 2, bound.get(kind, 1 / 28))
    if kind == "INT8_DYNAMIC":
        limits = (1 / 254,) * 3
    for x, part, limit in zip((q, k, v), (made.q, made.k, made.v), limits, strict=True):
        largest = operands.block_absmax(x, part.block)
        largest = operands._spread(largest, part.block, x.shape)
        assert (np.abs(part.values() - x) <= largest * (limit + 1e-6)).all()
    out = fa_quant(q, k, v, kind=kind)
    decoded = [part.values() for part in (made.q, made.k, made.v)]
    np.testing.assert_allclose(out, attention(*decoded), rtol=0, atol=1e-6)


def test_blocks_and_types_of_each_kind():
    q, k, v = qkv(300, size=192)
    found = {}
    for kind in KINDS:
        scales = tuple(head_scales(x) for x in (q, k, v)) if kind == "INT8" else None
        made = quantize_operands(q, k, v, kind=kind, scales=scales)
        found[kind] = [
            (p.codes.dtype.name, p.scales.dtype.name, p.block, p.scales.shape[2:])
            for p in (made.q, made.k, made.v)
        ]
    fp8, mx_k, mx_v = ("uint8", "float32"), (1, 32), (32, 1)
    assert found["FP8_DYNAMIC"] == [
        (*fp8, (128, 128), (3, 2)),
        (*fp8, (256, 128), (2, 2)),
        (*fp8, (256, 128), (2, 2)),
    ]
    for kind in ("MXFP8_DYNAMIC", "MXFP4_DYNAMIC"):
        mx = ("uint8", "uint8")
        along = (*mx, mx_k, (300, 6))
        assert found[kind] == [along, along, (*mx, mx_v, (10, 192))]
    int8 = ("int8", "float32")
    assert found["INT8"] == [(*int8, (300, 192), (1, 1))] * 3
    assert found["INT8_DYNAMIC"] == [(*int8, (1, 192), (300, 1))] * 3
    assert found["MIX"] == [
        (*int8, (128, 192), (3, 1)),
        (*int8, (256, 192), (2, 1)),
        (*fp8, (300, 1), (1, 192)),
    ]


def test_mx_of_values_goes_along_tokens():
    """A token 64 times as large only shares its group of 32 tokens."""
    x = np.ones((1, 1, 64, 2), np.float32)
    x[0, 0, 40] = 64
    made = quantize_operands(x, x, x, kind="MXFP4_DYNAMIC")
    np.testing.assert_array_equal(made.v.scales[0, 0, :, 0], [127 - 2, 127 + 4])
    np.testing.assert_array_equal(made.v.values()[0, 0, :32], x[0, 0, :32])
    assert not made.v.values()[0, 0, 41].any()  # 1 / 16 of a step of 0.5 rounds to 0
    np.testing.assert_array_equal(made.k.values(), x)


def test_static_int8_takes_the_files_scales():
    q, k, v = qkv(20)
    scales = (np.array([0.02, 0.04]), np.array([[0.03], [0.03]]), np.array([0.05]))
    made = quantize_operands(q, k, v, kind="INT8", scales=scales)
    expected = np.clip(np.rint(q / np.float32([0.02, 0.04])[:, None, None]), -128, 127)
    np.testing.assert_array_equal(made.q.codes, expected)
    np.testing.assert_array_equal(made.v.scales.ravel(), np.float32([0.05, 0.05]))
    calibrated = head_scales(q)
    np.testing.assert_array_equal(calibrated[:, 0], np.abs(q).max(axis=(0, 2, 3)) / np.float32(127))


def test_the_vendors_padding_lets_zero_keys_take_part():
    q, k, v = qkv(300, size=32)
    plain, padded = (
        fa_quant(q, k, v, kind="MXFP4_DYNAMIC", vendor_padding=pad) for pad in (False, True)
    )
    made = quantize_operands(q, k, v, kind="MXFP4_DYNAMIC", vendor_padding=True)
    assert made.k.codes.shape[2] == 512
    assert padded.shape == q.shape
    decoded = [part.values() for part in (made.q, made.k, made.v)]
    slow = slow_attention(decoded[0][:, :, :5], *decoded[1:], everything)
    np.testing.assert_allclose(padded[:, :, :5], slow, rtol=0, atol=1e-6)
    assert relative(padded, attention(q, k, v)) > relative(plain, attention(q, k, v))
    kept = np.arange(300)[None] < 290
    masked = fa_quant(q, k, v, kind="MXFP4_DYNAMIC", vendor_padding=True, kept=kept)
    keeps = np.pad(kept, ((0, 0), (0, 212)), constant_values=True)
    np.testing.assert_allclose(masked, attention(*decoded, kept=keeps)[:, :, :300], atol=1e-6)
    whole = qkv(512, size=32)
    np.testing.assert_array_equal(
        fa_quant(*whole, kind="MXFP4_DYNAMIC", vendor_padding=True),
        fa_quant(*whole, kind="MXFP4_DYNAMIC"),
    )


@pytest.mark.parametrize("kind", DYNAMIC)
def test_layouts_batch_and_padding(kind):
    q, k, v = qkv(150, size=32, batch=2)
    kept = np.ones((2, 150), bool)
    kept[1, 140:] = False
    out = fa_quant(q, k, v, kind=kind, kept=kept)
    turned = fa_quant(*(x.swapaxes(1, 2) for x in (q, k, v)), kind=kind, layout="BSND", kept=kept)
    np.testing.assert_array_equal(turned.swapaxes(1, 2), out)
    alone = fa_quant(q[:1], k[:1], v[:1], kind=kind)
    np.testing.assert_allclose(out[:1], alone, rtol=0, atol=1e-6)
    assert np.abs(out[1] - fa_quant(q, k, v, kind=kind)[1]).max() > 1e-3


@pytest.mark.parametrize("size", [1, 16, 64, 128])
def test_a_rotation_keeps_float_scores(size):
    q, k, _ = qkv(100, size=size)
    rotation = walsh_rotation(size)
    np.testing.assert_allclose(np.abs(rotation), size**-0.5, rtol=1e-6)
    scores = q @ k.swapaxes(2, 3)
    rotated = rotate(q, rotation) @ rotate(k, rotation).swapaxes(2, 3)
    np.testing.assert_allclose(rotated / size**0.5, scores / size**0.5, rtol=0, atol=1e-5)
    check_rotation(rotation, size)
    check_rotation(rotation.astype(ml_dtypes.bfloat16), size)
    assert (walsh_rotation(size, 1) != walsh_rotation(size, 2)).any() or size == 1


def test_the_rotation_of_a_seed_stays_what_it_is():
    """Column 0 of Walsh's matrix is ones, so that of the rotation is the signs."""
    signs = np.sign(walsh_rotation(8)[:, 0]).astype(int).tolist()
    assert signs == [-1, 1, -1, 1, 1, 1, 1, 1]


def with_outlier(q, k, channel=3, factor=30):
    """K's channel times 30 and Q's divided by 30: scores as before."""
    q, k = q.copy(), k.copy()
    q[..., channel] /= factor
    k[..., channel] *= factor
    return q, k


def test_a_rotation_pays_for_int8_and_not_for_fp8():
    q, k, v = qkv(512, size=128, heads=1)
    reference, rotation = attention(q, k, v), walsh_rotation(128)
    spiky = with_outlier(q, k)
    offset = q, k + np.where(np.arange(128) < 2, np.float32(20), np.float32(0))
    shifted = attention(*offset, v)

    def errors(arrays, wanted, kind):
        return [relative(fa_quant(*arrays, v, r, r, kind), wanted) for r in (None, rotation)]

    plain, rotated = errors(spiky, reference, "MIX")
    assert rotated < plain / 3
    plain, rotated = errors(spiky, reference, "FP8_DYNAMIC")
    assert rotated > 2 * plain
    plain, rotated = errors(offset, shifted, "MXFP4_DYNAMIC")
    assert rotated < 0.8 * plain


def test_values_are_not_rotated():
    q, k, v = qkv(64, size=16)
    rotation = walsh_rotation(16)
    plain, rotated = quantize_operands(q, k, v), quantize_operands(q, k, v, rotation, rotation)
    np.testing.assert_array_equal(plain.v.codes, rotated.v.codes)
    assert (plain.k.codes != rotated.k.codes).any()


X = np.zeros((1, 2, 4, 8), np.float32)
EYE = np.eye(8)
REFUSED = [
    (lambda: fa_quant(X, X, X, kind="FP8"), "kind: 'FP8', expected one of FP8_DYNAMIC"),
    (lambda: fa_quant(X, X, X, layout="BSH"), "layout: 'BSH'"),
    (lambda: fa_quant(X[0], X, X), "q: shape .*expected four axes"),
    (lambda: walsh_rotation(12), "heads of size 12, expected a power of two"),
    (lambda: fa_quant(X, X, X, EYE, None), "k_rot: not given, expected both"),
    (lambda: fa_quant(X, X, X, 2 * EYE, EYE), "q_rot: q_rot @ q_rot.T is off the identity by 3"),
    (lambda: fa_quant(X, X, X, EYE, -EYE), "expected the same rotation of queries and keys"),
    (lambda: fa_quant(X, X, X, EYE[:4], EYE), r"q_rot: shape \(4, 8\), expected \(8, 8\)"),
    (lambda: fa_quant(X, X, X, kind="INT8"), "scales: not given for INT8"),
    (lambda: fa_quant(X, X, X, scales=(1, 1, 1)), "scales: given for FP8_DYNAMIC"),
    (lambda: fa_quant(X, X, X, kind="INT8", scales=([1, 2, 3], 1, 1)), "scales of q: 3 values"),
    (lambda: fa_quant(X, X, X, kind="INT8", scales=(1, 0, 1)), "scales of k: .*not positive"),
    (lambda: fa_quant(X, X, X, kind="INT8", scales=(1, 1)), "scales: 2, expected three"),
    (lambda: fa_quant(X, X, X, vendor_padding=True), "vendor_padding: with FP8_DYNAMIC"),
    (lambda: fa_quant(X, X, X, mx_rule="mxfp4_cann0"), "mx_rule: .*expected none"),
    (
        lambda: fa_quant(X, X, X, kind="MXFP8_DYNAMIC", mx_rule="mxfp4_cann0"),
        "mx_rule: .*expected mxfp8_cann0 or",
    ),
    (lambda: fa_block_quant(X, 0), r"block of \(0, 128\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(MsQuantError, match=message):
        call()
