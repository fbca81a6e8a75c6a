"""Attention by MindIE-SD's names: what each argument does, on arrays and on Tensors."""

from __future__ import annotations

import numpy as np
import pytest

import ms_quant
from ms_quant.attention import dense
from ms_quant.errors import BadArgumentError

SHAPE = (2, 8, 8)
RNG = np.random.default_rng(5)
Q, K, V = RNG.standard_normal((3, 2, 2, 128, 16), np.float32)
LATENT = {"latent_shape_q": SHAPE, "latent_shape_k": SHAPE}


def oracle(pairs: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """softmax over some pairs, in float64."""
    scores = np.einsum("bhqd,bhkd->bhqk", Q, K, dtype=np.float64) / 4
    keep = np.broadcast_to(pairs, scores.shape)
    keep = keep if kept is None else keep & kept[:, None, None]
    p = np.where(keep, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return (p / p.sum(-1, keepdims=True)) @ V


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("sparse_type", ["rf_v2", "rf_v3", "ada_bsa", "rf_v1"])
def test_all_of_the_pairs_at_no_sparsity(sparse_type, layout):
    given = [x if layout == "BNSD" else x.swapaxes(1, 2) for x in (Q, K, V)]
    found = ms_quant.sparse_attention(
        *given, sparse_type=sparse_type, input_layout=layout, sparsity=0.0, head_num=2, **LATENT
    )
    found = found if layout == "BNSD" else found.swapaxes(1, 2)
    np.testing.assert_allclose(found, oracle(np.ones(1, bool)), atol=2e-6)


def test_what_block_mask_says_is_what_counts():
    options = {"sparsity": 0.6, "sparse_type": "rf_v3", "block_size": 32, "txt_len": 0}
    blocks = ms_quant.block_mask(Q, K, SHAPE, **options)
    assert blocks.shape == (2, 2, 4, 4) and blocks.dtype == bool and not blocks.all()
    # A frame of 8 x 8 is one window, so the order of windows is that of the tokens.
    pairs = blocks.repeat(32, 2).repeat(32, 3)
    found = ms_quant.sparse_attention(Q, K, V, **options, **LATENT)
    np.testing.assert_allclose(found, oracle(pairs), atol=2e-6)


def test_bands_are_pairs_of_tokens():
    pairs = ms_quant.block_mask(Q, K, SHAPE, sparse_type="rf_v1", sparsity=0.5)
    assert pairs.shape == (1, 2, 128, 128)
    found = ms_quant.sparse_attention(Q, K, V, sparse_type="rf_v1", sparsity=0.5, **LATENT)
    np.testing.assert_allclose(found, oracle(pairs), atol=2e-6)


def test_padding_and_causal_masks():
    kept = np.ones((2, 128), bool)
    kept[1, 100:] = False
    for mask in (kept, kept[:, None, None]):
        found = ms_quant.sparse_attention(Q, K, V, mask, sparse_type="ada_bsa")
        np.testing.assert_allclose(found, oracle(np.ones(1, bool), kept), atol=2e-6)
        found = ms_quant.sparse_attention(Q, K, V, mask)
        np.testing.assert_allclose(found, oracle(np.ones(1, bool), kept), atol=2e-6)
    found = ms_quant.sparse_attention(Q, K, V, is_causal=True)
    np.testing.assert_allclose(found, oracle(np.tri(128, dtype=bool)), atol=2e-6)


def test_precisions_quantize_and_come_near():
    exact = ms_quant.sparse_attention(Q, K, V)
    errors = {}
    for precision in ("fp8", "mix", "mxfp4"):
        for options in ({}, {"sparse_type": "rf_v3", **LATENT}):
            found = ms_quant.sparse_attention(Q, K, V, precision=precision, **options)
            errors[precision] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            assert 1e-4 < errors[precision] < 0.4, (precision, errors)
    assert errors["mix"] < errors["mxfp4"] and errors["fp8"] < errors["mxfp4"]


def test_several_clips_and_text():
    spans = [{"start": 0, "latent_shape": [1, 8, 8]}, {"start": 64, "latent_shape": [1, 4, 8]}]
    found = ms_quant.sparse_attention(
        Q, K, V, sparse_type="rf_v3", video_spans=spans, block_size=64
    )
    np.testing.assert_allclose(found, dense.attention(Q, K, V), atol=2e-6)  # each its first frame
    q = {"latent_shape_q": (2, 7, 8), "latent_shape_k": (2, 7, 8)}
    found = ms_quant.sparse_attention(Q, K, V, sparse_type="rf_v3", txt_len=16, **q)
    np.testing.assert_allclose(found, dense.attention(Q, K, V), atol=2e-6)


def test_quantized_attention_and_its_codes():
    exact = dense.attention(Q, K, V)
    for kind in ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "INT8_DYNAMIC", "MIX"):
        found = ms_quant.fa_quant(Q, K, V, kind=kind)
        assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1, kind
    codes, scales = ms_quant.fa_block_quant(Q, 128)
    assert codes.shape == Q.shape and codes.dtype == np.uint8
    np.testing.assert_array_equal(scales[..., 0, 0], np.abs(Q).max((2, 3)) / np.float32(448))


def test_arm_tells_heads_apart():
    codes = np.linalg.qr(RNG.standard_normal((64, 64)))[0].astype(np.float32) * 24
    frame, place = np.divmod(np.arange(512), 64)
    q = np.stack([codes[frame], codes[place]])[None]
    found = ms_quant.arm(q, q, (8, 8, 8))
    assert found.classes == ("spatial", "temporal") and found.recall.shape == (2, 3)
    with_text = np.pad(q, ((0, 0), (0, 0), (9, 0), (0, 0)))
    assert ms_quant.arm(with_text, with_text, (8, 8, 8), txt_len=9).classes == found.classes


def test_tensors_come_back_as_tensors():
    ms = pytest.importorskip("mindspore")
    q, k, v = (ms.Tensor(x) for x in (Q, K, V))
    options = {"sparse_type": "rf_v3", "sparsity": 0.6, "block_size": 32, **LATENT}
    found = ms_quant.sparse_attention(q, k, v, **options)
    assert isinstance(found, ms.Tensor) and found.dtype == ms.float32
    np.testing.assert_array_equal(found.asnumpy(), ms_quant.sparse_attention(Q, K, V, **options))
    mask = ms.Tensor(np.ones((2, 128), bool))
    halves = [x.astype(ms.bfloat16) for x in (q, k, v)]
    found = ms_quant.sparse_attention(*halves, mask)
    assert found.dtype == ms.bfloat16
    assert ms_quant.fa_quant(*halves).dtype == ms.bfloat16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparse_type": "rf_v4"}, "sparse_type: 'rf_v4', expected one of rf_v1"),
        ({"precision": "fp4"}, "precision: 'fp4', expected one of bf16, fp8, mix, mxfp4"),
        ({"inner_precise": 7}, "inner_precise: 7, expected 0 to 4"),
        ({"head_num": 3}, "head_num: 3, expected 2 as q has"),
        ({"input_layout": "SBH"}, "layout: 'SBH', expected one of BNSD, BSND"),
        ({"sparse_type": "rf_v3"}, "latent_shape_q, latent_shape_k: None and None, expected"),
        (
            {"sparse_type": "rf_v3", "latent_shape_q": SHAPE, "latent_shape_k": (2, 8, 4)},
            "expected frames, height and width, equal for both",
        ),
        ({"sparse_type": "rf_v3", **LATENT, "txt_len": 3}, "and 3 of text, expected 128 together"),
        ({"sparse_type": "rf_v3", **LATENT, "is_causal": True}, "is_causal: True with rf_v3"),
        ({"sparse_type": "rf_v1", "video_spans": []}, "video_spans: with rf_v1, expected rf_v2"),
        ({"sparse_type": "rf_v3", **LATENT, "sparsity": 1.5}, "sparsity"),
        (
            {"sparse_type": "rf_v3", **LATENT, "attn_mask": np.ones((2, 1, 128, 128), bool)},
            "attn_mask: bool of shape (2, 1, 128, 128), expected bool (2, 128)",
        ),
        (
            {"sparse_type": "rf_v3", **LATENT, "attn_mask": np.ones((2, 128), np.float32)},
            "attn_mask: float32 of shape (2, 128)",
        ),
    ],
)
def test_what_is_wrong_is_said(options, reason):
    with pytest.raises(BadArgumentError) as found:
        ms_quant.sparse_attention(Q, K, V, **options)
    assert reason in str(found.value)
