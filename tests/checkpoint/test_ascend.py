"""The ascend format's tables against ones written by hand, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import given

from ms_quant.errors import MsQuantError
from ms_quant.formats.ascend import format as ascend
from ms_quant.formats.ascend.codes import codes_of
from ms_quant.models.config import parse_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import SCHEMES

BF16, FP16 = DTYPES["bfloat16"], DTYPES["float16"]
RAW = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10,
}
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"


def plan(scheme: str, dtype: np.dtype = BF16, raw: dict | None = None, **options: Any) -> Plan:
    config = parse_config({**RAW, **(raw or {})})
    return make_plan(config, scheme, "minmax", dtype=dtype, scheme_options=options)


def table(chosen: Plan, path: str) -> dict[str, str]:
    """Each tensor of a linear as ``"dtype [shape]"``."""
    tensors = ascend.FORMAT.tensor_plans(chosen)
    return {
        t.name.removeprefix(f"{path}."): f"{t.dtype} {list(t.shape)}"
        for t in tensors
        if t.name.startswith(f"{path}.")
    }


def scales(level: str, *shape: int) -> dict[str, str]:
    return {f"weight_{n}{level}": f"float32 {list(shape)}" for n in ("scale", "offset")}


STATIC = {
    "input_scale": "float32 [1]",
    "input_offset": "float32 [1]",
    "deq_scale": "float32 [32]",
    "quant_bias": "int32 [32]",
}
MX = {"weight_scale": "uint8 [32, 2]"}
PLAIN, PACKED = {"weight": "int8 [32, 64]"}, {"weight": "int8 [16, 64]"}
BYTES = {"weight": "uint8 [32, 32]"}
E4M3 = {"weight": "float8_e4m3fn [32, 64]"}


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("W8A8_PER_TENSOR", {}, {**PLAIN, **STATIC}),
        ("W8A8_PER_CHANNEL", {}, {**PLAIN, **STATIC}),
        ("W8A8S", {}, {**PLAIN, **STATIC}),
        ("W8A8_MIX", {}, {**PLAIN, **STATIC, **scales("", 32, 1)}),
        ("W8A16", {}, {**PLAIN, **scales("", 32, 1)}),
        ("W8A16", {"group_size": 32}, {**PLAIN, **scales("", 32, 2)}),
        (
            "W4A8_DYNAMIC",
            {},
            {**PACKED, **scales("", 32, 1), "scale_bias": "float32 [32, 1]"},
        ),
        (
            "W4A8_DYNAMIC",
            {"group_size": 32},
            {
                **PACKED,
                **scales("", 32, 1),
                **scales("_second", 32, 2),
                "scale_bias": "float32 [32, 1]",
            },
        ),
        ("W4A4_DYNAMIC", {}, {**PLAIN, **scales("", 32, 1)}),
        ("W8A8FP8_DYNAMIC", {}, {**E4M3, **scales("", 32, 1)}),
        ("W8A8_MXFP8", {}, {**E4M3, **MX}),
        ("W4A8_MXFP", {}, {**BYTES, **MX}),
        ("W4A4_MXFP4", {}, {**BYTES, **MX}),
        ("W16A16S", {}, {"weight": "bfloat16 [32, 64]"}),
        (
            "W4A4_MXFP4_SVD",
            {},
            {
                **BYTES,
                **MX,
                "svd_lowrank_l1": "bfloat16 [32, 64]",
                "svd_lowrank_l2": "bfloat16 [32, 32]",
            },
        ),
    ],
)
def test_tensors_of_a_column_parallel_linear(scheme: str, options: dict, expected: dict) -> None:
    assert table(plan(scheme, **options), K_PROJ) == {**expected, "bias": "float32 [32]"}


def test_tensors_of_a_row_parallel_linear_and_of_float16() -> None:
    assert table(plan("W4A8_DYNAMIC"), DOWN)["scale_bias"] == "float32 [64, 16]"
    assert table(plan("W8A8_MIX", FP16), DOWN)["deq_scale"] == "int64 [64]"
    assert table(plan("W8A8_MIX", FP16), K_PROJ)["bias"] == "float32 [32]"
    assert table(plan("W16A16S", FP16), DOWN) == {"weight": "float16 [64, 128]"}
    assert table(plan("W4A4_MXFP4_SVD", FP16), DOWN)["svd_lowrank_l1"] == "float16 [32, 128]"


def test_a_kronecker_transform_has_tensors_of_its_own() -> None:
    chosen = plan("W4A4_FLATQUANT_DYNAMIC")
    expected = {"left_trans": "bfloat16 [8, 8]", "right_trans": "bfloat16 [8, 8]"}
    added = {"clip_ratio": "float32 [1]", "bias": "float32 [32]", **scales("", 32, 1)}
    assert table(chosen, K_PROJ) == {**PLAIN, **expected, **added}


def test_description() -> None:
    raw = {"tie_word_embeddings": True}
    chosen = make_plan(
        parse_config({**RAW, **raw}),
        "W4A8_DYNAMIC",
        "minmax",
        dtype=BF16,
        exclude=("*.gate_proj", "*.o_proj"),
        scheme_options={"group_size": 32},
    )
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    expected: dict[str, Any] = {
        "model.embed_tokens.weight": "FLOAT",
        "model.layers.0.input_layernorm.weight": "FLOAT",
        "model.layers.0.post_attention_layernorm.weight": "FLOAT",
        "model.norm.weight": "FLOAT",
        "lm_head.weight": "FLOAT",  # tied: there is no such tensor, but the runtime asks
        f"{attention}.o_proj.weight": "FLOAT",
        f"{mlp}.gate_proj.weight": "FLOAT",
        f"{mlp}.up_proj.weight": "FLOAT",
        "version": "1.0.0",
        "model_quant_type": "W4A8_DYNAMIC",
        "group_size": 32,
        "metadata": {},
        "optional": {},
    }
    levels = [f"weight_{n}{level}" for n in ("scale", "offset") for level in ("", "_second")]
    quantized = [f"{attention}.{n}_proj" for n in "qkv"] + [f"{mlp}.down_proj"]
    for path in quantized:
        suffixes = ["weight", "scale_bias", *levels]
        expected |= {f"{path}.{suffix}": "W4A8_DYNAMIC" for suffix in suffixes}
    expected |= {f"{attention}.{n}_proj.bias": "FLOAT" for n in "qkv"}
    assert ascend.FORMAT.description(chosen) == expected


@pytest.mark.parametrize(("scheme", "size"), [("W8A8_MIX", 0), ("W8A8_MXFP8", 32)])
def test_group_size_of_the_description(scheme: str, size: int) -> None:
    found = ascend.FORMAT.description(plan(scheme))
    assert (found["group_size"], found["model_quant_type"]) == (size, scheme)


def test_branches_are_float_in_the_description() -> None:
    found = ascend.FORMAT.description(plan("W4A4_MXFP4_SVD"))
    assert found[f"{DOWN}.svd_lowrank_l1"] == found[f"{DOWN}.svd_lowrank_l2"] == "FLOAT"
    assert found[f"{DOWN}.weight"] == found[f"{DOWN}.weight_scale"] == "W4A4_MXFP4_SVD"


def test_float_weights_are_stored_as_they_are() -> None:
    """In the model's type, byte for byte; NaN and infinities are no weights."""
    values = np.float32([[1.5, 0, -0.25], [2**-16, 0, 57344]])
    codes = codes_of(SCHEMES["W16A16S"], FP16)
    stored = codes.pack(values, "w")
    assert stored.tobytes().hex() == "003e000000b40001000000" + "7b"
    np.testing.assert_array_equal(codes.unpack(stored, 3, "w"), values)
    for wrong in (np.nan, np.inf):
        with pytest.raises(MsQuantError, match="w: 1 of 1 values are NaN or inf"):
            codes.unpack(np.float16([[wrong]]), 1, "w")


def test_a_bias_of_float_weights_has_their_name() -> None:
    found = ascend.FORMAT.description(plan("W16A16S"))
    assert found[f"{K_PROJ}.weight"] == found[f"{K_PROJ}.bias"] == "W16A16S"
    assert found["model_quant_type"] == "W16A16S" and found["model.norm.weight"] == "FLOAT"


@pytest.mark.parametrize(
    ("scheme", "raw", "message"),
    [
        ("W4A8_DYNAMIC", {"intermediate_size": 72}, r"0\.mlp\.down_proj\.weight: 72 inputs, expec"),
        ("W4A8_DYNAMIC", {"intermediate_size": 81}, r"0\.mlp\.gate_proj\.weight: 81 outputs, "),
    ],
)
def test_a_shape_that_cannot_be_packed_is_refused(scheme: str, raw: dict, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        plan(scheme, raw=raw)
    config = parse_config({**RAW, **raw})
    made = make_plan(config, scheme, "minmax", dtype=BF16, float_undivided=True)
    assert DOWN in made.float_linears() and K_PROJ in made.quantized()


def test_an_input_scale_for_each_channel_is_refused() -> None:
    layer, group, spec = given(plan("W8A8_MIX"), K_PROJ)
    with pytest.raises(MsQuantError, match="the ascend format cannot hold scheme W8A8"):
        ascend.check(replace(layer, scheme=SCHEMES["W8A8"]), group, spec, "x")


def test_output_bytes_are_those_of_the_tensors(
    tiny_model: Callable[..., Path], tmp_path: Path, load_tensors: Callable
) -> None:
    from ms_quant.pipeline.run import QuantizeOptions, run_job

    source = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16, shards=1)
    (made,) = run_job(QuantizeOptions(source, tmp_path / "out", "W4A8_MXFP")).outputs
    assert made.format == "ascend"
    tensors = load_tensors(tmp_path / "out")
    assert made.tensor_bytes == sum(array.nbytes for array in tensors.values())
