"""Whole compressed-tensors checkpoints, read by vLLM's rules and formulas, written here anew.

Nothing of the package reads them in ``Runtime``: targets, fused layers, words and products are
plain loops and NumPy. The other tests give ``read_linear`` files that contradict the plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plans import given

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.companions import model_config
from ms_quant.formats.compressed_tensors import format as format
from ms_quant.models.config import load_config
from ms_quant.numerics.activation import ObservedRange, StaticActivation
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan

FORMAT = "compressed-tensors"
SHAPES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def quantized(plan: Plan, source: Checkpoint, path: str) -> QuantizedLinear:
    """The linear that rounding to nearest gives. Those of a group see the same input."""
    layer, group, _ = given(plan, path)
    scheme, weight = layer.scheme, source.read_float32(f"{path}.weight")
    grid = scheme.weight.fit(weight, path, layer.storage.scale_dtype)
    low, high = np.full((2, weight.shape[1]), [[-2.7 - len(group.name) / 8], [3.1]], "f4")
    seen = None if scheme.activation.dynamic else ObservedRange(low, high, plan.dtype, path)
    bias = None
    if f"{path}.bias" in source.names:
        bias = source.read_float32(f"{path}.bias")
    codes = grid.round(weight)
    return QuantizedLinear(codes, grid, bias, scheme.activation.fit(seen, None))


def write(plan: Plan, source: Path, output: Path) -> dict[str, QuantizedLinear]:
    """Writes a checkpoint of a plan; gives its linears by path."""
    output.mkdir()
    tensors = Checkpoint(source)
    linears = {path: quantized(plan, tensors, path) for path in plan.quantized()}

    def get(tensor: TensorPlan) -> np.ndarray:
        path, _, suffix = tensor.name.rpartition(".")
        if path in linears and suffix != "bias":
            layer, group, _ = given(plan, path)
            return format.linear_tensor(layer, group, linears[path], suffix)
        return tensors.read_float32(tensor.name).astype(plan.dtype)

    write_file(output / "model.safetensors", format.FORMAT.tensor_plans(plan), get)
    config = model_config(plan.config, plan.dtype)
    config["quantization_config"] = format.FORMAT.description(plan)
    (output / "config.json").write_text(json.dumps(config))
    return linears


FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "o_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "lm_head": "ParallelLMHead",
    "embed_tokens": "VocabParallelEmbedding",
}
TORCH = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def matches(value: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], value) is not None
    return value == pattern


def shards_of(layer: str) -> list[str]:
    prefix, _, name = layer.rpartition(".")
    return [f"{prefix}.{shard}" for shard in FUSED[name]] if name in FUSED else [layer]


class Runtime:
    """How vLLM finds a layer's scheme, which parameters it then has, and what they compute."""

    def __init__(self, directory: Path, tensors: dict[str, np.ndarray]):
        config = json.loads((directory / "config.json").read_text())
        self.config, self.tensors = config["quantization_config"], tensors
        assert self.config["quant_method"] == "compressed-tensors"
        self.dtype = TORCH[config["torch_dtype"]]
        self.targets = {
            target: group
            for group in self.config["config_groups"].values()
            for target in group["targets"]
        }

    def group(self, layer: str) -> dict[str, Any] | None:
        """Ignored first; then by name, by the names of all shards, by the class."""
        shards = shards_of(layer)
        ignored = [any(matches(s, p) for p in self.config["ignore"]) for s in shards]
        if any(ignored) and not all(ignored):
            raise ValueError("Found different quantization schemes for the shards")
        if all(ignored):
            return None
        found = [next((t for t in self.targets if matches(s, t)), None) for s in shards]
        if all(found):
            return self.targets[str(found[0])]
        kind = CLASSES[layer.rpartition(".")[2]].lower()
        by_class = [t for t in self.targets if "." not in t and t.lower() in kind]
        return self.targets[by_class[0]] if by_class else None

    def scheme(self, layer: str) -> str:
        group = self.group(layer)
        if group is None:
            return "unquantized"
        weights, inputs = group["weights"], group["input_activations"]
        assert weights["type"] == "int" and weights["dynamic"] is False
        assert weights["strategy"] in ("channel", "group")
        if inputs is None:
            if group["format"] != "pack-quantized":
                raise NotImplementedError("No compressed-tensors compatible scheme was found")
            return f"WNA16 of {weights['num_bits']} bits"
        assert group["format"] == "int-quantized" and weights["symmetric"]
        assert weights["num_bits"] == inputs["num_bits"] == 8
        if inputs["strategy"] == "tensor" and not inputs["dynamic"]:
            return "static W8A8"
        assert inputs["strategy"] == "token" and inputs["dynamic"] and inputs["symmetric"]
        return "dynamic W8A8"

    def load(self, layer: str, name: str, dtype: Any, *shape: int | None) -> np.ndarray:
        """A fused layer's parameter: those of its shards, one below the other, in its own type."""
        found = [self.tensors[f"{shard}.{name}"] for shard in shards_of(layer)]
        for array in found:
            assert array.ndim == len(shape)
            assert all(s in (None, n) for s, n in zip(shape, array.shape, strict=True))
        return np.concatenate(found).astype(dtype)

    def forward(self, layer: str, x: np.ndarray) -> np.ndarray:
        columns, scheme = x.shape[1], self.scheme(layer)
        if scheme.startswith("WNA16"):
            y = x @ self.packed_weight(layer, columns).T
        else:
            weight = self.load(layer, "weight", np.int64, None, columns)
            scale = self.load(layer, "weight_scale", np.float32, None, 1)[:, 0]
            if scheme == "static W8A8":
                y = self.static(layer, x, weight) * scale
            else:
                step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
                y = np.rint(x / step).astype(np.int64) @ weight.T * step * scale
        biases = [self.tensors.get(f"{s}.bias") for s in shards_of(layer)]
        if biases[0] is None:
            return y
        assert all(b is not None and b.dtype == self.dtype for b in biases)
        return y + np.concatenate([np.asarray(b).astype(np.float32) for b in biases])

    def static(self, layer: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """All shards must have loaded one scale: it is a parameter of one element, written over."""
        steps = {self.tensors[f"{s}.input_scale"].tobytes() for s in shards_of(layer)}
        points = {self.tensors[f"{s}.input_zero_point"].tobytes() for s in shards_of(layer)}
        assert len(steps) == len(points) == 1
        step = self.tensors[f"{shards_of(layer)[0]}.input_scale"]
        point = self.tensors[f"{shards_of(layer)[0]}.input_zero_point"]
        assert step.shape == point.shape == (1,) and point.dtype == np.int8
        scale, zero_point = reconstructed(step.astype(np.float32)[0], int(point[0]))
        codes = np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(np.int64)
        return (codes @ weight.T - zero_point * weight.sum(axis=1)) * scale

    def packed_weight(self, layer: str, columns: int) -> np.ndarray:
        args = (self.group(layer) or {})["weights"]
        bits, size = args["num_bits"], args["group_size"] or columns
        words = self.load(layer, "weight_packed", np.int32, None, columns * bits // 32)
        scale = self.load(layer, "weight_scale", self.dtype, None, columns // size)
        assert len(scale) == len(words)
        zero = np.full(scale.shape, 1 << (bits - 1))
        if not args["symmetric"]:
            rows = len(words) * bits // 32
            packed = self.load(layer, "weight_zero_point", np.int32, None, columns // size)
            assert len(packed) == rows
            zero = np.array(unpacked(packed.T, bits)).T
        for shard in shards_of(layer):
            shape = self.tensors[f"{shard}.weight_shape"]
            assert shape.dtype == np.int64 and shape.tolist()[1] == columns
        codes = np.array(unpacked(words, bits), np.float64)
        weight = codes - np.repeat(zero, size, axis=1)
        return weight * np.repeat(scale.astype(np.float64), size, axis=1)


def unpacked(words: np.ndarray, bits: int) -> list[list[int]]:
    """Unsigned codes, lowest bits first."""
    shifts, mask = range(0, 32, bits), (1 << bits) - 1
    return [[int(word) >> s & mask for word in row for s in shifts] for row in words]


def reconstructed(step: np.float32, point: int) -> tuple[np.float32, int]:
    """vLLM takes both apart and together again, in float32, and cuts the zero point to int."""
    high = step * np.float32(127 - point)
    low = step * np.float32(-128 - point)
    scale = (high - low) / np.float32(255)
    return scale, int(np.float32(-128) - low / scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_the_runtime_reconstructs_is_what_was_stored(dtype: str) -> None:
    """As scales of 16 bits make every step of it exact; float32 ones lose zero points."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(1e-3, 0.1, 50).astype(np.float32)
    exact = steps.astype(DTYPES[dtype]).astype(np.float32)
    pairs = [(step, point) for step in exact for point in range(-128, 128)]
    assert all(reconstructed(step, point) == (step, point) for step, point in pairs)
    wide = [(step, point) for step in steps for point in range(-128, 128)]
    assert any(reconstructed(step, point)[1] != point for step, point in wide)


RUNS: list[tuple[str, dict[str, Any], str, str]] = [
    ("W8A8", {}, "bfloat16", "static W8A8"),
    ("W8A8", {}, "float16", "static W8A8"),
    ("W8A8_DYNAMIC", {}, "bfloat16", "dynamic W8A8"),
    ("W8A8_DYNAMIC", {}, "float16", "dynamic W8A8"),
    ("W8A16", {}, "bfloat16", "WNA16 of 8 bits"),
    ("W8A16", {"group_size": 32}, "float16", "WNA16 of 8 bits"),
    ("W8A16", {"symmetric": False}, "bfloat16", "WNA16 of 8 bits"),
    ("W4A16", {"group_size": 0}, "bfloat16", "WNA16 of 4 bits"),
    ("W4A16", {"group_size": 32}, "float16", "WNA16 of 4 bits"),
    ("W4A16", {"group_size": 32, "symmetric": False}, "bfloat16", "WNA16 of 4 bits"),
    ("W4A16", {"group_size": 0, "symmetric": False}, "float16", "WNA16 of 4 bits"),
]


@pytest.mark.parametrize(("scheme", "options", "dtype", "kind"), RUNS)
def test_the_runtime_computes_what_was_quantized(
    scheme: str,
    options: dict[str, Any],
    dtype: str,
    kind: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    source = tiny_model(family="qwen2", layers=1, dtype=dtype, **SHAPES)
    choices = {"scheme_options": options, "format": FORMAT}
    plan = make_plan(load_config(source), scheme, "minmax", dtype=DTYPES[dtype], **choices)
    output = tmp_path / "out"
    write(plan, source, output)
    runtime, checkpoint = Runtime(output, load_tensors(output)), Checkpoint(output)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    layers = (f"{attention}.qkv_proj", f"{attention}.o_proj", f"{mlp}.gate_up_proj", DOWN)
    assert {runtime.scheme(layer) for layer in layers} == {kind}
    assert runtime.scheme("lm_head") == runtime.scheme("model.embed_tokens") == "unquantized"
    for layer in layers:
        read = []
        for path in shards_of(layer):
            name, bias = f"{path}.bias", None
            if name in checkpoint.names:
                bias = checkpoint.read_float32(name)
            read.append(format.read_linear(*given(plan, path), checkpoint, path, bias))
        x = np.random.default_rng(0).standard_normal((4, read[0].weight.shape[1]), np.float32)
        expected = np.concatenate([linear.forward(x) for linear in read], axis=1)
        np.testing.assert_allclose(runtime.forward(layer, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "options", "dtype", "kind"), RUNS)
def test_what_is_read_is_what_was_written(
    scheme: str,
    options: dict[str, Any],
    dtype: str,
    kind: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = tiny_model(family="qwen2", layers=1, dtype=dtype, **SHAPES)
    choices = {"scheme_options": options, "format": FORMAT}
    plan = make_plan(load_config(source), scheme, "minmax", dtype=DTYPES[dtype], **choices)
    for path, linear in write(plan, source, tmp_path / "out").items():
        checkpoint = Checkpoint(tmp_path / "out")
        found = format.read_linear(*given(plan, path), checkpoint, path, linear.bias)
        if isinstance(linear.activation, StaticActivation):
            linear = replace(linear, activation=replace(linear.activation, folds_bias=False))
        x = np.random.default_rng(1).standard_normal((3, linear.weight.shape[1]), np.float32)
        np.testing.assert_array_equal(found.forward(x), linear.forward(x))


def test_fused_layers_and_floats(
    tiny_model: Callable[..., Path], tmp_path: Path, load_tensors: Callable
) -> None:
    source = tiny_model(layers=2, tied=True, **SHAPES)
    exclude = ("*.0.*.up_proj", "*.1.*.o_proj")
    plan = make_plan(
        load_config(source),
        "W8A16",
        "minmax",
        dtype=DTYPES["bfloat16"],
        exclude=exclude,
        format=FORMAT,
    )
    write(plan, source, tmp_path / "out")
    tensors = load_tensors(tmp_path / "out")
    runtime = Runtime(tmp_path / "out", tensors)
    found = [
        runtime.scheme(f"model.layers.{i}.{layer}")
        for i in (0, 1)
        for layer in ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj")
    ]
    packed = "WNA16 of 8 bits"
    assert found == ["unquantized", packed, packed, packed, packed, "unquantized"]
    assert tensors[f"{UP}.weight"].dtype == ml_dtypes.bfloat16
    runtime.config["ignore"].remove(UP)
    with pytest.raises(ValueError, match="different quantization schemes"):
        runtime.scheme("model.layers.0.mlp.gate_up_proj")


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """The same with another first value."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


W4, STATIC = ("W4A16", {"group_size": 32, "symmetric": False}), ("W8A8", {})
DEFECTS: list[tuple[tuple, str, Callable[[np.ndarray], np.ndarray | None], str]] = [
    (W4, "weight_packed", lambda a: a[:, :-1], r"is int32 \[64, 15\], expected int32 \[64, 16\]"),
    (W4, "weight_packed", lambda a: a.view("f4"), r"is float32 .*, expected int32"),
    (W4, "weight_packed", lambda a: None, "no tensor"),
    (W4, "weight_shape", put(65), r"is \[65, 128\], expected \[64, 128\]"),
    (W4, "weight_shape", lambda a: a[::-1].copy(), r"is \[128, 64\], expected \[64, 128\]"),
    (W4, "weight_shape", lambda a: a[:1], r"is int64 \[1\], expected int64 \[2\]"),
    (W4, "weight_scale", lambda a: a[:, :1], r"is bfloat16 \[64, 1\], expected .* \[64, 4\]"),
    (W4, "weight_scale", put(0), "1 scales are not positive"),
    (W4, "weight_scale", put(-1), "1 scales are not positive"),
    (W4, "weight_scale", put(np.inf), "inf"),
    (W4, "weight_zero_point", lambda a: a.T.copy(), r"is int32 \[4, 8\], expected int32 \[8, 4\]"),
    (STATIC, "weight", lambda a: a.view(np.uint8), r"is uint8 .*, expected int8"),
    (STATIC, "weight_scale", lambda a: a[:, 0], r"is bfloat16 \[64\], expected bfloat16 \[64, 1\]"),
    (STATIC, "input_scale", put(0), "1 scales are not positive"),
    (STATIC, "input_scale", put(np.nan), "NaN"),
    (STATIC, "input_scale", lambda a: a.repeat(128), r"is bfloat16 \[128\], expected .* \[1\]"),
    (STATIC, "input_zero_point", lambda a: a.astype("i4"), r"is int32 \[1\], expected int8"),
]


@pytest.mark.parametrize(("made", "suffix", "change", "message"), DEFECTS)
def test_a_tensor_that_contradicts_is_refused(
    made: tuple[str, dict[str, Any]],
    suffix: str,
    change: Callable[[np.ndarray], np.ndarray | None],
    message: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
    save_tensors: Callable,
) -> None:
    source, (scheme, options) = tiny_model(layers=1, **SHAPES), made
    choices = {"scheme_options": options, "format": FORMAT}
    plan = make_plan(load_config(source), scheme, "minmax", dtype=DTYPES["bfloat16"], **choices)
    write(plan, source, tmp_path / "out")
    tensors = load_tensors(tmp_path / "out")
    changed = change(tensors.pop(f"{DOWN}.{suffix}"))
    if changed is not None:
        tensors[f"{DOWN}.{suffix}"] = np.ascontiguousarray(changed)
    save_tensors(tmp_path / "out" / "model.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path / "out")
    with pytest.raises(MsQuantError, match=message) as error:
        format.read_linear(*given(plan, DOWN), checkpoint, DOWN, None)
    assert f"{DOWN}.{suffix}" in str(error.value)
