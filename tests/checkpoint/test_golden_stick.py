"""The golden-stick format against tables written by hand from its contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from plans import with_layer

from ms_quant.errors import MsQuantError
from ms_quant.formats.golden_stick import format as golden_stick
from ms_quant.models.config import parse_config
from ms_quant.numerics.linear import quantize_linear, static_activation
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan

BF16, FP16 = DTYPES["bfloat16"], DTYPES["float16"]
RAW = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 10,
}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def plan(
    family: str, scheme: str = "W8A8", dtype: np.dtype = BF16, exclude: tuple = (), **raw: object
) -> Plan:
    config = parse_config({**RAW, "model_type": family, **raw})
    return make_plan(config, scheme, "minmax", dtype=dtype, exclude=exclude)


def table(plan: Plan) -> dict[str, str]:
    """Each tensor as ``"dtype [shape]"``."""
    return {t.name: f"{t.dtype} {list(t.shape)}" for t in golden_stick.FORMAT.tensor_plans(plan)}


def w8a8(out_features: int, in_features: int) -> dict[str, str]:
    return {
        "weight": f"int8 [{out_features}, {in_features}]",
        "deq_scale": f"float32 [{out_features}]",
        "quant_bias": f"int32 [{out_features}]",
        "input_scale": f"bfloat16 [{in_features}]",
        "input_offset": f"int8 [{in_features}]",
    }


def under(path: str, tensors: dict[str, str]) -> dict[str, str]:
    return {f"{path}.{suffix}": value for suffix, value in tensors.items()}


def test_tensor_table_of_qwen3() -> None:
    assert table(plan("qwen3")) == {
        "model.embed_tokens.weight": "bfloat16 [10, 8]",
        "model.layers.0.input_layernorm.weight": "bfloat16 [8]",
        **under(f"{ATTENTION}.q_proj", w8a8(12, 8)),
        **under(f"{ATTENTION}.k_proj", w8a8(6, 8)),
        **under(f"{ATTENTION}.v_proj", w8a8(6, 8)),
        **under(f"{ATTENTION}.o_proj", w8a8(8, 12)),
        **under(f"{MLP}.gate_proj", w8a8(12, 8)),
        **under(f"{MLP}.up_proj", w8a8(12, 8)),
        **under(f"{MLP}.down_proj", w8a8(8, 12)),
        f"{ATTENTION}.q_norm.weight": "bfloat16 [6]",
        f"{ATTENTION}.k_norm.weight": "bfloat16 [6]",
        "model.layers.0.post_attention_layernorm.weight": "bfloat16 [8]",
        "model.norm.weight": "bfloat16 [8]",
        "lm_head.weight": "bfloat16 [10, 8]",
    }


def test_tensor_table_of_qwen2_tied_in_float16() -> None:
    found = table(plan("qwen2", dtype=FP16, tie_word_embeddings=True))
    assert "lm_head.weight" not in found
    assert f"{ATTENTION}.q_norm.weight" not in found
    assert found["model.embed_tokens.weight"] == "float16 [10, 8]"
    assert {name: found[f"{ATTENTION}.{name}"] for name in ("q_proj.bias", "k_proj.bias")} == {
        "q_proj.bias": "float16 [12]",
        "k_proj.bias": "float16 [6]",
    }
    assert found[f"{ATTENTION}.q_proj.input_scale"] == "float16 [8]"
    assert found[f"{ATTENTION}.q_proj.deq_scale"] == "float32 [12]"
    assert f"{ATTENTION}.o_proj.bias" not in found


# The MindFormers backend reads bfloat16 scales for bfloat16 models, float32 ones for others.
@pytest.mark.parametrize(("dtype", "scale"), [(BF16, "bfloat16"), (FP16, "float32")])
def test_tensor_table_of_w8a8_dynamic(dtype: np.dtype, scale: str) -> None:
    found = table(plan("qwen2", "W8A8_DYNAMIC", dtype))
    q_proj = {k: v for k, v in found.items() if k.startswith(f"{ATTENTION}.q_proj")}
    assert q_proj == {
        f"{ATTENTION}.q_proj.weight": "int8 [12, 8]",
        f"{ATTENTION}.q_proj.weight_scale": f"{scale} [12]",
        f"{ATTENTION}.q_proj.bias": f"{dtype} [12]",
    }


def kinds(linear: str, scheme: str, bias: bool = False) -> dict[str, str]:
    suffixes = ["weight", "deq_scale", "quant_bias", "input_scale", "input_offset"]
    if scheme == "W8A8_DYNAMIC":
        suffixes = ["weight", "weight_scale"]
    if scheme == "FLOAT":
        suffixes = ["weight"]
    return {f"{linear}.{suffix}": scheme for suffix in [*suffixes, *["bias"] * bias]}


FLOATS = {
    "model.embed_tokens.weight": "FLOAT",
    "model.layers.0.input_layernorm.weight": "FLOAT",
    "model.layers.0.post_attention_layernorm.weight": "FLOAT",
    "model.norm.weight": "FLOAT",
    "lm_head.weight": "FLOAT",
}
LINEARS = {
    "q": f"{ATTENTION}.q_proj",
    "k": f"{ATTENTION}.k_proj",
    "v": f"{ATTENTION}.v_proj",
    "o": f"{ATTENTION}.o_proj",
    "gate": f"{MLP}.gate_proj",
    "up": f"{MLP}.up_proj",
    "down": f"{MLP}.down_proj",
}


# A bias carries the value of its module, or the runtime refuses the file. Biases: qwen2 has them
# on q/k/v; llama with attention_bias on q/k/v/o, with mlp_bias on the rest; qwen3 on q/k/v/o.
@pytest.mark.parametrize(
    ("family", "raw", "biased", "extra"),
    [
        ("llama", {}, "", {}),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            "q k v o gate up down",
            {},
        ),
        ("qwen2", {}, "q k v", {}),
        (
            "qwen3",
            {"attention_bias": True},
            "q k v o",
            {f"{ATTENTION}.q_norm.weight": "FLOAT", f"{ATTENTION}.k_norm.weight": "FLOAT"},
        ),
    ],
)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_description(family: str, raw: dict, biased: str, extra: dict, scheme: str) -> None:
    expected = {**FLOATS, **extra}
    for short, path in LINEARS.items():
        expected.update(kinds(path, scheme, short in biased.split()))
    found = golden_stick.description(plan(family, scheme, **raw))
    assert found == expected
    assert list(found) == list(table(plan(family, scheme, **raw)))  # model order


@pytest.mark.parametrize(
    ("pattern", "floats"),
    [
        ("*.k_proj", "q k v"),
        ("*.up_proj", "gate up"),
        ("*.down_proj", "down"),
        ("*self_attn*", "q k v o"),
    ],
)
def test_fallback_is_float_by_whole_fused_groups(pattern: str, floats: str) -> None:
    chosen = plan("qwen2", exclude=(pattern,))
    found, tensors = golden_stick.description(chosen), table(chosen)
    for short, path in LINEARS.items():
        scheme = "FLOAT" if short in floats.split() else "W8A8"
        mine = {key: value for key, value in found.items() if key.startswith(f"{path}.")}
        assert mine == kinds(path, scheme, short in "qkv")
        if scheme == "FLOAT":
            assert tensors[f"{path}.weight"].startswith("bfloat16")
    assert sorted(found) == sorted(tensors)


def test_config_json_is_stripped_and_says_the_dtype() -> None:
    for given in ({"torch_dtype": "float32"}, {"dtype": "float32"}, {"dtype": None}, {}):
        raw = {"model_type": "llama", "a": 1, "compression_config": {}, **given}
        found = golden_stick.model_config(replace(plan("llama").config, raw=raw), BF16)
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        assert found == {
            "model_type": "llama",
            "a": 1,
            "rope_theta": 10000.0,
            "rope_parameters": rope,
            "torch_dtype": "bfloat16",  # older runtimes read only this
            "dtype": "bfloat16",
        }
        assert raw == {"model_type": "llama", "a": 1, "compression_config": {}, **given}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_numbers_of_a_static_linear(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 8), np.float32)
    low, high = -rng.random(8, np.float32), 3 * rng.random(8, np.float32)
    activation = static_activation(low, high, 0.5 + rng.random(8), dtype, "x")
    linear = quantize_linear(weight, None, activation, np.dtype(np.float32))
    (layer,) = plan("llama", dtype=dtype).distinct
    stored = {suffix: golden_stick.linear_tensor(layer, linear, suffix) for suffix in w8a8(1, 1)}
    for suffix, (kind, shape) in golden_stick.linear_plan(layer, (12, 8)).items():
        assert (stored[suffix].dtype, stored[suffix].shape) == (kind, shape)
    expected = np.float32(activation.scale) * linear.weight_scale
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(stored["deq_scale"], expected)
    sums = [-activation.offset * sum(int(code) for code in row) for row in stored["weight"]]
    assert stored["quant_bias"].tolist() == sums  # in integers, not through bfloat16
    assert activation.offset != 0
    assert stored["input_offset"].tolist() == [activation.offset] * 8
    np.testing.assert_array_equal(  # the stored type holds it exactly
        stored["input_scale"].astype(np.float32), activation.input_scale
    )


def test_dynamic_weight_scale_is_used_as_stored() -> None:
    weight = np.random.default_rng(1).standard_normal((12, 8), np.float32)
    for dtype, stored_as in ((BF16, ml_dtypes.bfloat16), (FP16, np.float32)):
        (layer,) = plan("llama", "W8A8_DYNAMIC", dtype).distinct
        linear = quantize_linear(weight, None, None, dtype)
        stored = golden_stick.linear_tensor(layer, linear, "weight_scale")
        assert stored.dtype == stored_as
        np.testing.assert_array_equal(stored.astype(np.float32), linear.weight_scale)


def test_a_scheme_without_a_layout_is_refused() -> None:
    chosen = plan("llama")
    (layer,) = chosen.distinct
    layer = replace(layer, scheme=replace(layer.scheme, name="W3A3"))
    with pytest.raises(MsQuantError, match="cannot hold scheme W3A3"):
        golden_stick.FORMAT.tensor_plans(with_layer(chosen, layer))


def test_names_the_runtime_looks_for() -> None:
    # Exactly one file of the root may end so, and the substring must not occur in its path.
    assert golden_stick.DESCRIPTION == "quantization_description.json"
    assert "quant_model_description" not in str(Path(golden_stick.SHARD_PREFIX))
