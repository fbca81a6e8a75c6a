"""Attention that calls its own ``fa_quant``, as MindIE-SD's models do: taken over and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, nn

import ms_quant
from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.attention.operands import head_scales
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.cells import QuantLinear
from ms_quant.cells.diffusion import (
    attach_attention,
    attention_sites,
    attention_summary,
    detach_attention,
)
from ms_quant.cells.diffusion.calibrate import Ranges
from ms_quant.cells.diffusion.function import AttentionCall
from ms_quant.cells.diffusion.plan import AttentionPlan
from ms_quant.errors import MsQuantError
from ms_quant.formats.mindie_sd.attention_types import (
    ATTENTION_TYPES,
    check_attention_type,
    is_attention_type,
)
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

HEADS, SIZE, TOKENS = 2, 16, 40


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx(None)


class OwnAttention(nn.Cell):
    """Calls ``self.fa_quant`` where something is there."""

    fa_quant = None

    def __init__(self):
        super().__init__()
        self.heads, self.head_dim = HEADS, SIZE
        self.qkv = nn.Dense(HEADS * SIZE, 3 * HEADS * SIZE)
        self.seen: list = []

    def construct(self, x, context=None):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, SIZE).unbind(2)
        k, v = (k, v) if context is None else (k[:, :context], v[:, :context])
        self.seen = [q, k, v]
        if self.fa_quant is None:
            return v.reshape(batch, -1, HEADS * SIZE)
        return self.fa_quant(q, k, v, layout="BSND").reshape(batch, tokens, HEADS * SIZE)


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.attn = OwnAttention()
        self.ff = nn.Dense(HEADS * SIZE, HEADS * SIZE)

    def construct(self, x):
        return self.ff(self.attn(x))


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Block(), Block()])

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def x() -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal((1, TOKENS, HEADS * SIZE)).astype("f4"))


def test_sites():
    found = attention_sites(Net())
    assert [(s.path, s.kind, s.family, s.tokens) for s in found] == [
        (f"blocks.{n}.attn", "OwnAttention", "fa_quant", "") for n in range(2)
    ]
    assert {(s.heads, s.head_size) for s in found} == {(HEADS, SIZE)}


def test_taken_over_and_given_back():
    network = Net()
    before, names = network(x()).asnumpy(), list(network.parameters_dict())
    ms_quant.quantize(network, lambda path, cell: None, attention={"*Attention": "FP8_DYNAMIC"})
    network(x())
    layer, rotation = network.blocks[1].attn, walsh_rotation(SIZE)
    given = [t.asnumpy() for t in layer.seen]
    expected = fa_quant(*given, rotation, rotation, layout="BSND")
    found = layer.fa_quant(*layer.seen, layout="BSND").asnumpy()
    np.testing.assert_array_equal(found, expected)
    assert list(network.parameters_dict()) == names
    detach_attention(network)
    np.testing.assert_array_equal(network(x()).asnumpy(), before)
    assert "fa_quant" not in vars(layer)


def test_a_deep_copy_is_apart():
    network = Net()
    ms_quant.quantize(network, lambda path, cell: None, attention={"*": "FP8_DYNAMIC"})
    twin = copy.deepcopy(network)
    detach_attention(twin)
    assert twin.blocks[0].attn.fa_quant is None
    assert network.blocks[0].attn.fa_quant is not None


def test_cross_attention_is_refused_where_there_is_no_other():
    network = Net()
    ms_quant.quantize(network, lambda path, cell: None, attention={"*": "FP8_DYNAMIC"})
    with pytest.raises(MsQuantError, match=r"blocks\.0\.attn: fa_quant was called with queries of"):
        network.blocks[0].attn(x(), context=7)


def test_attached_once():
    network = Net()
    attach_attention(network, lambda site: lambda q, k, v, **_: v)
    with pytest.raises(MsQuantError, match="has an attention function already, expected detach"):
        attach_attention(network, lambda site: lambda q, k, v, **_: v)


def test_networks_without_attention_are_refused():
    network = nn.SequentialCell(nn.Dense(4, 4))
    with pytest.raises(MsQuantError, match="holds no attention that can be taken over"):
        ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*": "FP8_DYNAMIC"})
    assert not attention_summary(network).layers


def test_refused_before_anything_long():
    """What cannot be attached is known before calibration is gone through."""
    network, calls = Net(), iter([x()])
    with pytest.raises(MsQuantError, match="every attention that a pattern matches stays float"):
        ms_quant.quantize(network, "W8A8", calibration=calls, attention={"*": None})
    attach_attention(network, lambda site: lambda q, k, v, **_: v)
    with pytest.raises(MsQuantError, match="has an attention function already"):
        ms_quant.quantize(network, "W8A8", calibration=calls, attention={"*": "FP8_DYNAMIC"})
    assert next(calls) is not None


@pytest.mark.parametrize("wish", [{}, ["*"], "FP8_DYNAMIC"])
def test_attention_is_a_dict(wish):
    with pytest.raises(MsQuantError, match="expected a dict of patterns"):
        ms_quant.quantize(Net(), "W8A8_DYNAMIC", attention=wish)


# From files

FLOAT = {f"blocks.{n}.{name}.weight": "FLOAT" for n in range(2) for name in ("attn.qkv", "ff")}
AT = "blocks.1.attn"


@pytest.fixture
def put(tmp_path: Path, save_tensors: Callable) -> Callable[..., Path]:
    def write(entries: dict[str, Any], tensors: dict[str, np.ndarray], type: str) -> Path:
        path = tmp_path / f"quant_model_description_{type.lower()}.json"
        path.write_text(json.dumps({**FLOAT, **entries, "model_quant_type": type}))
        save_tensors(tmp_path / f"quant_model_weight_{type.lower()}.safetensors", tensors)
        return path

    return write


def rotations(matrix: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{AT}.q_rot": matrix, f"{AT}.k_rot": matrix}


def turned() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).standard_normal((SIZE, SIZE)))[0].astype("f4")


def in_fp8() -> tuple[dict[str, str], dict[str, np.ndarray]]:
    entries = {f"{AT}.quant_type": "fp8_dynamic", f"{AT}.q_rot": "FLOAT", f"{AT}.k_rot": "FLOAT"}
    return entries, rotations(turned())


def found_and(network: nn.Cell) -> tuple[np.ndarray, list[np.ndarray]]:
    network(x())
    layer = network.blocks[1].attn
    out = layer.fa_quant(*layer.seen, layout="BSND").asnumpy()
    return out, [tensor.asnumpy() for tensor in layer.seen]


@pytest.mark.parametrize("key", [f"{AT}.quant_type", f"{AT}.fa_q.scale", AT])
def test_rotations_of_a_file(key, put):
    entries, tensors = in_fp8()
    del entries[f"{AT}.quant_type"]
    path = put({**entries, key: "FP8_DYNAMIC"}, tensors, "FP8_DYNAMIC")
    network = ms_quant.quantize(Net(), path)
    found, given = found_and(network)
    expected = fa_quant(*given, turned(), turned(), layout="BSND")
    np.testing.assert_array_equal(found, expected)
    rows = {row.path: (row.attention, row.reason) for row in attention_summary(network)}
    assert rows == {"blocks.0.attn": ("FLOAT", "not chosen"), AT: ("FP8_DYNAMIC", "")}


def test_linears_beside_attention(put):
    entries, tensors = in_fp8()
    width = HEADS * SIZE
    linear = {
        "blocks.0.ff.weight": np.ones((width, width), np.int8),
        "blocks.0.ff.weight_scale": np.ones((width, 1), "f4"),
        "blocks.0.ff.bias": np.zeros(width, "f4"),
    }
    entries["blocks.0.ff.weight"] = "W8A8_DYNAMIC"
    policy = TimestepPolicyConfig()
    policy.register([0], "FLOAT", "fa")
    path = put(entries, {**tensors, **linear}, "W8A8_DYNAMIC")
    network = ms_quant.quantize(Net(), path, timestep_policy=policy)
    assert isinstance(network.blocks[0].ff, QuantLinear)
    for step in range(2):
        with TimestepManager.at(step):
            network(x())
    (row,) = [row for row in attention_summary(network) if row.path == AT]
    assert row.calls == {"FLOAT (dense step)": 1, "FP8_DYNAMIC": 1}


def static() -> tuple[dict[str, str], dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    scales = {n: head_scales(rng.standard_normal((1, HEADS, 9, SIZE)).astype("f4")) for n in "qkv"}
    tensors = {f"{AT}.fa_{name}.scale": scale for name, scale in scales.items()}
    tensors |= {f"{AT}.fa_{name}.offset": np.zeros((HEADS, 1), np.int8) for name in "qkv"}
    return dict.fromkeys(tensors, "FAQuant"), tensors


def test_static_scales_of_a_file(put):
    entries, tensors = static()
    path = put({**entries, "fa_quant_type": "FAKQuant"}, tensors, "FAQUANT")
    found, given = found_and(ms_quant.quantize(Net(), path))
    scales = tuple(tensors[f"{AT}.fa_{name}.scale"] for name in "qkv")
    expected = fa_quant(*given, kind="INT8", layout="BSND", scales=scales)
    np.testing.assert_array_equal(found, expected)


def without(name: str) -> Callable:
    return lambda entries, tensors: tensors.pop(name)


def given(name: str, value: Any) -> Callable:
    return lambda entries, tensors: tensors.update({name: value})


def entry(key: str, value: str) -> Callable:
    return lambda entries, tensors: entries.update({key: value})


@pytest.mark.parametrize(
    ("made", "change", "said"),
    [
        (in_fp8, without(f"{AT}.k_rot"), r"has no tensor 'blocks\.1\.attn\.k_rot', expected .*"),
        (in_fp8, given(f"{AT}.q_rot", np.eye(8, dtype="f4")), r"is F32 \[8, 8\], expected .* \[16"),
        (in_fp8, given(f"{AT}.q_rot", 2 * np.eye(16, dtype="f4")), "q_rot.*off the identity"),
        (in_fp8, given(f"{AT}.q_rot", np.eye(16, dtype="f4")), "expected the same rotation"),
        (in_fp8, entry("blocks.7.attn", "FP8_DYNAMIC"), r"blocks\.7\.attn is attention in FP8_DYN"),
        (in_fp8, entry(f"{AT}.quant_type", "QK_INT8"), "'QK_INT8', Q and K in INT8, which nothing"),
        (
            in_fp8,
            entry(f"{AT}.quant_type", "QK_INT8_V_FP8_DYNAMIC"),
            "Q and K in INT8; V in FP8_DYNAMIC, which nothing computes here, expected Q, K and V",
        ),
        (in_fp8, entry(f"{AT}.quant_type", "Q_FP8_Q_FP8"), "'Q_FP8_Q_FP8', expected a type of att"),
        (static, without(f"{AT}.fa_v.scale"), r"has no tensor 'blocks\.1\.attn\.fa_v\.scale'"),
        (static, given(f"{AT}.fa_k.scale", -np.ones((2, 1), "f4")), "a scale is not positive"),
        (static, given(f"{AT}.fa_k.offset", np.ones((2, 1), "i1")), "is not 0, expected symmetric"),
        (static, given(f"{AT}.fa_q.scale", np.ones((3, 1), "f4")), r"is F32 \[3, 1\], expected"),
    ],
)
def test_refused_files(made, change, said, put):
    entries, tensors = made()
    change(entries, tensors)
    network = Net()
    with pytest.raises(MsQuantError, match=said):
        ms_quant.quantize(network, put(entries, tensors, "FP8_DYNAMIC"))
    assert network.blocks[1].attn.fa_quant is None


def test_float_entries_leave_attention_alone(put):
    entries, tensors = in_fp8()
    entries |= {"blocks.0.attn": "FP8_DYNAMIC", "blocks.0.attn.quant_type": "FLOAT"}
    network = ms_quant.quantize(Net(), put(entries, tensors, "FP8_DYNAMIC"))
    assert network.blocks[0].attn.fa_quant is None
    assert network.blocks[1].attn.fa_quant is not None


# Static scales, over a sampling loop


def dense(q, k, v, **_) -> Tensor:
    arrays = [t.asnumpy().swapaxes(1, 2) for t in (q, k, v)]
    return Tensor(attention(*arrays).swapaxes(1, 2).copy())


def test_static_scales_leave_out_what_a_recall_window_does():
    """Of 256 x 64 values of a head one in 10,000 may be left out of q's range, none of v's."""
    rng, ranges = np.random.default_rng(0), Ranges(AttentionPlan("INT8"))
    q, k, v = rng.uniform(-1, 1, (3, 1, 2, 256, 64)).astype(np.float32)
    q[0, 0, 5, 5] = v[0, 0, 5, 5] = 100
    tensors = [Tensor(x) for x in (q, k, v)]
    call = AttentionCall("attn", original=lambda q, k, v: v)
    ranges(*tensors, layout="BNSD", mask=None, scale=None, call=call)
    scales = ranges.scales("attn")
    assert scales[0][0, 0] < 1.001 / 127 and scales[2][0, 0] == np.float32(100) / np.float32(127)


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A8"])
def test_static_scales_are_of_all_steps(scheme):
    """With a scheme that needs inputs itself, and with one that does not."""
    network, seen = Net(), []

    def sampling():
        latent = x()
        for step in range(3):
            with TimestepManager.at(step):
                yield latent
            latent = latent * (0.5 if step else 3.0)

    shown: list[tuple[str, int, int]] = []
    float_network = copy.deepcopy(network)
    attach_attention(float_network, lambda site: dense, layers=["*.1.attn"])
    ms_quant.quantize(
        network,
        scheme,
        calibration=sampling(),
        attention={"*.1.attn": "INT8"},
        progress=lambda *what: shown.append(what),
    )
    for latent in sampling():
        float_network(latent)
        seen.append([t.asnumpy() for t in float_network.blocks[1].attn.seen])
    cell = network.blocks[1].attn.fa_quant.hook.function
    for number, scale in enumerate(cell.scales):
        largest = np.max([np.abs(step[number]).max(axis=(0, 1, 3)) for step in seen], axis=0)
        np.testing.assert_allclose(scale[:, 0], largest / 127, rtol=1e-5)
    assert ("calibrate", 3, 3) in shown
    assert attention_summary(network).layers[0].reason == "not chosen"


def test_static_scales_need_inputs():
    network = Net()
    with pytest.raises(MsQuantError, match=r"blocks\.0\.attn: INT8 needs calibration inputs, foun"):
        ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*": "INT8"})
    with pytest.raises(MsQuantError, match=r"blocks\.0\.attn: no calibration input reached it"):
        ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*": "INT8"}, calibration=[])
    assert network.blocks[0].attn.fa_quant is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FP8_DYNAMIC", "FP8_DYNAMIC"),
        ("qkv_mxfp4_dynamic", "MXFP4_DYNAMIC"),
        ("INT8_DYNAMIC", "INT8_DYNAMIC"),
        ("INT8", "INT8"),
        ("QKV_INT8", "INT8"),
        ("FAKQuant", "INT8"),
    ],
)
def test_names_that_msmodelslim_builds(name, kind):
    assert ATTENTION_TYPES[check_attention_type(name, "x")] == kind and is_attention_type(name)


# Saved again


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", None])
def test_saved_attention_is_loaded(scheme, tmp_path):
    network = Net()
    wishes = {"*.0.attn": "MXFP4_DYNAMIC", "*.1.attn": {"kind": "FP8_DYNAMIC", "rotates": False}}
    ms_quant.quantize(network, scheme or (lambda path, cell: None), attention=wishes)
    path = ms_quant.save_quantized(network, tmp_path)
    stated = json.loads(Path(path).read_text())
    assert stated["blocks.0.attn.quant_type"] == "MXFP4_DYNAMIC"
    assert stated["model_quant_type"] == (scheme or "MXFP4_DYNAMIC")
    fresh = Net()
    for (_, old), (_, new) in zip(
        network.parameters_and_names(), fresh.parameters_and_names(), strict=False
    ):
        if scheme is None:
            new.set_data(old)
    ms_quant.quantize(fresh, path)
    np.testing.assert_array_equal(fresh(x()).asnumpy(), network(x()).asnumpy())
    assert {row.attention for row in attention_summary(fresh)} == {"MXFP4_DYNAMIC", "FP8_DYNAMIC"}


def test_steps_in_float_are_saved_where_the_runtime_does_not_look(tmp_path):
    network = Net()
    wish = {"kind": "FP8_DYNAMIC", "float_steps": range(2)}
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*.0.attn": wish}, dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn has steps in float, which ms_quant"):
        path = ms_quant.save_quantized(network, tmp_path)
    stated = json.loads(Path(path).read_text())
    assert stated["metadata"] == {"attention_float_steps": {"blocks.0.attn": [0, 1]}}
    fresh = ms_quant.load_quantized(Net(), path)
    for step in range(3):
        with TimestepManager.at(step):
            fresh(x())
    calls = attention_summary(fresh).layers[0].calls
    assert calls == {"FLOAT (dense step)": 2, "FP8_DYNAMIC": 1}
    stated["metadata"]["attention_float_steps"]["blocks.1.attn"] = [0]
    (tmp_path / Path(path).name).write_text(json.dumps(stated))
    with pytest.raises(MsQuantError, match=r"'blocks\.1\.attn' is \[0\], expected steps from 0 of"):
        ms_quant.load_quantized(Net(), path)


def test_what_mindie_sd_does_not_serve_is_not_saved(tmp_path):
    network = Net()
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*.0.attn": "INT8_DYNAMIC"})
    with pytest.raises(MsQuantError, match=r"blocks\.0\.attn: MindIE-SD serves no attention in"):
        ms_quant.save_quantized(network, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_files_do_not_hold_is_said(tmp_path):
    network = Net()
    wishes = {"*.0.attn": {"sparse": "rf_v2", "kind": "FP8_DYNAMIC"}}
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention=wishes)
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn is sparse, which MindIE-SD's files do"):
        ms_quant.save_quantized(network, tmp_path)


WHOLE = {
    "quantized": {"*": "FP8_DYNAMIC"},
    "sparse": {"*.0.attn": {"sparse": "rf_v3", "sparsity": 0.5, "latent_shape": (1, 5, 8)}},
    "static": {"*": {"kind": "INT8", "rotates": True}},
    "by step": {"*": {"kind": "MIX", "float_steps": [3, 4]}},
}


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", None])
@pytest.mark.parametrize("wishes", WHOLE.values(), ids=WHOLE)
def test_a_whole_network_with_attention_is_loaded(scheme, wishes, tmp_path):
    network = Net()
    chosen = scheme or (lambda path, cell: None)
    ms_quant.quantize(network, chosen, attention=wishes, calibration=[x()])
    path = ms_quant.save_quantized(network, tmp_path, format="network")
    fresh = ms_quant.load_quantized(Net(), path)
    with TimestepManager.at(5):
        np.testing.assert_array_equal(fresh(x()).asnumpy(), network(x()).asnumpy())
    rows = [attention_summary(one).layers for one in (fresh, network)]
    assert rows[0] == rows[1]


def test_attention_of_another_network_is_refused(tmp_path):
    network = Net()
    ms_quant.quantize(network, "W8A8_DYNAMIC", attention={"*": "FP8_DYNAMIC"})
    path = ms_quant.save_quantized(network, tmp_path, format="network")
    fresh = Net()
    fresh.blocks[1].attn = nn.SequentialCell()
    fresh.blocks[1].attn.qkv = nn.Dense(HEADS * SIZE, 3 * HEADS * SIZE)
    with pytest.raises(MsQuantError, match=r"holds attention of 'blocks\.1\.attn', the net"):
        ms_quant.load_quantized(fresh, path)
    assert not any(isinstance(cell, QuantLinear) for _, cell in fresh.cells_and_names())
