"""Loading MindIE-SD's files into a network: the rules of its lookup, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, communication, nn
from mindspore.communication import GlobalComm

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

BF16 = ml_dtypes.bfloat16
CODES = np.array([[127, -1, 3, -128], [0, 2, -3, 4]], np.int8)
SCALE = np.array([[0.5], [0.25]], np.float32)
X = np.array([[127, 1, -2, 0], [0, 0, 0, 254]], np.float32)
Files = dict[str, Any]


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


class Net(nn.Cell):
    def __init__(self, bias: bool = False):
        super().__init__()
        self.a = nn.Dense(4, 2, has_bias=bias)
        self.b = nn.Dense(2, 3)

    def construct(self, x):
        return self.b(self.a(x))


@pytest.fixture
def put(tmp_path: Path, save_tensors: Callable) -> Callable[..., Path]:
    """``put(entries, tensors, type)`` writes both files and gives the description's path."""

    def write(
        entries: dict[str, Any], tensors: dict[str, np.ndarray], type: str = "W8A8_DYNAMIC"
    ) -> Path:
        name = type.lower() if isinstance(type, str) else "x"
        path = tmp_path / f"quant_model_description_{name}.json"
        path.write_text(json.dumps({**entries, "model_quant_type": type}))
        save_tensors(tmp_path / f"quant_model_weight_{name}.safetensors", tensors)
        return path

    return write


REST = {"b.weight": "FLOAT", "b.bias": "FLOAT"}
DYNAMIC = {"a.weight": CODES, "a.weight_scale": SCALE}
STATIC = {
    "a.weight": CODES,
    "a.input_scale": np.array([0.5], BF16),
    "a.input_offset": np.array([-3], np.float32),
    "a.deq_scale": np.array([0.125, 2], np.float32),
    "a.quant_bias": np.array([3 * 1 + 8, 3 * 3 - 1], np.int32),
}
TIMESTEP = {
    "a.weight": CODES,
    "a.weight_scale": SCALE,
    "a.input_scale": np.array([[0.5], [2], [0]], np.float32),
    "a.input_offset": np.array([[0], [-3], [0]], np.float32),
    "a.deq_scale": np.array([[0.25, 0.125], [1, 0.5], [0, 0]], np.float32),
    "a.quant_bias": np.array([[0, 0], [3, 9], [0, 0]], np.int32),
}
MXFP8 = {
    "a.weight": np.array([[1, 2, -4, 448], [0, 0.5, 1, 1]], ml_dtypes.float8_e4m3fn),
    "a.weight_scale": np.array([[127], [128]], np.uint8),
    "a.bias": np.zeros(2, np.float32),
}
MXFP4 = {
    "a.weight": np.array([[0x21, 0xF0], [0x07, 0x9A]], np.uint8),
    "a.weight_scale": np.array([[127], [128]], np.uint8),
}
MXFP4_VALUES = np.array([[0.5, 1, 0, -6], [12, 0, -2, -1]])
GOLDEN: list[tuple[str, dict[str, np.ndarray], Any]] = [
    ("W8A16", DYNAMIC, X @ (CODES * SCALE).T),
    ("W4A16", {**DYNAMIC, "a.weight": CODES // 16}, X @ (CODES // 16 * SCALE).T),
    # scales 1 and 2; codes as x, and 0 0 0 127
    ("W8A8_DYNAMIC", DYNAMIC, [[0.5 * (127 * 127 - 1 - 6), 2], [-127 * 128, 127 * 4 * 0.5]]),
    # codes 127 (clipped), -1, -7, -3 and -3 -3 -3 127 (clipped)
    (
        "W8A8",
        STATIC,
        [[(127 * 127 + 1 - 21 + 384 + 11) / 8, 2 * (-2 + 21 - 12 + 8)]]
        + [[(-381 + 3 - 9 - 128 * 127 + 11) / 8, 2 * (-6 + 9 + 508 + 8)]],
    ),
    # 127 / 2**-2 and 254 / 2**-1 saturate at 448, which is 112 and 224
    ("W8A8_MXFP8", MXFP8, [[112 + 2 + 8, 2 * (0.5 - 2)], [448 * 224, 2 * 224]]),
]


@pytest.mark.parametrize(("type", "tensors", "expected"), GOLDEN)
def test_values_by_hand(type: str, tensors: dict, expected: Any, put: Callable) -> None:
    path = put({"a.weight": type, **REST}, tensors, type)
    network = ms_quant.quantize(Net(), str(path))
    assert isinstance(network.a, QuantLinear) and network.b.cls_name == "Dense"
    np.testing.assert_array_equal(network.a(Tensor(X)).asnumpy(), np.asarray(expected, "f4"))


@pytest.mark.parametrize("packed", [True, False])
def test_fp4_by_hand(packed: bool, put: Callable) -> None:
    tensors = dict(MXFP4)
    if not packed:
        values = MXFP4_VALUES / [[1], [2]]
        tensors["a.weight"] = values.astype(ml_dtypes.float8_e4m3fn)
    path = put({"a.weight": "W4A4_MXFP4", **REST}, tensors, "W4A4_MXFP4")
    x = np.array([[6, 1, -2, 0], [0, 0, 0, 12]], np.float32)  # exact in MXFP4
    found = ms_quant.quantize(Net(), path).a(Tensor(x)).asnumpy()
    np.testing.assert_array_equal(found, x @ MXFP4_VALUES.T)
    dual = {"a.weight_dual_scale": np.array([[[0.5]], [[2]]], np.float32)}
    kind = "W4A4_MXFP4_DUALSCALE"
    path = put({"a.weight": kind, **REST}, {**tensors, **dual}, kind)
    x = np.array([[6, 1, -2, 0], [0, 0, 0, 36]], np.float32)  # first levels 1 and 6
    found = ms_quant.quantize(Net(), path).a(Tensor(x)).asnumpy()
    np.testing.assert_array_equal(found, x @ (MXFP4_VALUES * [[0.5], [2]]).T)


def test_timesteps_by_hand(put: Callable) -> None:
    path = put({"a.weight": "W8A8_TIMESTEP", **REST}, TIMESTEP, "W8A8_TIMESTEP")
    policy = TimestepPolicyConfig()
    policy.register([0, 1, 2], "static", "w8a8_static_linear")
    network = ms_quant.quantize(Net(), path, timestep_policy=policy)
    assert TimestepManager.get_timestep_idx_max() == 3
    x = Tensor(np.array([[2, 4, -2, 0]], np.float32))
    TimestepManager.set_timestep_idx(0)  # codes 4 8 -4 0
    np.testing.assert_array_equal(network.a(x).asnumpy(), [[0.25 * 488, 0.125 * 28]])
    TimestepManager.set_timestep_idx(1)  # codes -2 -1 -4 -3
    np.testing.assert_array_equal(network.a(x).asnumpy(), [[-254 + 1 - 12 + 384 + 3, 0.5 * 7]])
    TimestepManager.set_timestep_idx(2)
    with pytest.raises(MsQuantError, match="timestep 2 is static but calibration did not reach"):
        network.a(x)
    policy.register(2, "dynamic", "w8a8_static_linear")  # scale 4/127: codes 64 (63.5) 127 -64 0
    scale = np.float32(4) / np.float32(127)
    expected = np.float32([64 * 127 - 127 - 192, 254 + 192]) * scale * SCALE[:, 0]
    np.testing.assert_array_equal(network.a(x).asnumpy()[0], expected)
    with pytest.raises(MsQuantError, match=r"timestep_idx: 3, expected 0\.\.2"):
        TimestepManager.set_timestep_idx(3)  # the original lets T pass


def test_tables_of_timesteps_are_used_as_stated(put: Callable, tmp_path: Path) -> None:
    """Writers that round scales to bfloat16 after the product leave tables that no scales give."""
    stated = {
        "a.deq_scale": TIMESTEP["a.deq_scale"] * np.float32(1.003),
        "a.quant_bias": TIMESTEP["a.quant_bias"] + np.int32([[0, 5], [0, 5], [0, 0]]),
    }
    tensors = {**TIMESTEP, **stated, "a.bias": np.array([0, 0.6], np.float32)}
    path = put({"a.weight": "W8A8_TIMESTEP", **REST}, tensors, "W8A8_TIMESTEP")
    policy = TimestepPolicyConfig("static")
    network = ms_quant.quantize(Net(bias=True), path, timestep_policy=policy)
    x = Tensor(np.array([[2, 4, -2, 0]], np.float32))
    TimestepManager.set_timestep_idx(0)
    expected = np.float32([488, 28 + 5]) * stated["a.deq_scale"][0]
    np.testing.assert_array_equal(network.a(x).asnumpy()[0], expected)
    again = ms_quant.save_quantized(network, tmp_path / "again")
    fresh = ms_quant.quantize(Net(bias=True), again, timestep_policy=policy)
    np.testing.assert_array_equal(fresh.a(x).asnumpy()[0], expected)


def test_quant_bias_counts_whatever_the_bias_says(put: Callable, tmp_path: Path) -> None:
    """Also where no float32 bias has that many steps, and in every type of deq_scale."""
    units = 3 * np.array([1, 3], np.int32) + np.array([2**29 + 33, -1], np.int32)
    deq = np.float32([0.3, 0.7])
    for stored in (deq, deq.view(np.int32).astype(np.int64)):
        tensors = {**STATIC, "a.quant_bias": units, "a.deq_scale": stored}
        tensors["a.bias"] = np.ones(2, np.float32)
        path = put({"a.weight": "W8A8", **REST}, tensors, "W8A8")
        network = ms_quant.quantize(Net(bias=True), path)
        assert network.a.quant_bias.asnumpy().tolist() == units.tolist()
        np.testing.assert_array_equal(network.a.deq_scale.asnumpy(), deq)
        again = ms_quant.save_quantized(network, tmp_path / "again", dtype="float16")
        fresh = ms_quant.quantize(Net(bias=True), again)
        x = Tensor(X)
        np.testing.assert_array_equal(fresh.a(x).asnumpy(), network.a(x).asnumpy())


def test_mul_scale_multiplies(put: Callable) -> None:
    """Also a factor that is the reciprocal of no float32."""
    odd = np.float32(1) - np.float32(2.0**-24)
    factor = np.array([0.5, 2, 4, odd], np.float32)
    assert np.float32(1) / (np.float32(1) / odd) != odd
    wrapped = {f"a.linear.{name[2:]}": array for name, array in DYNAMIC.items()}
    entries = {"a.linear.weight": "w8a8_dynamic", "a.div.mul_scale": "FLOAT", **REST}
    path = put(entries, {**wrapped, "a.div.mul_scale": factor})
    network = ms_quant.quantize(Net(), path)
    np.testing.assert_array_equal(network.a.mul_scale.asnumpy(), factor)
    x = np.array([[254, 1, 0.25, 0]], np.float32)  # becomes 127, 2, 1, 0
    np.testing.assert_array_equal(network.a(Tensor(x)).asnumpy(), [[0.5 * (16129 - 2 + 3), 0.25]])


@pytest.mark.parametrize(
    ("entries", "quantized"),
    [
        ({"a.weight": "W8A8_DYNAMIC"}, True),
        ({"a": "w8a8_dynamic"}, True),
        ({"a.linear.weight": "W8a8_Dynamic", "a.weight": "W8A16"}, True),
        ({"a.weight": "W8A8_DYNAMIC", "a": "W8A16"}, True),
        ({"a.weight": "W8A8_DYNAMIC", "a": "FLOAT"}, False),
        ({"a.linear.weight": "FLOAT", "a.weight": "W8A8_DYNAMIC"}, False),
        ({"a.quant_type": "FLOAT", "a.weight": "W8A8_DYNAMIC"}, False),
        ({"a.fa_q.scale": "FLOAT", "a": "W8A8_DYNAMIC"}, False),
        ({"a.bias": "FLOAT", "a.weight": "W8A8_DYNAMIC", "norm.weight": "FLOAT"}, True),
    ],
)
def test_the_first_key_counts_and_float_before_all(
    entries: dict, quantized: bool, put: Callable
) -> None:
    tensors = {f"b.{name[2:]}": np.ones((3, 2), array.dtype) for name, array in DYNAMIC.items()}
    tensors["b.weight_scale"] = np.ones((3, 1), np.float32)
    tensors["b.bias"] = np.ones(3, np.float32)
    if quantized:
        tensors |= DYNAMIC
    path = put({**entries, "b.weight": "W8A8_DYNAMIC", "version": "1.0.0"}, tensors)
    network = ms_quant.quantize(Net(), path)
    assert isinstance(network.b, QuantLinear)
    assert isinstance(network.a, QuantLinear) == quantized
    if quantized:
        assert "dynamic input" in repr(network.a)  # W8A16 says float
        np.testing.assert_array_equal(network.a(Tensor(X)).asnumpy(), GOLDEN[2][2])


def entry(value: Any) -> Callable[[Files], None]:
    return lambda files: files["entries"].update({"a.weight": value})


def extra(**entries: Any) -> Callable[[Files], None]:
    return lambda files: files["entries"].update(
        {key.replace("__", "."): value for key, value in entries.items()}
    )


def tensor(name: str, array: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files["tensors"].pop(name, None)
        if array is not None:
            files["tensors"][name] = array

    return change


def kind(type: str, tensors: dict) -> Callable[[Files], None]:
    return lambda files: files.update(
        entries={"a.weight": type, **REST}, tensors=dict(tensors), type=type
    )


def both(*changes: Callable[[Files], None]) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for one in changes:
            one(files)

    return change


def wrapped(type: str, tensors: dict) -> Callable[[Files], None]:
    inner = {f"a.linear.{name[2:]}": array for name, array in tensors.items()}
    return kind(type, {**inner, "a.div.mul_scale": np.ones(4, np.float32)})


NAN = np.array([[np.nan], [1]], np.float32)
REFUSALS: list[tuple[Callable[[Files], None], str]] = [
    (entry("W4A16_AWQ"), "a.weight is 'W4A16_AWQ': MindIE-SD leaves such layers float"),
    (entry("w8a16_gptq"), "a.weight is 'w8a16_gptq': MindIE-SD leaves .* expected plain W8A16"),
    (entry("W4A16_GPTQ"), "MindIE-SD leaves such layers float"),
    (entry("W4A8_AWQ"), "MindIE-SD leaves such layers float"),
    (entry("W4A4_MXFP4_SVD"), "'W4A4_MXFP4_SVD': MindIE-SD supports no low-rank branch"),
    (entry("W4A4_MXFP4_DYNAMIC"), "reads this type under the name W4A4_MXFP4 only"),
    (entry("W4A8_DYNAMIC"), "is 'W4A8_DYNAMIC', expected one of W8A16, W4A16"),
    (entry("FP8_DYNAMIC"), "a.weight is 'FP8_DYNAMIC': is a type of attention, expected one of a"),
    (entry(8), r"a.weight is 8 \(int\), expected the name of a quantization type"),
    (extra(attn__fa_q__scale="FAQuant"), "attn is attention in FAQUANT but the network has no"),
    (extra(attn__quant_type="W8A8"), "attn.quant_type is 'W8A8', expected a type of attention"),
    (
        extra(attn__quant_type="FP8_DYNAMIC", attn="MXFP4_DYNAMIC"),
        "attn is 'MXFP4_DYNAMIC', expected FP8_DYNAMIC as another entry",
    ),
    (extra(kv_cache_type="C8"), "kv_cache_type is 'C8', a quantized cache is not read here"),
    (extra(c__weight="W8A16"), "c.weight is W8A16 but the network has no such linear.* such as a"),
    (extra(axe__weight="W8A16"), "axe.weight is W8A16 but the network has no such linear"),
    (lambda f: f["entries"].pop("b.weight"), "names no 'b.weight', expected a type or FLOAT for"),
    (lambda f: f["entries"].update({"a.weight": "FLOAT"}), "quantizes none of the network's"),
    (lambda f: f.update(type=7), r"model_quant_type is 7 \(int\), expected the name"),
    (lambda f: f.update(type="W8A17"), "model_quant_type is 'W8A17', expected one of"),
    (lambda f: f.update(type="w8a8_dynamic"), "is 'w8a8_dynamic', which MindIE-SD fails on, exp"),
    (lambda f: f.update(type="FLOAT"), "model_quant_type is 'FLOAT', which MindIE-SD fails on"),
    (entry("W8A8_PER_TOKEN_PER_CHANNEL"), "'W8A8_PER_TOKEN_PER_CHANNEL', expected one of W8A16"),
    (entry("W16A16"), "a.weight is 'W16A16', expected one of W8A16"),
    (lambda f: f.update(type="W4A4_MXFP4_SVD"), "model_quant_type is .* no low-rank branch"),
    (tensor("a.weight", None), "has no tensor 'a.weight', expected I8 .2, 4. of a W8A8_DYNAMIC"),
    (tensor("a.weight_scale", None), "has no tensor 'a.weight_scale', expected F32 or F16 or"),
    (tensor("a.weight", CODES.T.copy()), r"'a.weight' is I8 \[4, 2\], expected I8 \[2, 4\]"),
    (tensor("a.weight", SCALE), r"'a.weight' is F32 \[2, 1\], expected I8 \[2, 4\]"),
    (tensor("a.weight_scale", np.ones((2, 2), "f4")), r"is F32 \[2, 2\], expected .* \[2, 1\]"),
    (tensor("a.weight_scale", -SCALE), "weight_scale': 2 of 2 scales are not positive"),
    (tensor("a.weight_scale", NAN), "weight_scale' holds 1 NaN or infinite values of 2"),
    (tensor("a.weight_offset", SCALE), "weight_offset': 2 of 2 offsets are not 0, MindIE-SD"),
    (tensor("a.bias", np.ones(2, "f4")), "a.bias: the layer has no bias, expected none in the"),
    (tensor("a.bias", np.ones(3, "f4")), r"'a.bias' is F32 \[3\], expected .* \[2\]"),
    (tensor("b.weight", CODES), r"'b.weight' is \[2, 4\], expected \[3, 2\] as the network's"),
    (
        both(wrapped("W8A8_DYNAMIC", DYNAMIC), tensor("a.div.mul_scale", SCALE[:, 0])),
        r"mul_scale' is F32 \[2\], expected .* \[4\]",
    ),
    (
        both(wrapped("W8A8_DYNAMIC", DYNAMIC), tensor("a.div.mul_scale", np.zeros(4, "f4"))),
        "mul_scale': 4 of 4 factors are not positive",
    ),
    (wrapped("W8A16", DYNAMIC), "a: MindIE-SD ignores mul_scale of a W8A16 linear, expected no"),
    (wrapped("W4A16", DYNAMIC), "a: MindIE-SD ignores mul_scale of a W4A16 linear, expected no"),
    (wrapped("W4A4_DYNAMIC", DYNAMIC), "a: MindIE-SD ignores mul_scale of a W4A4_DYNAMIC"),
    (kind("W4A16", DYNAMIC), r"'a.weight': 2 of 8 values are not int4, expected -8\.\.7"),
    (
        kind("W4A4_DYNAMIC", {**DYNAMIC, "a.weight": CODES // 16, "a.bias": SCALE[:, 0]}),
        "a: MindIE-SD drops the bias of a W4A4_DYNAMIC linear, expected one without a bias",
    ),
    (
        kind("W8A8", {**STATIC, "a.input_offset": np.array([0.5], "f4")}),
        "input_offset': 1 of 1 zero points are not whole numbers of -128 to 127",
    ),
    (
        kind("W8A8", {**STATIC, "a.input_scale": np.ones(4, "f4")}),
        r"'a.input_scale' is F32 \[4\], expected F32 or F16 or BF16 \[1\] of a W8A8 linear",
    ),
    (
        kind("W8A8", {**STATIC, "a.deq_scale": np.array([1 << 40, 1], np.int64)}),
        "deq_scale': 1 of 2 values exceed 32 bits",
    ),
    (
        kind("W8A8", {**STATIC, "a.deq_scale": np.array([0, 1], np.int64)}),
        "deq_scale': 1 of 2 scales are not positive and finite",
    ),
    (
        kind("W8A8_MXFP8", {**MXFP8, "a.weight_scale": np.array([[127], [255]], np.uint8)}),
        r"weight_scale': 1 of 2 exponents are 255 \(NaN\)",
    ),
    (
        kind("W8A8_MXFP8", {**MXFP8, "a.weight": np.full((2, 4), 127, "u1").view("u1")}),
        r"'a.weight' is U8 \[2, 4\], expected F8_E4M3 \[2, 4\]",
    ),
    (
        kind("W4A4_MXFP4", {**MXFP4, "a.weight": MXFP8["a.weight"]}),
        "'a.weight': 1 of 8 values are no E2M1 numbers",
    ),
    (
        kind("W8A8_TIMESTEP", {**TIMESTEP, "a.quant_bias": TIMESTEP["a.quant_bias"] + 1}),
        "quant_bias': has a bias in it, expected a.bias as well, which dynamic timesteps add",
    ),
    (
        kind("W8A8_TIMESTEP", {**TIMESTEP, "a.deq_scale": 2 * TIMESTEP["a.deq_scale"]}),
        r"deq_scale': 4 of 6 values are not input_scale \* weight_scale, rounded",
    ),
    (
        kind("W8A8_TIMESTEP", {**TIMESTEP, "a.quant_bias": np.zeros((2, 2), np.int32)}),
        r"'a.quant_bias' is I32 \[2, 2\], expected I32 \[3, 2\] of a W8A8_TIMESTEP linear",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals_name_what_was_found(
    change: Callable[[Files], None], message: str, put: Callable
) -> None:
    files: Files = {
        "entries": {"a.weight": "W8A8_DYNAMIC", **REST},
        "tensors": dict(DYNAMIC),
        "type": "W8A8_DYNAMIC",
    }
    change(files)
    path, network = put(**files), Net()
    with pytest.raises(MsQuantError, match=message) as error:
        ms_quant.quantize(network, path)
    assert "\n" not in str(error.value)
    assert not any(isinstance(cell, QuantLinear) for cell in network.cells())


def test_a_bias_that_the_layer_has_and_the_file_not(put: Callable) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    with pytest.raises(MsQuantError, match=r"a.bias: the file has none, expected one of 2 values"):
        ms_quant.quantize(Net(bias=True), path)
    tensors = {**DYNAMIC, "a.weight": CODES // 16}
    path = put({"a.weight": "W4A4_DYNAMIC", **REST}, tensors, "W4A4_DYNAMIC")
    with pytest.raises(MsQuantError, match="drops the bias of a W4A4_DYNAMIC linear"):
        ms_quant.quantize(Net(bias=True), path)
    path = put({"a.weight": "W8A8", **REST}, STATIC, "W8A8")
    assert isinstance(ms_quant.quantize(Net(bias=True), path).a, QuantLinear)  # in quant_bias


def test_microscaling_without_a_bias_loads_though_the_original_fails(put: Callable) -> None:
    tensors = {name: array for name, array in MXFP8.items() if name != "a.bias"}
    path = put({"a.weight": "W8A8_MXFP8", **REST}, tensors, "W8A8_MXFP8")
    network = ms_quant.quantize(Net(), path)
    assert not network.a.has_bias
    np.testing.assert_array_equal(network.a(Tensor(X)).asnumpy(), GOLDEN[4][2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.linear.weight_scale", 1e-9, "2 of 2 scales are not positive in float16"),
        ("a.linear.weight_scale", 1e6, "2 of 2 values exceed float16"),
        ("a.linear.bias", 1e6, "2 of 2 values exceed float16"),
        ("a.div.mul_scale", 1e-9, "4 of 4 factors are not positive and finite in float16"),
        ("a.div.mul_scale", 1e6, "4 of 4 factors are not positive and finite in float16"),
    ],
)
def test_what_the_run_type_does_not_hold(
    name: str, value: float, message: str, put: Callable
) -> None:
    tensors = {f"a.linear.{name[2:]}": array for name, array in DYNAMIC.items()}
    tensors |= {"a.div.mul_scale": np.ones(4, "f4"), "a.linear.bias": np.ones(2, "f4")}
    tensors[name] = np.full_like(tensors[name], value)
    path = put({"a.linear.weight": "W8A8_DYNAMIC", **REST}, tensors)
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(Net(True), path, dtype="float16")
    network = ms_quant.quantize(Net(True), path)  # float32 holds them
    assert network.a.input_dtype == np.float32


def test_a_type_in_the_file_that_is_none(put: Callable, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    weights = tmp_path / "quant_model_weight_w8a8_dynamic.safetensors"
    save_file(DYNAMIC, weights, {"dtype": "float16"})
    assert ms_quant.quantize(Net(), path).a.input_dtype == np.float16
    assert ms_quant.quantize(Net(), path, dtype="bfloat16").a.input_dtype == BF16
    save_file(DYNAMIC, weights, {"dtype": "int8"})
    with pytest.raises(MsQuantError, match="dtype of __metadata__ is 'int8', expected bfloat16 or"):
        ms_quant.quantize(Net(), path)


def test_pairs_of_granularities_are_static(put: Callable) -> None:
    path = put({"a": "W8A8_per_channel_PER_TENSOR", **REST}, STATIC, "W8A8_PER_CHANNEL_PER_TENSOR")
    network = ms_quant.quantize(Net(), path)
    np.testing.assert_array_equal(network.a(Tensor(X)).asnumpy(), GOLDEN[3][2])


def test_files(put: Callable, tmp_path: Path) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    with pytest.raises(MsQuantError, match=r"none.json: no such file"):
        ms_quant.quantize(Net(), str(tmp_path / "none.json"))
    other = tmp_path / "quant_model_description_w8a16.json"
    other.write_text(
        path.read_text().replace('"model_quant_type": "W8A8_DYNAMIC"', '"x.y": "FLOAT"')
    )
    with pytest.raises(MsQuantError, match="has no 'model_quant_type', expected"):
        ms_quant.quantize(Net(), other)
    (tmp_path / "quant_model_weight_w8a8_dynamic.safetensors.index.json").write_text("{}")
    (tmp_path / "quant_model_weight_w8a8_dynamic_1.safetensors").write_text("of another rank")
    assert isinstance(ms_quant.quantize(Net(), path).a, QuantLinear)
    weights = tmp_path / "quant_model_weight_w8a8_dynamic.safetensors"
    whole = weights.read_bytes()
    for broken, message in [(whole[:-1], "truncated"), (b"\x80\x04pickle..", "states a header")]:
        weights.write_bytes(broken)
        with pytest.raises(MsQuantError, match=rf"weight_w8a8_dynamic\.safetensors: {message}"):
            ms_quant.quantize(Net(), path)
    weights.unlink()
    with pytest.raises(
        MsQuantError, match=r"weight_w8a8_dynamic.safetensors: no such file, expect"
    ):
        ms_quant.quantize(Net(), path)


def test_the_rank_of_the_name(put: Callable, tmp_path: Path, monkeypatch) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    for rank in (0, 3):
        path.with_name(f"{path.stem}_{rank}.json").write_text(path.read_text())
    weights = tmp_path / "quant_model_weight_w8a8_dynamic.safetensors"
    weights.rename(weights.with_name("quant_model_weight_w8a8_dynamic_3.safetensors"))
    with pytest.raises(MsQuantError, match=r"dynamic_0.safetensors: no such file"):
        ms_quant.quantize(Net(), path.with_name(f"{path.stem}_0.json"))
    assert isinstance(
        ms_quant.quantize(Net(), path.with_name(f"{path.stem}_3.json")).a, QuantLinear
    )
    monkeypatch.setattr(GlobalComm, "INITED", True)
    monkeypatch.setattr(communication, "get_rank", lambda: 3)
    assert isinstance(
        ms_quant.quantize(Net(), path.with_name(f"{path.stem}_0.json")).a, QuantLinear
    )
    with pytest.raises(MsQuantError, match=r"dynamic.safetensors: no such file"):
        ms_quant.quantize(Net(), path)  # no number, no rank


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"calibration": []}, "calibration"),
        ({"algorithm": "gptq"}, "algorithm"),
        ({"include": ["a"]}, "include"),
        ({"exclude": ["a"]}, "exclude"),
        ({"group_size": 64}, "group_size"),
    ],
)
def test_a_file_says_all(given: dict, name: str, put: Callable) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    with pytest.raises(MsQuantError, match=f"{name}: given with .* which says all"):
        ms_quant.quantize(Net(), path, **given)


def test_policies(put: Callable) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    with pytest.raises(MsQuantError, match=r"timestep_policy: no linear and no attention"):
        ms_quant.quantize(Net(), path, timestep_policy=TimestepPolicyConfig())
    with pytest.raises(
        MsQuantError, match="timestep_policy: dict, expected a TimestepPolicyConfig"
    ):
        ms_quant.quantize(Net(), path, timestep_policy={})
    path = put({"a.weight": "W4A4_MXFP4", **REST}, MXFP4, "W4A4_MXFP4")
    policy = TimestepPolicyConfig()
    assert isinstance(ms_quant.quantize(Net(), path, timestep_policy=policy).a, QuantLinear)
    policy.register(1, "W4A8", "w4a4_linear")
    network = ms_quant.quantize(Net(), path, timestep_policy=policy)
    with pytest.raises(MsQuantError, match=r"a\.weight: no timestep is set"):
        network.a(Tensor(X))
    with TimestepManager.at(1):
        assert network.a(Tensor(X)).shape == (len(X), 2)


def test_networks(put: Callable) -> None:
    path = put({"a.weight": "W8A8_DYNAMIC", **REST}, DYNAMIC)
    with pytest.raises(MsQuantError, match="Dense: is a linear itself, expected a network of them"):
        ms_quant.quantize(nn.Dense(4, 2), path)
    network = Net()
    network.a = nn.Dense(4, 2, has_bias=False, activation="relu")
    with pytest.raises(MsQuantError, match="a: a Dense with a built-in activation cannot be"):
        ms_quant.quantize(network, path)


def test_linears_share_their_number_of_timesteps(put: Callable) -> None:
    shape = {
        "weight": (3, 2),
        "weight_scale": (3, 1),
        "input_scale": (2, 1),
        "input_offset": (2, 1),
    }
    other = {f"b.{n}": np.ones(s, TIMESTEP[f"a.{n}"].dtype) for n, s in shape.items()}
    other |= {"b.deq_scale": np.ones((2, 3), "f4"), "b.bias": np.zeros(3, "f4")}
    other["b.quant_bias"] = np.full((2, 3), -2, np.int32)
    entries = {"a.weight": "W8A8_TIMESTEP", "b.weight": "W8A8_TIMESTEP"}
    path = put(entries, {**TIMESTEP, **other}, "W8A8_TIMESTEP")
    with pytest.raises(MsQuantError, match="a has 3 timesteps and b 2, expected the same number"):
        ms_quant.quantize(Net(), path)
    assert TimestepManager.get_timestep_idx_max() is None
