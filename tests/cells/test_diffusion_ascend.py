"""The Ascend path of attention with doubles in place of the operators; no device is needed.

The doubles check what is documented of each operator's arguments and compute what it documents.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor
from mindspore.ops import auto_generate

from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.attention.operands import fa_block_quant
from ms_quant.cells.diffusion import AttentionPlan, DiffusionAttention
from ms_quant.cells.diffusion.ascend import QUANTIZED, WHOLE, Operators
from ms_quant.cells.diffusion.plan import attention_plan
from ms_quant.errors import MsQuantError
from ms_quant.numerics.minifloat import E4M3, decode
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

BATCH, HEADS, TOKENS, SIZE = 2, 2, 300, 64


def wide(x: Tensor) -> np.ndarray:
    return x.astype(ms.float32).asnumpy()


def bound(kind: type, arguments: tuple, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the installed MindSpore's operator has for them."""
    found = signature(kind.__call__).bind(None, *arguments, **named).arguments
    return {name: value for name, value in found.items() if name != "self"}


class Doubles:
    """In place of ``ascend.Operators``; arguments are bound as MindSpore's operators bind them."""

    def __init__(self):
        self.calls = []

    def block_quant(self, *arguments, **named):
        """DynamicBlockQuant takes two or three axes, float16 or bfloat16."""
        given = bound(auto_generate.DynamicBlockQuant, arguments, named)
        x, rows, columns = (given.pop(n) for n in ("x", "row_block_size", "col_block_size"))
        assert x.ndim == 3 and x.dtype in (ms.float16, ms.bfloat16)
        self.calls.append((rows, columns, given))
        codes, scales = fa_block_quant(wide(x)[:, None], rows, columns)
        return Tensor(codes[:, 0].copy()), Tensor(scales[:, 0].copy())

    def attention(self, heads, scale):
        def run(*arguments, **named):
            given = bound(auto_generate.FusedInferAttentionScore, arguments, named)
            query, key, value = (given.pop(name) for name in ("query", "key", "value"))
            attn_mask = given.pop("attn_mask", None)
            assert isinstance(key, list) and isinstance(value, list)
            assert set(given.values()) <= {None} and query.shape[1] == heads
            left_out = None if attn_mask is None else attn_mask.asnumpy()
            assert left_out is None or left_out.shape == (BATCH, 1, TOKENS, TOKENS)
            mask = None if left_out is None else ~left_out
            out = attention(*map(wide, (query, key[0], value[0])), scale=scale, mask=mask)
            return Tensor(out).astype(query.dtype), None

        return run

    def quantized(self, *operands, **arguments):
        """FusedInferAttentionScore of version 2 on blocks, BNSD."""
        assert len(operands) == 3
        batch, heads, length, size = operands[0].shape
        keys = operands[1].shape[2]
        assert arguments.pop("input_layout") == "BNSD"
        assert arguments.pop("num_query_heads") == heads
        assert arguments.pop("pre_tokens") == arguments.pop("next_tokens") == WHOLE
        values = []
        for name, x, rows in zip(("query", "key", "value"), operands, (128, 256, 256), strict=True):
            assert arguments.pop(f"{name}_quant_mode") == 7
            scales = arguments.pop(f"dequant_scale_{name}")
            tokens = length if name == "query" else keys
            assert scales.dtype == ms.float32
            assert scales.shape == (batch, heads, -(-tokens // rows), -(-size // 128))
            spread = np.repeat(scales.asnumpy(), rows, axis=2)[:, :, :tokens]
            values.append(decode(x.asnumpy(), E4M3) * spread)
        scale, dtype = arguments.pop("softmax_scale"), arguments.pop("out_dtype")
        assert not arguments
        return Tensor(attention(*values, scale=scale)).astype(dtype), None


def qkv(layout: str, dtype=ms.float16, batch: int = BATCH) -> list[Tensor]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, HEADS, TOKENS, SIZE)).astype("f4") for _ in range(3)]
    turned = arrays if layout == "BNSD" else [x.swapaxes(1, 2).copy() for x in arrays]
    return [Tensor(x).astype(dtype) for x in turned]


def on_ascend(plan: AttentionPlan = AttentionPlan("FP8_DYNAMIC")) -> DiffusionAttention:  # noqa: B008
    cell = DiffusionAttention(plan, device_target="Ascend")
    cell.operators = Doubles()
    return cell


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
def test_fp8_is_what_the_definition_says(layout):
    cell = on_ascend(AttentionPlan("FP8_DYNAMIC", rotates=False))
    given = qkv(layout)
    found = cell(*given, layout=layout)
    assert found.dtype == ms.float16 and found.shape == given[0].shape
    expected = fa_quant(*map(wide, given), layout=layout)
    np.testing.assert_allclose(wide(found), expected, atol=1e-3)
    options = {"min_scale": 0.0, "round_mode": "rint", "dst_type": ms.float8_e4m3fn}
    assert cell.operators.calls == [(n, 128, options) for n in (128, 256, 256)]


def test_queries_and_keys_are_rotated_and_values_are_not():
    cell, given = on_ascend(), qkv("BNSD")
    found = wide(cell(*given))
    dense = attention(*map(wide, given))
    assert np.linalg.norm(found - dense) < 0.1 * np.linalg.norm(dense)
    assert "q_rot" in cell.parameters_dict()


def test_padding_is_taken_out_of_one_clip_and_refused_in_a_batch():
    given, cell = qkv("BNSD", batch=1), on_ascend()
    kept = np.ones((1, 1, 1, TOKENS), bool)
    kept[..., 200:] = False
    found, dense = wide(cell(*given, mask=Tensor(kept))), attention(*map(wide, given), mask=kept)
    assert np.linalg.norm(found - dense) < 0.1 * np.linalg.norm(dense)
    with pytest.raises(MsQuantError, match="padding in a batch of several, expected one clip"):
        cell(*qkv("BNSD"), mask=Tensor(kept))


def test_float_attention_is_the_operators_own():
    given, cell = qkv("BNSD"), on_ascend()
    pairs = np.tril(np.ones((BATCH, 1, TOKENS, TOKENS), bool))
    found = wide(cell(*given, mask=Tensor(pairs)))
    np.testing.assert_allclose(found, attention(*map(wide, given), mask=pairs), atol=1e-3)


@pytest.mark.parametrize("plan", ["MXFP8_DYNAMIC", "rf_v2"])
def test_what_has_no_operator_is_refused_at_once(plan):
    with pytest.raises(MsQuantError, match="has no Ascend operators here, expected FP8_DYNAMIC"):
        DiffusionAttention(attention_plan(plan, "x"), device_target="Ascend")


def test_a_policy_asks_for_no_other_operators_in_silence():
    policy = TimestepPolicyConfig(fa_default_strategy="MXFP4")
    cell = DiffusionAttention(AttentionPlan("FP8_DYNAMIC"), policy, device_target="Ascend")
    with (
        TimestepManager.at(0),
        pytest.raises(MsQuantError, match="step 0: attention: MXFP4_DYNAMIC has no Ascend"),
    ):
        cell(*qkv("BNSD"))


def test_the_real_operators_can_be_made_here_and_fp8_is_missed():
    """Their arguments are MindSpore's; none has a CPU kernel."""
    operators = Operators()
    made = operators.attention(2, 0.125)
    assert type(made) is auto_generate.FusedInferAttentionScore
    assert type(operators.block_quant) is auto_generate.DynamicBlockQuant
    wanted = {"num_heads": 2, "num_key_value_heads": 2, "scale_value": 0.125}
    assert {name: getattr(made, name) for name in wanted} == wanted
    if operators.quantized_kind is None:  # all of MindSpore 2.10 and before
        with pytest.raises(MsQuantError, match=f"has no {QUANTIZED}, which attention on FP8 needs"):
            operators.quantized()
