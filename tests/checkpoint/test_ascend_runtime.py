"""Whole ascend checkpoints, read by a runtime's documented rules and formulas, written here anew.

Nothing of the package reads them: names, packing, scales and products are plain loops and NumPy.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mindspore import Tensor

from ms_quant import kernels
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import open_model
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "o_proj": ["o_proj"],
    "down_proj": ["down_proj"],
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 += [-value for value in E2M1]
SHAPES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 2, "seq_len": 16}


def nibble(byte: int, high: int) -> int:
    """Two's complement."""
    value = (byte >> 4 * high) & 15
    return value - 16 if value > 7 else value


class Runtime:
    """The rules by which vllm-ascend finds what a layer is, and each type's formula."""

    def __init__(self, directory: Path, tensors: dict[str, np.ndarray]):
        self.description = json.loads((directory / "quant_model_description.json").read_text())
        self.tensors = tensors
        config = json.loads((directory / "config.json").read_text())
        assert "quantization_config" not in config
        self.torch_dtype = config["torch_dtype"]
        index = json.loads((directory / "quant_model_weights.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(tensors)

    def kind(self, prefix: str, fused: str) -> str:
        kinds = {self.description[f"{prefix}.{shard}.weight"] for shard in FUSED[fused]}
        if len(kinds) > 1:
            raise ValueError("Not all shards are quantized with same quant type")
        return kinds.pop()

    def forward(self, path: str, kind: str, x: np.ndarray, decode: bool) -> np.ndarray:
        get = {
            name.removeprefix(f"{path}."): array
            for name, array in self.tensors.items()
            if name.startswith(f"{path}.")
        }
        bias = get.get("bias", np.zeros(1))
        if kind == "W16A16S":
            assert {self.description[f"{path}.{n}"] for n in get} == {kind}
            return x @ exact(get["weight"]).T + bias
        assert all(self.description[f"{path}.{n}"] == kind for n in get if n != "bias")
        if kind == "W8A8" or (kind == "W8A8_MIX" and decode):
            return static(get, x, self.torch_dtype)
        if kind == "W8A16":
            weight = get["weight"].astype(np.float64) + repeated(get["weight_offset"], x)
            return x @ (weight * repeated(get["weight_scale"], x)).T + bias
        if kind == "W8A8_MXFP8":
            return mxfp8(x) @ (exact(get["weight"]) * powers(get["weight_scale"], x)).T + bias
        if kind == "W4A8_MXFP":
            weight = np.array(
                [[E2M1[b >> s & 15] for b in r for s in (0, 4)] for r in get["weight"]]
            )
            return mxfp8(x) @ (weight * powers(get["weight_scale"], x)).T + bias
        packed = "none" if kind.startswith("W8") else "out"
        weight = self.unpacked(get["weight"], packed) * repeated(
            get.get("weight_scale_second", np.ones((1, 1))), x
        )
        assert not get["weight_offset"].any()
        steps = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        codes = np.rint(x / steps).astype(np.float64)
        return codes @ weight.T * steps * get["weight_scale"][:, 0] + bias

    @staticmethod
    def unpacked(stored: np.ndarray, along: str) -> np.ndarray:
        if along == "none":
            return stored.astype(np.float64)
        rows = stored.view(np.uint8).tolist()
        return np.array([[nibble(b, high) for b in row] for row in rows for high in (0, 1)], "f8")


def held(value: float, torch_dtype: str) -> float:
    """As a parameter of the type holds it, rounded half to even."""
    if torch_dtype == "float16":
        return struct.unpack("<e", struct.pack("<e", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if torch_dtype == "bfloat16":
        bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def static(get: dict[str, np.ndarray], x: np.ndarray, torch_dtype: str) -> np.ndarray:
    """The scale becomes the model's type, and so does its reciprocal; npu_quantize multiplies."""
    deq = get["deq_scale"]
    if deq.dtype == np.int64:
        deq = np.array([np.uint32(bits) for bits in deq], np.uint32).view(np.float32)
    scale = held(float(get["input_scale"][0]), torch_dtype)
    reciprocal = np.float32(held(float(np.float32(1) / np.float32(scale)), torch_dtype))
    offset = np.float32(held(float(get["input_offset"][0]), torch_dtype))
    codes = np.clip(np.rint(x * reciprocal + offset), -128, 127)
    total = codes.astype(np.int64) @ get["weight"].astype(np.int64).T + get["quant_bias"]
    return total.astype(np.float32) * deq


def repeated(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.repeat(parameters.astype(np.float64), x.shape[1] // parameters.shape[1], axis=1)


def exact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).astype(np.float64)


def powers(exponents: np.ndarray, x: np.ndarray) -> np.ndarray:
    return 2.0 ** (np.repeat(exponents.astype(int), 32, axis=1)[:, : x.shape[1]] - 127)


def mxfp8(x: np.ndarray) -> np.ndarray:
    result = np.empty(x.shape)
    for t, start in np.ndindex(len(x), x.shape[1] // 32):
        block = x[t, 32 * start : 32 * start + 32]
        step = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 8)
        cut = np.clip(block / step, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        result[t, 32 * start : 32 * start + 32] = exact(cut) * step
    return result


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("W8A16", {}),
    ("W8A16", {"scheme_options": {"symmetric": False}}),
    ("W8A8_MXFP8", {}),
    ("W4A8_MXFP", {}),
    ("W4A8_DYNAMIC", {}),
    ("W4A8_DYNAMIC", {"scheme_options": {"group_size": 32}}),
    ("W8A8", {"formats": ("ascend",), "dtype": "float16", **CALIBRATED}),
    (
        "W8A8",
        {"formats": ("ascend",), "algorithm": "smoothquant", **CALIBRATED},
    ),
    ("W8A8_DYNAMIC", {"formats": ("ascend",)}),
    ("W8A8_MIX", {"algorithm": "gptq", **CALIBRATED}),
    ("W8A8_MIX", {"algorithm": "smoothquant", "dtype": "float16", **CALIBRATED}),
    ("W16A16S", CALIBRATED),
    ("W16A16S", {"dtype": "float16", **CALIBRATED}),
]


@pytest.mark.parametrize(("scheme", "options"), RUNS)
def test_a_runtime_computes_what_was_quantized(
    scheme: str,
    options: dict[str, Any],
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    source = tiny_model(family="qwen2", layers=1, tied=True, **SHAPES)
    if "samples" in options:
        options = {**options, "calib": calib_text}
    output = tmp_path / "out"
    run_job(QuantizeOptions(source, output, scheme, shard_bytes=40_000, **options))
    assert len(list(output.glob("quant_model_weights-0000?-of-0000?.safetensors"))) > 1
    runtime, model = Runtime(output, load_tensors(output)), open_model(output)
    assert runtime.description["lm_head.weight"] == "FLOAT"
    assert model.format == f"ascend {scheme}"
    for fused, shards in FUSED.items():
        prefix = (
            f"model.layers.0.{'self_attn' if 'q_proj' in shards or fused == 'o_proj' else 'mlp'}"
        )
        kind = runtime.kind(prefix, fused)
        assert kind == scheme
        for shard in shards:
            linear = model.linear(f"{prefix}.{shard}")
            assert linear is not None
            x = np.random.default_rng(0).standard_normal((4, linear.weight.shape[1]), np.float32)
            for decode in (False, True):
                expected = runtime.forward(f"{prefix}.{shard}", kind, x, decode)
                found = linear.forward(x, decode)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
                if kind == "W8A8" or (kind == "W8A8_MIX" and decode):
                    np.testing.assert_array_equal(found, expected)
    result = verify_checkpoint(output, source)
    assert result.problems == ()
    again = result.made_again, result.measured, len(result.unknown)
    moved = "gptq" if scheme == "W16A16S" else options.get("algorithm")
    assert again == {None: (7, 0, 0), "gptq": (0, 7, 0), "smoothquant": (3, 2, 2)}[moved]


@pytest.fixture
def static_checkpoint(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> Callable[..., Path]:
    """W8A8 of one block in some type, in one file."""

    def make(dtype: str, **options: Any) -> Path:
        source = tiny_model(f"source-{dtype}", family="qwen2", layers=1, **SHAPES)
        choices, output = {"formats": ("ascend",)}, tmp_path / dtype
        request = QuantizeOptions(source, output, "W8A8", **choices, calib=calib_text)
        run_job(replace(request, dtype=dtype, **CALIBRATED, **options))
        return output

    return make


def test_reciprocals_are_nearly_exact_in_the_runtimes_type(
    static_checkpoint: Callable[..., Path], load_tensors: Callable
) -> None:
    for dtype in ("bfloat16", "float16"):
        tensors = load_tensors(static_checkpoint(dtype))
        scales = [float(t[0]) for name, t in tensors.items() if name.endswith("input_scale")]
        assert len(set(scales)) > 3
        for scale in scales:
            assert held(scale, dtype) == scale
            assert abs(scale * held(1 / scale, dtype) - 1) <= 2.0**-10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [0.0123, 0.03, 1 / 3, 0.7001, 1.9])
def test_whatever_scale_others_stored_is_multiplied_as_the_runtime_does(
    dtype: str,
    scale: float,
    static_checkpoint: Callable[..., Path],
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    """msModelSlim stores a float32 that the runtime rounds; its reciprocal may be far off."""
    output, path = static_checkpoint(dtype), "model.layers.0.mlp.down_proj"
    tensors = load_tensors(output)
    tensors[f"{path}.input_scale"][0] = scale
    save_tensors(next(output.glob("quant_model_weights*.safetensors")), tensors)
    linear = open_model(output).linear(path)
    assert linear is not None
    of_linear = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{path}.")}
    x = 40 * scale * np.random.default_rng(0).standard_normal((9, 128), np.float32)
    expected = static(of_linear, x, dtype)
    np.testing.assert_array_equal(linear.forward(x), expected)
    packed = kernels.pack(linear)
    if packed is not None:
        np.testing.assert_array_equal(packed(x), expected)
    np.testing.assert_array_equal(QuantLinear(linear)(Tensor(x)).asnumpy(), expected)
    plain = QuantLinear(linear, native=False)
    np.testing.assert_array_equal(plain(Tensor(x)).asnumpy(), expected)


@pytest.mark.parametrize("scale", [1e-9, 1e-6])  # 0, and a subnormal number, in float16
def test_a_scale_without_a_reciprocal_is_refused(
    scale: float,
    static_checkpoint: Callable[..., Path],
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    output, path = static_checkpoint("float16"), "model.layers.0.mlp.down_proj"
    tensors = load_tensors(output)
    tensors[f"{path}.input_scale"][0] = scale
    save_tensors(next(output.glob("quant_model_weights*.safetensors")), tensors)
    with pytest.raises(
        MsQuantError, match=f"{path}.input_scale: .* values have no reciprocal in float16"
    ):
        open_model(output).linear(path)


def test_a_layer_without_an_entry_is_a_key_error(
    tiny_model: Callable[..., Path], tmp_path: Path, load_tensors: Callable
) -> None:
    """Every linear, norm and embedding has one, those that stay float among them."""
    source = tiny_model(layers=2, **SHAPES)
    options = QuantizeOptions(source, tmp_path / "out", "W8A16", exclude=("*.0.*.up_proj",))
    run_job(options)
    runtime = Runtime(tmp_path / "out", load_tensors(tmp_path / "out"))
    assert runtime.kind("model.layers.0.mlp", "gate_up_proj") == "FLOAT"
    assert runtime.kind("model.layers.1.mlp", "gate_up_proj") == "W8A16"
    assert set(runtime.tensors) <= set(runtime.description)
    with pytest.raises(KeyError):
        runtime.kind("model.layers.2.mlp", "gate_up_proj")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W4A4_MXFP4_SVD", {"algorithm_options": {"rank": 8}}),
        ("W4A8_DYNAMIC", {"scheme_options": {"group_size": 32}}),
    ],
)
def test_sizes_are_read_without_the_record(
    scheme: str, options: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = tiny_model(layers=1, **SHAPES), tmp_path / "out"
    run_job(QuantizeOptions(source, output, scheme, **options))
    path, x = "model.layers.0.mlp.down_proj", np.ones((1, 128), np.float32)
    expected = open_model(output).linear(path)
    (output / "ms_quant.json").unlink()
    found = open_model(output).linear(path)
    assert expected is not None and found is not None
    np.testing.assert_array_equal(found.forward(x), expected.forward(x))


@pytest.mark.parametrize(
    ("scheme", "options", "stored"),
    [
        ("W8A16", {}, "I8"),
        ("W4A8_DYNAMIC", {}, "I8, pairs of outputs"),
        ("W8A8FP8_DYNAMIC", {}, "F8_E4M3"),
        ("W4A4_MXFP4", {}, "U8, pairs of inputs"),
    ],
)
def test_inspect(
    scheme: str, options: dict, stored: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(layers=1, **SHAPES)
    request = QuantizeOptions(source, tmp_path / "out", scheme, scheme_options=options)
    run_job(request)
    found = inspect_checkpoint(tmp_path / "out")
    assert found["format"] == f"ascend {scheme}"
    assert {row["stored_as"] for row in found["linears"]} == {stored}
