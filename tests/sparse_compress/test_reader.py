"""The software reader: HF names, merged ranks, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_quant.errors import MsQuantError
from sparse_compress.layouts.vllm_mindspore import DESCRIPTION
from sparse_compress.pipeline.info import info
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.rate.prune import prune

LAYER = "model.layers.0"


def opened(directory: Path) -> SparseModel:
    model = open_w8a8sc(directory)
    assert isinstance(model, SparseModel)
    return model


def test_other_directories_are_left_to_other_readers(tmp_path: Path) -> None:
    assert open_w8a8sc(tmp_path) is None


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_float_tensors_are_the_sources_in_float16(make: Callable[..., Any], tp: int) -> None:
    made = make(tp=tp)
    model, source = opened(made.output), load_file(made.source / "model.safetensors")
    assert model.format == f"W8A8SC TP{tp}"
    assert (model.config.vocab_size, model.config.dtype) == (310, "float16")
    names = set(model.layout.float_names())
    assert {"lm_head.weight", "model.norm.weight", f"{LAYER}.input_layernorm.weight"} <= names
    for name in names:
        expected = source[name].astype(np.float32).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(model.tensor(name), expected, err_msg=name)
        assert model.tensor(name).dtype == np.float32


@pytest.mark.parametrize("elements", [1, 320 * 3, 320 * 1000])
def test_pieces_are_the_whole(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    made = make(tp=2)
    model, source = opened(made.output), load_file(made.source / "model.safetensors")
    monkeypatch.setattr("sparse_compress.ranks.reader.CHUNK_ELEMENTS", elements)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        pieces = list(model.chunks(name))
        starts = np.cumsum([0, *(len(rows) for _, rows in pieces)])
        assert [start for start, _ in pieces] == starts[:-1].tolist()
        expected = source[name].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), expected)
        np.testing.assert_array_equal(model.tensor(name), expected)


@pytest.mark.parametrize("member", ["self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_linears_do_not_depend_on_the_number_of_ranks(
    make: Callable[..., Any], member: str
) -> None:
    first, *others = (opened(make(tp=tp).output).linear(f"{LAYER}.{member}") for tp in (1, 2, 4))
    x = np.random.default_rng(0).standard_normal((3, first.weight.shape[1]), np.float32)
    for other in others:
        np.testing.assert_array_equal(other.weight, first.weight)
        np.testing.assert_array_equal(other.forward(x), first.forward(x))


def test_a_linear_is_the_pruned_source_within_half_a_step(make: Callable[..., Any]) -> None:
    made = make(tp=2, pruning="magnitude")
    name = f"{LAYER}.mlp.up_proj"
    linear = opened(made.output).linear(name)
    source = load_file(made.source / "model.safetensors")[f"{name}.weight"].astype(np.float32)
    pruned = prune(source, 0.5)
    assert linear is not None
    # The reader takes the activation scale as 1, so weight_scale is a step of the output.
    step = linear.weight_scale[:, None] / linear.static.input_scale
    error = np.abs(linear.float_weight() - pruned)
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert ((pruned == 0) <= (linear.weight == 0)).all()


def test_a_float_linear_is_none_and_its_weight_a_tensor(make: Callable[..., Any]) -> None:
    made = make(tp=4)
    model, name = opened(made.output), f"{LAYER}.self_attn.o_proj"
    assert model.linear(name) is None
    assert model.tensor(f"{name}.weight").shape == (320, 768)
    with pytest.raises(MsQuantError, match=r"'model\.x' is not a linear of the model"):
        model.linear("model.x")


def test_biases_come_with_the_linear(make: Callable[..., Any]) -> None:
    made = make({"family": "llama", "biases": True})
    source = load_file(made.source / "model.safetensors")
    for member in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        linear = opened(made.output).linear(f"{LAYER}.{member}")
        expected = source[f"{LAYER}.{member}.bias"].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(linear.bias, expected)


def test_a_tied_head_is_the_embedding(make: Callable[..., Any]) -> None:
    model = opened(make({"tied": True}).output)
    expected = model.tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(model.tensor("lm_head.weight"), expected)


def test_each_fused_linear_is_decoded_once_in_model_order(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    plain = SparseModel.decode

    def count(self: SparseModel, rank: int, fused: str, group: Any) -> np.ndarray:
        decoded.append((rank, fused))
        return plain(self, rank, fused, group)

    monkeypatch.setattr(SparseModel, "decode", count)
    model = opened(make(tp=2).output)
    for member in model.config.block(0).linears:
        model.linear(f"{LAYER}.{member}")
    assert len(decoded) == len(set(decoded)) == 2 * 4


def test_a_missing_rank_is_refused(make: Callable[..., Any], damage: Callable[..., Any]) -> None:
    copy = damage(make(tp=2))
    shutil.rmtree(copy.directory / "rank_1")
    with pytest.raises(MsQuantError, match=r"has \['rank_0'\], expected \['rank_0', 'rank_1'\]"):
        open_w8a8sc(copy.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("device_type"), "device_type is None, expected '310P'"),
        (lambda d: d.update(rank_1=3), "rank_1 is 3, expected an object"),
        (lambda d: d.pop("rank_0"), "expected rank_0, rank_1"),
        (lambda d: d["rank_1"].clear(), "rank_1 and rank_0 differ in model.layers.0"),
        (
            lambda d: d["rank_0"].pop(f"{LAYER}.mlp.down_proj.index.shape"),
            "index.shape is missing, the runtime reads the linear as FLOAT",
        ),
        (lambda d: d["rank_0"].update({"a.weight": "FLOAT"}), "a.weight is 'FLOAT', expected"),
        (lambda d: d["rank_0"].update({"a.shape": [1]}), "a.shape has no linear"),
        (lambda d: d["rank_0"].update({"a.shape": 1}), "a.shape is 1, expected one number"),
    ],
)
def test_a_malformed_description_is_refused(
    make: Callable[..., Any], damage: Callable[..., Any], change: Any, message: str
) -> None:
    copy = damage(make(tp=2))
    copy.edit_json(DESCRIPTION, change)
    with pytest.raises(MsQuantError) as caught:
        open_w8a8sc(copy.directory)
    assert message in str(caught.value)


def test_info_has_a_row_for_each_layer_and_rank(make: Callable[..., Any]) -> None:
    made = make(tp=2)
    result = info(made.output)
    rows = result["rows"]
    assert len(rows) == 4 * 2
    first = rows[0]
    assert (first["layer"], first["rank"]) == (f"{LAYER}.self_attn.qkv_proj", 0)
    assert (first["shape"], first["tiles"], first["bypass_tiles"]) == ([512, 320], 8, 0)
    assert all(0.45 < row["sparsity"] < 0.55 for row in rows)
    assert sum(row["stored_bytes"] for row in rows) == result["stored_bytes"]
    assert result["ratio"] == result["stored_bytes"] / result["raw_bytes"] < 0.9
    weights = sum(row["sparsity"] * row["raw_bytes"] for row in rows)
    assert round(weights) == result["weights"]["zeros"]


def test_info_refuses_other_directories(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="is no W8A8SC checkpoint"):
        info(tmp_path)
