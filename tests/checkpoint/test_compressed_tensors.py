"""The compressed-tensors format's tables and descriptions, by hand, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plans import given, held

from ms_quant.errors import MsQuantError
from ms_quant.formats.compressed_tensors import format as format
from ms_quant.formats.compressed_tensors.config import (
    format_of,
    quantization_config,
    read_schemes,
)
from ms_quant.models.block_spec import LinearSpec
from ms_quant.models.config import parse_config
from ms_quant.numerics.activation import PerToken
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import SCHEMES

FORMAT = "compressed-tensors"
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
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
K_PROJ, DOWN = f"{ATTENTION}.k_proj", f"{MLP}.down_proj"
LINEARS = [
    *(f"{ATTENTION}.{name}_proj" for name in "qkvo"),
    *(f"{MLP}.{name}_proj" for name in ("gate", "up", "down")),
]


def plan(scheme: str, dtype: np.dtype = BF16, exclude: tuple = (), **options: Any) -> Plan:
    choices = {"scheme_options": options, "format": FORMAT}
    return make_plan(parse_config(RAW), scheme, "minmax", dtype=dtype, exclude=exclude, **choices)


def table(chosen: Plan, path: str = K_PROJ) -> dict[str, str]:
    """Each tensor of a linear as ``"dtype [shape]"``."""
    return {
        t.name.removeprefix(f"{path}."): f"{t.dtype} {list(t.shape)}"
        for t in format.FORMAT.tensor_plans(chosen)
        if t.name.startswith(f"{path}.")
    }


STATIC = {"input_scale": "bfloat16 [1]", "input_zero_point": "int8 [1]"}
PLAIN = {"weight": "int8 [32, 64]"}
INT4 = {"weight_packed": "int32 [32, 8]", "weight_shape": "int64 [2]"}
INT8 = {"weight_packed": "int32 [32, 16]", "weight_shape": "int64 [2]"}
FLOAT8 = {"weight": "float8_e4m3fn [32, 64]"}


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("W8A8", {}, {**PLAIN, "weight_scale": "bfloat16 [32, 1]", **STATIC}),
        ("W8A8_DYNAMIC", {}, {**PLAIN, "weight_scale": "bfloat16 [32, 1]"}),
        ("W8A16", {}, {**INT8, "weight_scale": "bfloat16 [32, 1]"}),
        ("W8A16", {"group_size": 32}, {**INT8, "weight_scale": "bfloat16 [32, 2]"}),
        (
            "W8A16",
            {"symmetric": False},
            {
                **INT8,
                "weight_scale": "bfloat16 [32, 1]",
                "weight_zero_point": "int32 [8, 1]",
            },
        ),
        ("W4A16", {"group_size": 0}, {**INT4, "weight_scale": "bfloat16 [32, 1]"}),
        ("W4A16", {"group_size": 64}, {**INT4, "weight_scale": "bfloat16 [32, 1]"}),
        (
            "W4A16",
            {"group_size": 32, "symmetric": False},
            {
                **INT4,
                "weight_scale": "bfloat16 [32, 2]",
                "weight_zero_point": "int32 [4, 2]",
            },
        ),
        ("W8A8FP8_DYNAMIC", {}, {**FLOAT8, "weight_scale": "bfloat16 [32, 1]"}),
    ],
)
def test_tensors_of_a_linear(scheme: str, options: dict, expected: dict) -> None:
    assert table(plan(scheme, **options)) == {**expected, "bias": "bfloat16 [32]"}


def test_types_of_a_float16_model() -> None:
    assert table(plan("W8A8_DYNAMIC", FP16))["weight_scale"] == "float16 [32, 1]"
    assert table(plan("W4A16", FP16, group_size=32))["weight_scale"] == "float16 [32, 2]"
    assert table(plan("W8A8", FP16))["input_scale"] == "float16 [1]"


def integers(bits: int, strategy: str, size: int | None = None, **more: Any) -> dict[str, Any]:
    said = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": size}
    return {**said, "strategy": strategy, "dynamic": False, **more}


TOKEN = integers(8, "token", dynamic=True)
TENSOR = integers(8, "tensor", symmetric=False)
SPELLED: list[tuple[str, dict, str, dict, dict | None]] = [
    ("W8A8", {}, "int-quantized", integers(8, "channel"), TENSOR),
    ("W8A8_DYNAMIC", {}, "int-quantized", integers(8, "channel"), TOKEN),
    ("W8A16", {}, "pack-quantized", integers(8, "channel"), None),
    ("W8A16", {"group_size": 32}, "pack-quantized", integers(8, "group", 32), None),
    ("W4A16", {"group_size": 0}, "pack-quantized", integers(4, "channel"), None),
    (
        "W4A16",
        {"group_size": 64, "symmetric": False},
        "pack-quantized",
        integers(4, "group", 64, symmetric=False),
        None,
    ),
    (
        "W8A8FP8_DYNAMIC",
        {},
        "float-quantized",
        integers(8, "channel", type="float"),
        integers(8, "token", dynamic=True, type="float"),
    ),
]


def described(chosen: Plan) -> dict[str, Any]:
    return format.FORMAT.description(chosen)


@pytest.mark.parametrize(("scheme", "options", "format", "weights", "inputs"), SPELLED)
def test_description(
    scheme: str, options: dict, format: str, weights: dict, inputs: dict | None
) -> None:
    chosen = plan(scheme, exclude=("*.up_proj", "*.o_proj"), **options)
    assert described(chosen) == {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": format,
            }
        },
        # gate is fused with up
        "ignore": [f"{ATTENTION}.o_proj", f"{MLP}.gate_proj", f"{MLP}.up_proj", "lm_head"],
    }


MIXTURE = [
    (held("W8A8_DYNAMIC", FORMAT), LINEARS[:3]),
    (held("W4A16", FORMAT, group_size=32), LINEARS[4:6]),
]
FLOATS = [LINEARS[3], LINEARS[6]]


def test_several_schemes_have_a_group_each_with_its_paths() -> None:
    found = quantization_config(MIXTURE, FLOATS)
    assert found["format"] == "mixed-precision"
    assert found["ignore"] == [*FLOATS, "lm_head"]
    first, second = found["config_groups"]["group_0"], found["config_groups"]["group_1"]
    assert first["targets"] == [f"{ATTENTION}.{name}_proj" for name in "qkv"]
    assert second["targets"] == [f"{MLP}.gate_proj", f"{MLP}.up_proj"]
    assert (first["format"], second["format"]) == ("int-quantized", "pack-quantized")
    assert second["weights"] == integers(4, "group", 32)
    both = [MIXTURE[0], (held("W8A8", FORMAT), LINEARS[3:])]
    assert quantization_config(both, [])["format"] == "int-quantized"


@pytest.mark.parametrize(("scheme", "options", "format", "weights", "inputs"), SPELLED)
def test_a_description_is_read_as_its_scheme(
    scheme: str, options: dict, format: str, weights: dict, inputs: dict | None
) -> None:
    chosen = plan(scheme, exclude=("*.down_proj",), **options)
    found = read_schemes(described(chosen), LINEARS)
    assert found == {**dict.fromkeys(LINEARS, chosen.distinct[0].scheme), DOWN: None}
    assert format_of(chosen.distinct[0].scheme) == format


def test_a_mixture_is_read_as_its_schemes() -> None:
    expected = {path: scheme for scheme, paths in MIXTURE for path in paths}
    found = read_schemes(quantization_config(MIXTURE, FLOATS), LINEARS)
    assert found == {**expected, **dict.fromkeys(FLOATS)}


def test_a_path_goes_before_every_linear_and_what_no_target_names_is_float() -> None:
    found = quantization_config(MIXTURE, [])
    assert read_schemes(found, LINEARS)[DOWN] is None
    found["config_groups"]["group_1"]["targets"] = ["Linear"]
    schemes = read_schemes(found, LINEARS)
    assert schemes[K_PROJ] == MIXTURE[0][0] and schemes[DOWN] == MIXTURE[1][0]


GROUP, WEIGHTS = ("config_groups", "group_0"), ("config_groups", "group_0", "weights")
REFUSED: list[tuple[tuple, Any, str]] = [
    (("config_groups",), None, r"config_groups is None, expected groups"),
    (("config_groups",), [], r"config_groups is \[\], expected groups"),
    (GROUP, 3, r"group_0 is 3, expected an object"),
    ((*GROUP, "kernel"), "marlin", r"group_0\.kernel is unknown, expected one of weights, in"),
    ((*GROUP, "targets"), "Linear", r"targets is 'Linear', expected a list"),
    ((*GROUP, "targets"), [["Linear"]], r"targets has \['Linear'\], expected a text"),
    ((*GROUP, "targets"), ["re:(a+)+$"], r"targets has the pattern '\(a\+\)\+\$', expected at"),
    ((*GROUP, "targets"), ["re:" + ".*a" * 7], r"expected at most 6 repetitions"),
    ((*GROUP, "targets"), ["re:" + "a" * 300], r"a pattern of 300 characters, expected at most"),
    (
        (*GROUP, "targets"),
        ["re:("],
        r"targets: the pattern '\(' is no .*\(missing \), unterminated",
    ),
    (("ignore",), "lm_head", r"ignore is 'lm_head', expected a list"),
    (WEIGHTS, None, r"group_0\.weights is null, expected arguments"),
    (WEIGHTS, [], r"group_0\.weights is \[\], expected arguments or null"),
    ((*WEIGHTS, "num_bits"), 3, r"weights\.num_bits is 3, expected 8 or 4 as in W8A16 or W4A16"),
    ((*WEIGHTS, "num_bits"), 4.0, r"weights\.num_bits is 4\.0, expected 8 or 4 as in W8"),
    ((*WEIGHTS, "actorder"), "group", r"weights\.actorder is 'group', expected null, 'static' or"),
    ((*WEIGHTS, "actorder"), True, r"weights\.actorder is True, expected null"),
    ((*WEIGHTS, "scale_dtype"), "torch.uint8", r"scale_dtype is 'torch\.uint8', expected null"),
    ((*WEIGHTS, "group_size"), 48, r"weights\.group_size is 48, expected 128 as in W4A16"),
    ((*WEIGHTS, "group_size"), [], r"weights\.group_size is \[\], expected 128 as in"),
    ((*WEIGHTS, "symmetric"), "yes", r"weights\.symmetric is 'yes', expected True as in W4A16"),
    ((*WEIGHTS, "type"), "float", r"weights\.type is 'float', expected 'int' as in W4A16"),
    ((*WEIGHTS, "dynamic"), True, r"weights\.dynamic is True, expected False as in W4A16"),
    ((*WEIGHTS, "is_mx"), True, r"weights\.is_mx is unknown, expected one of type, num_bits"),
    ((*GROUP, "format"), "int-quantized", r"format is 'int-quantized', expected 'pack-quant"),
    ((*GROUP, "format"), "nvfp4-pack-quantized", r"format is 'nvfp4-pack-quantized', expected one"),
    ((*GROUP, "input_activations"), TENSOR, r"weights\.num_bits is 4, expected 8 as in W8A8, the"),
    (
        (*GROUP, "input_activations"),
        8,
        r"group_0\.input_activations is 8, expected arguments or",
    ),
    ((*GROUP, "output_activations"), TENSOR, r"group_0\.output_activations is \{.*\}, expected nu"),
    (("kv_cache_scheme",), TENSOR, r"kv_cache_scheme is \{.*\}, expected null"),
    (("sparsity_config",), {"format": "sparse-24-bitmask"}, r"sparsity_config is \{'format': 'sp"),
    (
        ("transform_config",),
        {"config_groups": {"u": 1}},
        r"transform_config is \{.*\}, expected",
    ),
    (("quantization_status",), "initialized", r"quantization_status is 'initialized', expected"),
    (("cache",), 1, r"cache is unknown, expected one of config_groups, dequantize"),
]


@pytest.mark.parametrize(("where", "value", "message"), REFUSED)
def test_a_description_of_something_else_is_refused(where: tuple, value: Any, message: str) -> None:
    """The first key that differs is named, with both values, and no message is cut."""
    found = copy.deepcopy(described(plan("W4A16", group_size=32)))
    entry = found
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    with pytest.raises(MsQuantError, match=rf"^quantization_config: .*{message}") as raised:
        read_schemes(found, LINEARS)
    assert len(str(raised.value)) < 400


def test_a_path_in_two_groups_is_refused() -> None:
    found = quantization_config(MIXTURE, [])
    found["config_groups"]["group_1"]["targets"].append(K_PROJ)
    with pytest.raises(MsQuantError, match=rf"{K_PROJ}' is a target of several schemes"):
        read_schemes(found, LINEARS)


HELD = {"W8A8_DYNAMIC", "W8A16", "W4A16", "W8A8FP8_DYNAMIC", "W8A8FP8_BLOCK"}


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - HELD))
def test_schemes_that_no_format_holds_are_refused(name: str) -> None:
    layer, group, spec = given(plan("W8A16"), K_PROJ)
    with pytest.raises(MsQuantError, match=f"compressed-tensors format cannot hold scheme {name}"):
        format.check(replace(layer, scheme=SCHEMES[name]), group, spec, "x")


@pytest.mark.parametrize(
    ("scheme", "options", "shape", "message"),
    [
        ("W4A16", {"group_size": 0}, (32, 68), "x: 68 inputs, expected a multiple of 8 to pack co"),
        ("W8A16", {}, (32, 66), "x: 66 inputs, expected a multiple of 4 to pack codes of 8 bits"),
        ("W4A16", {"symmetric": False}, (36, 128), "x: 36 outputs, expected a multiple of 8 to"),
        ("W8A16", {"symmetric": False}, (34, 128), "x: 34 outputs, .* pack zero points of 8 bits"),
        ("W4A16", {}, (33, 128), ""),
        ("W8A8_DYNAMIC", {}, (33, 67), ""),
    ],
)
def test_a_shape_that_does_not_fill_words_is_refused(
    scheme: str, options: dict, shape: tuple[int, int], message: str
) -> None:
    layer, group, _ = given(plan("W8A16"), K_PROJ)
    layer = replace(layer, scheme=held(scheme, FORMAT, **options))
    if not message:
        format.check(layer, group, LinearSpec(*shape), "x")
        return
    with pytest.raises(MsQuantError, match=message):
        format.check(layer, group, LinearSpec(*shape), "x")


def test_a_group_that_does_not_divide_is_refused_by_the_plan() -> None:
    with pytest.raises(MsQuantError, match=r"groups of 128 do not divide K = 64"):
        plan("W4A16")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"smooth": np.ones(64, "f4")}, "smooth"),
        ({"activation": PerToken(8, 0.75)}, "clip_ratio"),
    ],
)
def test_what_has_no_tensor_is_refused(change: dict[str, Any], what: str) -> None:
    layer, group, _ = given(plan("W8A8_DYNAMIC"), K_PROJ)
    grid = AffineFormat().grid({"weight_scale": np.ones((32, 1), "f4")})
    linear = QuantizedLinear(np.zeros((32, 64), np.int8), grid)
    assert format.linear_tensor(layer, group, linear, "weight").shape == (32, 64)
    with pytest.raises(MsQuantError, match=f"has no place for {what} of a linear"):
        format.linear_tensor(layer, group, replace(linear, **change), "weight")
