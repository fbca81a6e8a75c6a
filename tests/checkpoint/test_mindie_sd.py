"""The mindie-sd format's tables, bytes and description against ones written by hand, there and
back bit for bit, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import given, with_layer

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.mindie_sd import format as mindie_sd
from ms_quant.formats.mindie_sd.reading import Tensors, read
from ms_quant.formats.mindie_sd.tensors import Layout, parts
from ms_quant.formats.mindie_sd.types import TYPES, check_type, description_name, weights_name
from ms_quant.models.config import parse_config
from ms_quant.numerics.activation import ObservedRange, StaticActivation
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear, smooth_of, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.layer import layer_plan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import ScaleType
from ms_quant.schemes.table import SCHEMES, get_scheme

F32, BF16, FP16 = DTYPES["float32"], DTYPES["bfloat16"], DTYPES["float16"]
RAW = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 1088,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
WHOLE = {"W8A16": {"group_size": 0}, "W4A16": {"group_size": 0}}
DECODER = [name for name in TYPES if name not in ("W8A8", "W8A8_TIMESTEP", "W4A4_DYNAMIC")]


def plan(scheme: str, dtype: np.dtype = BF16, raw: dict | None = None, **options: Any) -> Plan:
    """A plan of any scheme, as a checkpoint tells it: also of linears that the runtime fails on."""
    config = parse_config({**RAW, **(raw or {})})
    algorithm = "smoothquant" if options.pop("smooths", False) else "minmax"
    bare = TYPES[scheme].needs_bias
    choices = {
        "scheme_options": WHOLE.get("W8A16" if bare else scheme, options),
        "format": "mindie-sd",
    }
    made = make_plan(
        config,
        "W8A16" if bare else scheme,
        "minmax" if bare else algorithm,
        dtype=dtype,
        **choices,
    )
    if not bare:
        return made
    layer = layer_plan(scheme, algorithm, dtype, options=options, format="mindie-sd")
    return with_layer(made, layer)


def table(chosen: Plan, path: str) -> dict[str, str]:
    found = mindie_sd.linear_plan(*given(chosen, path))
    return {suffix: f"{dtype} {list(size)}" for suffix, (dtype, size) in found.items()}


PLAIN = {"weight": "int8 [32, 64]"}
STATIC = {
    **PLAIN,
    "input_scale": "bfloat16 [1]",
    "input_offset": "float32 [1]",
    "deq_scale": "float32 [32]",
    "quant_bias": "int32 [32]",
}
NARROW = {**PLAIN, "weight_scale": "bfloat16 [32, 1]"}
MX = {"weight_scale": "uint8 [32, 2]"}
TABLES: dict[str, dict[str, str]] = {
    "W8A16": NARROW,
    "W4A16": NARROW,
    "W8A8_DYNAMIC": NARROW,
    "W8A8_PER_CHANNEL": STATIC,
    "W8A8_PER_TENSOR": STATIC,
    "W8A8_MXFP8": {"weight": "float8_e4m3fn [32, 64]", **MX},
    "W4A4_MXFP4": {"weight": "uint8 [32, 32]", **MX},
    "W4A4_MXFP4_DUALSCALE": {
        "weight": "uint8 [32, 32]",
        **MX,
        "weight_dual_scale": "float32 [32, 1, 1]",
    },
}


@pytest.mark.parametrize("scheme", DECODER)
def test_tensors_of_a_linear_with_a_bias(scheme: str) -> None:
    assert table(plan(scheme), K_PROJ) == TABLES[scheme]
    if TYPES[scheme].smooths:
        smoothed = {f"linear.{suffix}": entry for suffix, entry in TABLES[scheme].items()}
        found = table(plan(scheme, smooths=True), K_PROJ)
        assert found == {"div.mul_scale": "bfloat16 [64]", **smoothed}


def test_float16_models_and_linears_without_a_bias() -> None:
    assert table(plan("W8A8_PER_CHANNEL", FP16), K_PROJ) == {
        **STATIC,
        "input_scale": "float32 [1]",
        "deq_scale": "int64 [32]",
    }
    assert table(plan("W8A8_DYNAMIC", FP16), K_PROJ)["weight_scale"] == "float16 [32, 1]"
    assert table(plan("W4A4_DYNAMIC", raw={"model_type": "llama"}), K_PROJ) == {
        **PLAIN,
        "weight_scale": "bfloat16 [32, 1]",
    }
    without = {name for name in DECODER if "bias" not in table(plan(name), DOWN)}
    assert set(DECODER) - without == {"W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE"}
    dual = table(plan("W4A4_MXFP4_DUALSCALE"), DOWN)
    assert dual["weight_dual_scale"] == "float32 [64, 3, 1]"
    assert (dual["weight_scale"], dual["bias"]) == ("uint8 [64, 34]", "float32 [64]")


def test_tensors_of_timesteps() -> None:
    for dtype, input_scale, deq_scale in [
        (F32, "float32", "float32"),
        (BF16, "bfloat16", "float32"),
        (FP16, "float32", "int64"),
    ]:
        made = parts(Layout("W8A8_TIMESTEP", (5, 3), dtype, bias=True, steps=7))
        assert {suffix: f"{p.dtype} {list(p.shape)}" for suffix, p in made.items()} == {
            "weight": "int8 [5, 3]",
            "input_scale": f"{input_scale} [7, 1]",
            "input_offset": "float32 [7, 1]",
            "deq_scale": f"{deq_scale} [7, 5]",
            "quant_bias": "int32 [7, 5]",
            "weight_scale": f"{dtype} [5, 1]",
            "bias": f"{dtype} [5]",
        }


CODES = np.array([[1, -1, 7, -8], [0, 2, -3, 4]], np.int8)
GRID = AffineFormat().grid({"weight_scale": np.float32([[0.25], [1]])})


def made(type: str, linear: QuantizedLinear, dtype: np.dtype = F32, **more: Any):
    layout = Layout(type, linear.weight.shape, dtype, bias=linear.bias is not None, **more)
    return {suffix: part.make(linear).tolist() for suffix, part in parts(layout).items()}


def test_int4_is_not_packed_and_float4_is() -> None:
    four = AffineFormat(4).grid({"weight_scale": np.float32([[0.25], [1]])})
    stored = {"weight": CODES.tolist(), "weight_scale": [[0.25], [1]]}
    assert made("W4A16", QuantizedLinear(CODES, four)) == stored
    assert made("W4A4_DYNAMIC", QuantizedLinear(CODES, four)) == stored
    codes, exponents = np.uint8([[1, 9, 7, 15]]), {"weight_exponent": np.uint8([[130]])}
    grid = SCHEMES["W4A4_MXFP4"].weight.grid(exponents)
    found = made("W4A4_MXFP4", QuantizedLinear(codes, grid))
    assert found == {"weight": [[0x91, 0xF7]], "weight_scale": [[130]]}
    dual = {**exponents, "weight_dual_scale": np.float32([[3]])}
    grid = SCHEMES["W4A4_MXFP4_DUALSCALE"].weight.grid(dual)
    found = made("W4A4_MXFP4_DUALSCALE", QuantizedLinear(codes, grid))
    assert found == {
        "weight": [[0x91, 0xF7]],
        "weight_scale": [[130]],
        "weight_dual_scale": [[[3]]],
        "bias": [0],
    }


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_static_numbers(dtype: np.dtype) -> None:
    static = StaticActivation(np.float32(0.5), -3, np.full(4, 0.5, "f4"), folds_bias=True)
    linear = QuantizedLinear(CODES, GRID, np.float32([1, -0.3]), static)
    found = made("W8A8_PER_CHANNEL", linear, dtype)
    bits = [0x3E000000, 0x3F000000]
    assert found == {
        "weight": CODES.tolist(),
        "input_scale": [0.5],
        "input_offset": [-3],
        "deq_scale": bits if dtype == FP16 else [0.125, 0.5],
        "quant_bias": [-3 + 8, 9 - 1],  # sums -1 and 3; 3 * sum, + 1 / 0.125, - 0.3 / 0.5
        "bias": [1, np.float32(-0.3)],
    }


def test_numbers_of_timesteps() -> None:
    """The second of them was not reached by calibration."""
    steps = TimestepActivation(np.float32([0.5, 0, 2]), np.int8([-3, 0, 4]))
    bias = np.float32([1, -0.3]).astype(FP16).astype("f4")
    linear = QuantizedLinear(CODES, GRID, bias, steps)
    found = made("W8A8_TIMESTEP", linear, FP16, steps=3)
    assert found["input_scale"] == [[0.5], [0], [2]]
    assert found["input_offset"] == [[-3], [0], [4]]
    assert found["deq_scale"] == [[0x3E000000, 0x3F000000], [0, 0], [0x3F000000, 0x40000000]]
    assert found["quant_bias"] == [[-3 + 8, 9 - 1], [0, 0], [4 + 2, -12]]
    assert found["weight_scale"] == [[0.25], [1]]


def test_smoothing_is_stored_as_its_reciprocal() -> None:
    smooth = np.float32([0.5, 3, 8, 1])
    linear = QuantizedLinear(CODES, GRID, smooth=smooth)
    found = made("W8A8_DYNAMIC", linear, smooths=True)
    assert found == {
        "div.mul_scale": [2, np.float32(1) / np.float32(3), 0.125, 1],
        "linear.weight": CODES.tolist(),
        "linear.weight_scale": [[0.25], [1]],
    }
    assert made("W8A8_DYNAMIC", replace(linear, smooth=None), smooths=True)["div.mul_scale"] == [
        1,
        1,
        1,
        1,
    ]


def test_reciprocals_are_exact_there_and_back() -> None:
    every = np.arange(0x3F800000, 0x40800000, 997, dtype=np.uint32).view(np.float32)  # 1 to 4
    for factors in (every, 1 / every, every[:3]):
        linear = QuantizedLinear(CODES, GRID, smooth=smooth_of(factors))
        np.testing.assert_array_equal(linear.mul_scale, factors)
    assert smooth_of(np.float32([0.5, 4])).dtype == np.float32


def random_linear(
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: np.dtype,
    bias: bool,
    scale_type: ScaleType = ScaleType.MODEL,
    seed: int = 0,
) -> QuantizedLinear:
    """Exact in the type, as quantizing for it makes them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape, np.float32)
    weight[0] = 0
    grid = scheme.weight.fit(weight, "w", scale_type.dtype(dtype))
    steps = (3,) if scheme.name == "W8A8_TIMESTEP" else ()
    ends = np.full((*steps, shape[1]), -2.7, "f4"), np.full((*steps, shape[1]), 4.1, "f4")
    seen = None if scheme.activation.dynamic else ObservedRange(*ends, dtype, "x")
    given = rng.standard_normal(shape[0], np.float32).astype(dtype).astype("f4") if bias else None
    activation = scheme.activation.fit(seen, None)
    return QuantizedLinear(grid.round(weight), grid, given, activation, input_dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("type", "smooths", "bias"),
    [
        (type, smooths, bias)
        for type, row in TYPES.items()
        for smooths in (False, row.smooths)
        for bias in (False, not row.drops_bias)
    ],
)
def test_what_is_read_computes_the_same(
    type: str, smooths: bool, dtype: np.dtype, bias: bool, tmp_path: Path
) -> None:
    row = TYPES[type]
    scheme = row.make()
    for shape in [(1, 2), (7, 34), (3, 1030)]:
        linear = random_linear(scheme, shape, dtype, bias)
        if smooths:
            rng = np.random.default_rng(3)
            smooth = np.exp(rng.standard_normal(shape[1], np.float32))
            linear = replace(linear, smooth=stable_smooth(smooth, dtype))
        steps = 3 if type == "W8A8_TIMESTEP" else 0
        tables = parts(Layout(type, shape, dtype, smooths, bias, steps))
        plans = [TensorPlan(f"a.b.{n}", part.dtype, part.shape) for n, part in tables.items()]
        write_file(
            tmp_path / "model.safetensors",
            plans,
            lambda plan, t=tables, x=linear: t[plan.name.removeprefix("a.b.")].make(x),
        )
        found = read(type, Tensors(Checkpoint(tmp_path)), "a.b", shape, dtype)
        x = np.random.default_rng(1).standard_normal((5, shape[1]), np.float32)
        np.testing.assert_array_equal(found.weight, linear.weight)
        for step in range(steps or 1):
            for static in {None, step if steps else None}:
                np.testing.assert_array_equal(
                    found.forward(x, step=static).view(np.uint32),
                    (linear.forward(x, step=static) + np.float32(0)).view(np.uint32)
                    if row.needs_bias and not bias
                    else linear.forward(x, step=static).view(np.uint32),
                )


def test_scales_that_a_type_does_not_hold_are_refused() -> None:
    linear = QuantizedLinear(CODES, AffineFormat().grid({"weight_scale": np.float32([[0.1], [1]])}))
    part = parts(Layout("W8A8_DYNAMIC", (2, 4), BF16, name="a.b"))["weight_scale"]
    with pytest.raises(
        MsQuantError, match=r"a\.b\.weight_scale: 1 of 2 values are not exact in bf"
    ):
        part.make(linear)


def written(chosen: Plan, path: str, linear: QuantizedLinear, file: Path, **change: Any) -> None:
    layer, group, spec = given(chosen, path)
    shapes = mindie_sd.linear_plan(layer, group, spec)
    arrays = {s: mindie_sd.linear_tensor(layer, group, linear, s) for s in shapes}
    if linear.bias is not None:
        arrays["bias"] = linear.bias.astype(mindie_sd.bias_dtype(layer, path))
    arrays |= change
    assert {s: (a.dtype, a.shape) for s, a in arrays.items() if s in shapes} == shapes
    plans = [TensorPlan(f"{path}.{s}", a.dtype, a.shape) for s, a in arrays.items()]
    write_file(file, plans, lambda tensor: arrays[tensor.name.removeprefix(f"{path}.")])


@pytest.mark.parametrize("path", [K_PROJ, DOWN])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("scheme", DECODER)
def test_decoders_there_and_back(scheme: str, dtype: np.dtype, path: str, tmp_path: Path) -> None:
    chosen = plan(scheme, dtype)
    layer, group, spec = given(chosen, path)
    scales = layer.storage.scale_type
    linear = random_linear(layer.scheme, spec.shape, dtype, path == K_PROJ, scales)
    written(chosen, path, linear, tmp_path / "model.safetensors")
    found = mindie_sd.read_linear(layer, group, spec, Checkpoint(tmp_path), path, linear.bias)
    x = np.random.default_rng(1).standard_normal((5, spec.in_features), np.float32)
    np.testing.assert_array_equal(found.forward(x), linear.forward(x))
    assert (found.bias is None) == (linear.bias is None)


def test_a_wrong_quant_bias_is_found(tmp_path: Path) -> None:
    chosen = plan("W8A8_PER_CHANNEL")
    layer, group, spec = given(chosen, K_PROJ)
    linear = random_linear(layer.scheme, (32, 64), BF16, True, layer.storage.scale_type)
    wrong = mindie_sd.linear_tensor(layer, group, linear, "quant_bias") + 0
    wrong[3] += 1
    written(chosen, K_PROJ, linear, tmp_path / "model.safetensors", quant_bias=wrong)
    with pytest.raises(MsQuantError, match=r"k_proj\.quant_bias: 1 of 32 values differ from what"):
        mindie_sd.read_linear(layer, group, spec, Checkpoint(tmp_path), K_PROJ, linear.bias)


def test_a_bias_of_zeros_is_none_but_another_is_refused(tmp_path: Path) -> None:
    chosen = plan("W8A8_MXFP8")
    layer, group, spec = given(chosen, DOWN)
    linear = random_linear(layer.scheme, (64, 1088), BF16, False, layer.storage.scale_type)
    written(chosen, DOWN, linear, tmp_path / "model.safetensors", bias=np.ones(64, "f4"))
    with pytest.raises(
        MsQuantError, match=r"down_proj\.bias: the layer has no bias, expected none"
    ):
        mindie_sd.read_linear(layer, group, spec, Checkpoint(tmp_path), DOWN, None)


def test_what_has_no_tensor_is_refused() -> None:
    layer, group, _ = given(plan("W8A8_DYNAMIC"), K_PROJ)
    linear = replace(random_linear(layer.scheme, (32, 64), BF16, True), smooth=np.ones(64, "f4"))
    with pytest.raises(MsQuantError, match="has no place for smooth of a linear here"):
        mindie_sd.linear_tensor(layer, group, linear, "weight")
    found = mindie_sd.linear_tensor(layer, group, linear, "linear.weight")
    np.testing.assert_array_equal(found, linear.weight)


def test_description_by_hand() -> None:
    chosen = plan("W8A8_PER_CHANNEL", raw={"model_type": "llama"})
    parts = [(K_PROJ, suffix) for suffix in ("weight", "quant_bias", "bias")]
    parts += [(DOWN, suffix) for suffix in ("div.mul_scale", "linear.weight", "linear.bias")]
    tensors = [TensorPlan(".".join(part), F32, (1,), part) for part in parts]
    found = mindie_sd.describe(chosen, [TensorPlan("model.norm.weight", F32, (1,)), *tensors])
    assert found == {
        "model_quant_type": "W8A8_PER_CHANNEL",
        "model.norm.weight": "FLOAT",
        f"{K_PROJ}.weight": "W8A8_PER_CHANNEL",
        f"{K_PROJ}.quant_bias": "W8A8_PER_CHANNEL",
        f"{K_PROJ}.bias": "FLOAT",
        f"{DOWN}.div.mul_scale": "FLOAT",
        f"{DOWN}.linear.weight": "W8A8_PER_CHANNEL",
        f"{DOWN}.linear.bias": "FLOAT",
        "lm_head.weight": "FLOAT",
    }


def test_file_names() -> None:
    assert description_name("W4A4_MXFP4_DUALSCALE", 0) == (
        "quant_model_description_w4a4_mxfp4_dualscale_0.json"
    )
    assert weights_name("W8A8_TIMESTEP", 12) == "quant_model_weight_w8a8_timestep_12.safetensors"
    chosen = plan("W8A8_PER_CHANNEL")
    assert mindie_sd.document(chosen) == "quant_model_description_w8a8_per_channel.json"
    assert mindie_sd.weights(chosen) == "quant_model_weight_w8a8_per_channel.safetensors"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("w8a16", "W8A16"), ("float", "FLOAT"), ("W8A8_PER_CHANNEL_PER_TOKEN", "W8A8")],
)
def test_names_in_any_case(value: str, expected: str) -> None:
    assert check_type(value, "x") == expected


def other(scheme: str, **options: Any) -> Plan:
    """A plan of a scheme that the format does not hold."""
    made = plan("W8A16")
    layer = replace(made.distinct[0], scheme=get_scheme(scheme, **options))
    return with_layer(made, layer)


def checked(chosen: Plan, path: str = K_PROJ) -> Callable[[], None]:
    return lambda: mindie_sd.check(*given(chosen, path), f"{path}.weight")


REFUSALS: list[tuple[Callable[[], None], str]] = [
    (checked(other("W8A8")), r"k_proj\.weight: scheme W8A8 has an input scale for each channel"),
    (checked(other("W8A8_MIX")), "MindIE-SD serves no scheme W8A8_MIX, expected one of W8A16"),
    (checked(other("W4A8_DYNAMIC")), "MindIE-SD serves no scheme W4A8_DYNAMIC"),
    (checked(other("W4A8_MXFP")), "MindIE-SD serves no scheme W4A8_MXFP"),
    (checked(other("W8A8FP8_DYNAMIC")), "MindIE-SD serves no scheme W8A8FP8_DYNAMIC"),
    (checked(other("W4A4_MXFP4_SVD")), "MindIE-SD serves no scheme W4A4_MXFP4_SVD"),
    (
        checked(other("W4A16", group_size=32)),
        "group_size is 32, MindIE-SD reads scheme W4A16 only with group_size=0 and symmetric=True",
    ),
    (
        checked(other("W8A16", symmetric=False)),
        "symmetric is False, MindIE-SD reads scheme W8A16 only with group_size=0",
    ),
    (
        checked(other("W4A4_MXFP4_DUALSCALE", dual_block_size=32)),
        "dual_block_size is 32, MindIE-SD reads .* only with dual_block_size=512",
    ),
    (
        checked(other("W4A4_DYNAMIC")),
        "k_proj: MindIE-SD drops the bias of a W4A4_DYNAMIC linear, expected one without a bias",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call: Callable[[], None], message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        call()


@pytest.mark.parametrize("scheme", [*DECODER, "W4A4_DYNAMIC"])
def test_what_is_served_is_not_refused(scheme: str) -> None:
    checked(plan(scheme, raw={"model_type": "llama"}), DOWN)()


def test_the_rule_of_microscaling_weights_may_be_any() -> None:
    checked(plan("W8A8_MXFP8", rule="mxfp8_msmodelslim_mse_round"), DOWN)()
