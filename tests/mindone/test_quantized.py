"""Attention of mindone's networks is quantized and thinned out, where it is meant to be."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn
from networks import NETWORKS, TEXT, run

import ms_quant
from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.cells import QuantLinear
from ms_quant.cells.diffusion import (
    AttentionPlan,
    DiffusionAttention,
    attach_attention,
    attention_sites,
    attention_summary,
)
from ms_quant.cells.diffusion.plan import attention_plan
from ms_quant.errors import MsQuantError
from ms_quant.recipe.patterns import matches
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

SPARSE = {"sparse": "rf_v3", "sparsity": 0.5, "protect_first_frame": False, "block_shape": (32, 32)}
HEADS_FIRST = (0, 2, 1, 3)


@pytest.fixture(autouse=True)
def unset():
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


class Watched:
    """Calls a Cell and keeps what goes in and comes out, heads first."""

    def __init__(self, cell: DiffusionAttention):
        self.cell, self.seen = cell, []

    def __call__(self, q, k, v, *, layout, mask, scale, call):
        out = self.cell(q, k, v, layout=layout, mask=mask, scale=scale, call=call)
        turn = (lambda x: x) if layout == "BNSD" else (lambda x: x.transpose(HEADS_FIRST))
        arrays = [turn(x.asnumpy()) for x in (q, k, v, out)]
        self.seen.append((*arrays, None if mask is None else mask.asnumpy(), call))
        return out


def watched(known, plan: AttentionPlan) -> list:
    network, functions = known.build(), []

    def function(site):
        functions.append(Watched(DiffusionAttention(plan)))
        return functions[-1]

    attach_attention(network, function)
    run(network, known.inputs())
    return [seen for function in functions for seen in function.seen]


def kept_of(mask: np.ndarray | None, tokens: int) -> np.ndarray | None:
    return None if mask is None else np.broadcast_to(mask, (1, 1, 1, tokens))[:, 0, 0]


def test_fa_quant_in_the_network_is_the_definition(known):
    rotation, seen = walsh_rotation(64), watched(known, AttentionPlan("FP8_DYNAMIC"))
    assert len(seen) == len(
        [s for s in attention_sites(known.build()) if matches(s.path, known.own)]
    )
    for q, k, v, out, mask, _ in seen:
        kept = kept_of(mask, q.shape[2])
        expected = fa_quant(q, k, v, rotation, rotation, kept=kept)
        np.testing.assert_array_equal(out, expected)
        dense = attention(q, k, v, mask=mask)
        assert np.linalg.norm(out - dense) < 0.1 * np.linalg.norm(dense)


def test_sparse_attention_keeps_the_text_and_leaves_out_padding(known):
    """Against dense attention with the mask of the pairs that are kept, and with the padding."""
    seen = watched(known, attention_plan(SPARSE, "x"))
    video = int(np.prod(known.latent_shape))
    for q, k, v, out, mask, call in seen:
        tokens = q.shape[2]
        dense = attention(q, k, v, mask=mask)
        others = np.ones(tokens, bool)
        start = 0 if call.text in ("last", "none") else tokens - video
        others[start : start + video] = False
        assert others.sum() == tokens - video
        np.testing.assert_allclose(out[:, :, others], dense[:, :, others], atol=2e-5)
        assert np.abs(out - dense).max() > 1e-3  # pairs of the picture are left out
        louder = v.copy()
        louder[:, :, others if mask is None else others & mask[0, 0, 0]] += 10
        cell = DiffusionAttention(attention_plan(SPARSE, "x"))
        given = [Tensor(np.ascontiguousarray(x)) for x in (q, k, louder)]
        bias = None if mask is None else Tensor(mask)
        moved = cell(*given, mask=bias, call=call).asnumpy()
        if others.any():  # every query sees the text
            assert (np.abs(moved - out).max(axis=-1) > 1e-4).all()
        if mask is not None:
            hidden = ~mask[0, 0, 0]
            louder = v.copy()
            louder[:, :, hidden] += 1000
            again = cell(*given[:2], Tensor(louder), mask=bias, call=call).asnumpy()
            np.testing.assert_array_equal(again, out)


def test_linears_and_attention_in_one_call(known):
    network, inputs = known.build(), known.inputs()
    float_output = run(network, inputs)
    plan = {"*": {"kind": "FP8_DYNAMIC"}}
    assert ms_quant.quantize(network, "W8A8_DYNAMIC", attention=plan) is network
    linears = [c for _, c in network.cells_and_names() if isinstance(c, QuantLinear)]
    assert linears and not any(type(c) is nn.Dense for _, c in network.cells_and_names())
    found = run(network, inputs)
    off = np.linalg.norm(found - float_output) / np.linalg.norm(float_output)
    assert 1e-4 < off < 0.15
    for row in attention_summary(network):
        if matches(row.path, known.own):
            assert row.attention == "FP8_DYNAMIC" and row.calls == {"FP8_DYNAMIC": 1}
        else:
            assert row.attention == "FLOAT" and row.reason in ("cross", "text alone")


def test_patterns_choose_and_the_last_counts():
    network = NETWORKS["Wan"].build()
    wishes = {"*Attention": "FP8_DYNAMIC", "blocks.{1..9}.*": None}
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention=wishes)
    found = {row.path: (row.attention, row.reason) for row in attention_summary(network)}
    assert found == {
        "blocks.0.attn1": ("FP8_DYNAMIC", ""),
        "blocks.0.attn2": ("FLOAT", "cross"),
        "blocks.1.attn1": ("FLOAT", "not chosen"),
        "blocks.1.attn2": ("FLOAT", "cross"),
    }


def test_nothing_is_replaced_after_a_refusal():
    network = NETWORKS["Wan"].build()
    with pytest.raises(MsQuantError, match=r"pattern 'blocks\.\*\.attn3' matches no attention"):
        ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"blocks.*.attn3": "FP8_DYNAMIC"})
    assert not any(isinstance(c, QuantLinear) for _, c in network.cells_and_names())
    assert all(row.attention == "FLOAT" for row in attention_summary(network))


def test_one_policy_drives_linears_and_attention():
    known = NETWORKS["Wan"]
    network, inputs = known.build(), known.inputs()
    policy = TimestepPolicyConfig()
    policy.register(range(1, 3), "static", "w8a8_static_linear")
    policy.register(range(1), "FLOAT", "fa")

    TimestepManager.set_timestep_idx_max(3)

    def steps():
        for step in range(3):
            with TimestepManager.at(step):
                yield inputs

    ms_quant.quantize(
        network,
        "W8A8_TIMESTEP",
        calibration=steps(),
        include=["blocks.*"],
        timestep_policy=policy,
        attention={"*": "FP8_DYNAMIC"},
    )
    for step in range(3):
        with TimestepManager.at(step):
            run(network, inputs)
    rows = [row for row in attention_summary(network) if row.tokens == "none"]
    assert [row.calls for row in rows] == [{"FLOAT (dense step)": 1, "FP8_DYNAMIC": 2}] * 2
    with pytest.raises(MsQuantError, match=r"timestep_idx: 3, expected 0\.\.2"):
        TimestepManager.set_timestep_idx(3)


def test_nan_names_the_layer_and_the_step():
    known = NETWORKS["CogVideoX"]
    network, inputs = known.build(), known.inputs()
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*": "FP8_DYNAMIC"})
    network.transformer_blocks[1].attn1.norm_k.weight.set_data(Tensor(np.full(64, np.nan, "f4")))
    with (
        TimestepManager.at(2),
        pytest.raises(MsQuantError, match=r"^transformer_blocks\.1\.attn1, step 2: k: .* are NaN"),
    ):
        run(network, inputs)


def test_text_has_the_length_that_it_has():
    """Nothing is told of the text: longer prompts are longer text."""
    known = NETWORKS["CogVideoX"]
    network, inputs = known.build(), known.inputs()
    attach_attention(network, lambda site: DiffusionAttention(attention_plan(SPARSE, "x")))
    run(network, inputs)
    longer = np.random.default_rng(5).standard_normal((1, TEXT + 7, 32)).astype("f4")
    inputs["encoder_hidden_states"] = Tensor(longer)
    run(network, inputs)
    assert [row.calls for row in attention_summary(network)] == [{"rf_v3": 2}] * 2
