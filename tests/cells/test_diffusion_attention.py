"""Quantized and sparse attention as a Cell: alone, by step, and where it refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor

from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import KINDS, fa_quant
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.sparse import attend
from ms_quant.cells.diffusion import AttentionCall, AttentionPlan, DiffusionAttention
from ms_quant.cells.diffusion.plan import attention_plan
from ms_quant.errors import MsQuantError
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

SHAPE = LATENT = (4, 8, 8)
TEXT = 20
TOKENS = int(np.prod(SHAPE))


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


def qkv(tokens: int = TOKENS + TEXT, batch: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, 2, tokens, 32)).astype("f4") for _ in range(3)]


def tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [Tensor(x) for x in arrays]


def sparse(**options) -> DiffusionAttention:
    given = {"sparse": "rf_v2", "sparsity": 0.8, **options}
    return DiffusionAttention(attention_plan(given, "x"))


AT = AttentionCall("blocks.3.attn", "first", LATENT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "INT8"])
def test_alone_it_is_the_definition(kind):
    arrays, rotation = qkv(), walsh_rotation(32)
    cell = DiffusionAttention(AttentionPlan(kind))
    found = cell(*tensors(arrays))
    np.testing.assert_array_equal(found.asnumpy(), fa_quant(*arrays, rotation, rotation, kind))
    assert dict(cell.calls) == {kind: 1}
    turned = cell(*(Tensor(x.swapaxes(1, 2).copy()) for x in arrays), layout="BSND")
    np.testing.assert_array_equal(turned.asnumpy().swapaxes(1, 2), found.asnumpy())


def test_types_are_those_of_the_queries():
    half = [x.astype(ms.float16) for x in tensors(qkv())]
    assert DiffusionAttention(AttentionPlan("FP8_DYNAMIC"))(*half).dtype == ms.float16


def masks(kept: np.ndarray) -> list[Tensor]:
    """One padding in the ways that networks give it."""
    added = np.where(kept, 0, -10000).astype("f4")[:, None, None]
    pairs = np.broadcast_to(kept[:, None, None], (len(kept), 1, kept.shape[1], kept.shape[1]))
    return [Tensor(kept[:, None, None]), Tensor(added), Tensor(pairs.copy())]


@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("plan", ["FP8_DYNAMIC", {"sparse": "rf_v3", "sparsity": 0.5}])
def test_padding_takes_no_part(form, plan):
    arrays = qkv(batch=2)
    kept = np.ones((2, TOKENS + TEXT), bool)
    kept[0, 12:TEXT] = kept[1, 3:TEXT] = False
    cell = DiffusionAttention(attention_plan(plan, "x"))
    found = cell(*tensors(arrays), mask=masks(kept)[form], call=AT).asnumpy()
    if "sparse" in plan:  # rows of the text are dense
        found, dense = found[:, :, :TEXT], attention(*arrays, kept=kept)[:, :, :TEXT]
        np.testing.assert_allclose(found, dense, atol=1e-5)
        return
    rotation = walsh_rotation(32)
    expected = fa_quant(*arrays, rotation, rotation, kept=kept)
    np.testing.assert_array_equal(found, expected)
    dense = attention(*arrays, kept=kept)
    assert np.linalg.norm(found - dense) < 0.1 * np.linalg.norm(dense)
    assert np.linalg.norm(found - attention(*arrays)) > 0.1 * np.linalg.norm(dense)


def test_a_mask_of_pairs_is_dense():
    arrays, cell = qkv(40), DiffusionAttention(AttentionPlan("FP8_DYNAMIC"))
    pairs = np.tril(np.ones((1, 1, 40, 40), bool))
    found = cell(*tensors(arrays), mask=Tensor(pairs)).asnumpy()
    np.testing.assert_array_equal(found, attention(*arrays, mask=pairs))
    assert dict(cell.calls) == {"FLOAT (mask of pairs)": 1}


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_keeps_and_is_kept_on_either_side(side):
    arrays, cell = qkv(), sparse(sparsity=1.0)
    call = AttentionCall("a", side, LATENT)
    found = cell(*tensors(arrays), call=call).asnumpy()
    dense = attention(*arrays)
    text = slice(None, TEXT) if side == "first" else slice(TOKENS, None)
    np.testing.assert_allclose(found[:, :, text], dense[:, :, text], atol=1e-5)
    assert np.abs(found - dense).max() > 0.1
    arrays[2][:, :, text] += 5  # every query sees it
    moved = cell(*tensors(arrays), call=call).asnumpy()
    assert (np.abs(moved - found).max(axis=-1) > 1e-3).all()


def test_steps_choose_and_masks_are_kept():
    arrays, cell = tensors(qkv()), sparse(start_step=2, end_step=5, mask_refresh_interval=2)
    made = []
    for step in range(6):
        with TimestepManager.at(step):
            cell(*arrays, call=AT)
        made.append(cell.masks.cache._mask)
    assert dict(cell.calls) == {"FLOAT (dense step)": 3, "rf_v2": 3}
    assert made[0] is made[1] is made[5] is None
    assert made[2] is made[3] and made[4] is not made[3]
    with pytest.raises(MsQuantError, match=r"^blocks\.3\.attn: no timestep is set and some are"):
        cell(*arrays, call=AT)


def test_pictures_of_several_sizes_are_clips_of_their_own():
    """As MindIE-SD's video_spans has them; the text fills the blocks between."""
    shapes, text = ((1, 16, 16), (1, 12, 12)), 130
    tokens = text + 256 + 144
    given = qkv(tokens)
    spans = [
        {"start": text, "latent_shape": (1, 16, 16)},
        {"start": 386, "latent_shape": (1, 12, 12)},
    ]
    rule = SparseRule("rf_v3", 0.5, protect_first_frame=False)
    mask = make_mask(rule, given[0], given[1], TokenGrid.of_spans(spans, tokens))
    call = AttentionCall("blocks.3.attn", "first", shapes)
    options = {"sparse": "rf_v3", "sparsity": 0.5, "protect_first_frame": False}
    found = sparse(**options)(*tensors(given), call=call).asnumpy()
    np.testing.assert_array_equal(found, attend(*given, mask))
    stated = {**options, "latent_shape": [[1, 16, 16], [1, 12, 12]], "text": "first"}
    again = sparse(**stated)(*tensors(given)).asnumpy()
    np.testing.assert_array_equal(again, found)
    with pytest.raises(MsQuantError, match="RainFusion 1: 2 clips, expected one"):
        sparse(sparse="rf_v1")(*tensors(given), call=call)


def test_float_steps_are_the_networks_own():
    """Of quantized and of sparse attention alike; a mask is not kept across them."""
    plan = attention_plan({"kind": "MIX", "sparse": "rf_v2", "float_steps": range(1, 3)}, "x")
    cell, given = DiffusionAttention(plan), tensors(qkv())
    for step in range(4):
        with TimestepManager.at(step):
            cell(*given, call=AT)
    assert dict(cell.calls) == {"MIX + rf_v2": 2, "FLOAT (dense step)": 2}
    with pytest.raises(MsQuantError, match=r"no timestep is set and some are float, expected"):
        cell(*given, call=AT)


def test_the_density_of_each_head_is_told():
    cell = sparse(sparse="rf_v1", sparsity=0.5, mode="arm2")
    assert cell.last_mask.densities == ()
    cell(*tensors(qkv()), call=AT)
    assert len(cell.last_mask.densities) == len(cell.last_mask.kinds) == 2
    assert set(cell.last_mask.kinds) <= {"temporal", "spatial"}
    assert all(0.4 < density < 0.9 for density in cell.last_mask.densities)


def test_the_index_is_of_the_step_and_not_of_the_layer():
    """A shipped adaptation gave the number of the block: then as many blocks stayed dense."""
    arrays, layers = tensors(qkv()), [sparse(start_step=2) for _ in range(4)]
    for step in range(3):
        with TimestepManager.at(step):
            for number, cell in enumerate(layers):
                cell(*arrays, call=AttentionCall(f"blocks.{number}.attn", "first", LATENT))
    assert [dict(cell.calls) for cell in layers] == [{"FLOAT (dense step)": 2, "rf_v2": 1}] * 4


def test_a_policy_says_how_a_step_is_quantized():
    policy = TimestepPolicyConfig()
    policy.register([0], "FLOAT", "fa")
    policy.register([1], "MXFP4", "fa")
    cell = DiffusionAttention(AttentionPlan("FP8_DYNAMIC"), policy)
    for step in range(4):
        with TimestepManager.at(step):
            cell(*tensors(qkv(40)))
    assert dict(cell.calls) == {"FLOAT (dense step)": 1, "MXFP4_DYNAMIC": 1, "FP8_DYNAMIC": 2}
    with pytest.raises(MsQuantError, match="no timestep is set"):
        cell(*tensors(qkv(40)))


def test_threads_have_masks_of_their_own():
    arrays, cell, seen = tensors(qkv()), sparse(), {}

    def sample(step: int) -> None:
        with TimestepManager.at(step):
            cell(*arrays, call=AT)
        seen[step] = cell.masks.cache._mask

    for step in (5, 2):
        thread = threading.Thread(target=sample, args=(step,))
        thread.start()
        thread.join()
    assert seen[5] is not seen[2] and cell.masks.cache._mask is None


def test_a_deep_copy_starts_anew():
    cell = sparse()
    with TimestepManager.at(0):
        found = cell(*tensors(qkv()), call=AT).asnumpy()
        twin = copy.deepcopy(cell)
        assert twin.masks.cache._mask is None
        np.testing.assert_array_equal(twin(*tensors(qkv()), call=AT).asnumpy(), found)


def test_dense_steps_are_the_networks_own():
    cell = sparse(start_step=1)
    call = AttentionCall("a", "first", LATENT, lambda q, k, v: q + v)
    arrays = qkv()
    with TimestepManager.at(0):
        found = cell(*tensors(arrays), call=call)
    np.testing.assert_array_equal(found.asnumpy(), arrays[0] + arrays[2])


def nan(arrays):
    arrays[1][0, 0, 3, 2] = np.nan


def large(arrays):
    arrays[0] *= np.float32(1e30)
    arrays[1] *= np.float32(1e30)


@pytest.mark.parametrize(("change", "said"), [(nan, "k: 1 of "), (large, "scores: .*overflows")])
def test_nan_and_overflow_name_the_layer_and_the_step(change, said):
    arrays, cell = qkv(), DiffusionAttention(AttentionPlan("FP8_DYNAMIC"))
    change(arrays)
    with (
        TimestepManager.at(3),
        pytest.raises(MsQuantError, match=rf"^blocks\.3\.attn, step 3: {said}"),
    ):
        cell(*tensors(arrays), call=AT)


@pytest.mark.parametrize(
    ("cell", "call", "said"),
    [
        (sparse, AttentionCall("a", "first"), "a: sparse attention does not know which tokens"),
        (sparse, AttentionCall("a", "", LATENT), "276 tokens for a latent shape of 4 x 8 x 8, wh"),
        (
            sparse,
            AttentionCall("a", "first", (9, 8, 8)),
            "shape of 9 x 8 x 8, expected 576 or more",
        ),
    ],
)
def test_tokens_that_are_no_grid_are_refused(cell, call, said):
    with pytest.raises(MsQuantError, match=said):
        cell()(*tensors(qkv()), call=call)


def test_the_plan_says_what_the_network_does_not():
    cell = sparse(latent_shape=LATENT, text="first")
    found = cell(*tensors(qkv())).asnumpy()
    np.testing.assert_array_equal(found, sparse()(*tensors(qkv()), call=AT).asnumpy())


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("FP9", "kind: 'FP9', expected one of rf_v1"),
        ({"sparsity": 0.5}, "sparsity without sparse, expected a rule"),
        ({"sparse": "rf_v2", "sparity": 0.5}, "'sparity' is unknown, expected"),
        ({"kind": "FP8_DYNAMIC", "start_step": 3}, "a window of steps without a sparse rule"),
        ("FLOAT", "FLOAT and not sparse"),
        ({"sparse": "rf_v2", "text": "left"}, "text 'left', expected none, first, last"),
        (3, "3, expected a kind, a sparse rule"),
    ],
)
def test_refused_plans(wish, said):
    with pytest.raises(MsQuantError, match=said):
        attention_plan(wish, "attention '*'")


def test_heads_of_no_power_of_two_cannot_be_rotated():
    arrays = [x[..., :24].copy() for x in qkv(40)]
    with pytest.raises(MsQuantError, match="heads of size 24, expected a power of two"):
        DiffusionAttention(AttentionPlan("FP8_DYNAMIC"))(*tensors(arrays))
    plain = DiffusionAttention(AttentionPlan("FP8_DYNAMIC", rotates=False))
    expected = fa_quant(*arrays)
    np.testing.assert_array_equal(plain(*tensors(arrays)).asnumpy(), expected)


def test_bad_operands_are_refused():
    cell, (q, k, v) = DiffusionAttention(AttentionPlan("FP8_DYNAMIC")), tensors(qkv(40))
    with pytest.raises(MsQuantError, match=r"k: shape \(40, 32\), expected four axes in BNSD"):
        cell(q, k[0, 0], v)
    with pytest.raises(MsQuantError, match="layout: 'SBH', expected"):
        cell(q, k, v, layout="SBH")
    with pytest.raises(MsQuantError, match=r"v: \(batch, heads, length, size\)"):
        cell(q, k, v[:, :1])


def test_static_scales_are_needed():
    with pytest.raises(MsQuantError, match="INT8 has static scales"):
        DiffusionAttention(AttentionPlan("INT8"))
