"""What a network or a decoder computes here is what MindIE-SD computes of the saved files: to the
last bit where sums are of integers, and within a float32 sum's own error where they are not.

``Runtime`` is the loader and the operators, written anew from their rules and formulas: nothing of
the package is used in it, and nothing is read but what the loader reads. Casts are those of the
loader for bfloat16 and float16; where an operator asks for the type of an argument it is asserted.
Such files were also run by the real loader, with these formulas as its operators: see
docs/mindie_sd_format.md.
"""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, mint, nn

import ms_quant
from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import open_model
from ms_quant.pipeline.options import QuantizeOptions, split_options
from ms_quant.pipeline.run import run_job
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

BF16, FP16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = {"bfloat16": BF16, "float16": FP16}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
STATIC = ("W8A8", "W8A8_PER_CHANNEL", "W8A8_PER_TENSOR")
Interval = tuple[np.ndarray, np.ndarray]


class Runtime:
    """``quantize(model, path, dtype=dtype)`` for a model whose linears are described by biases."""

    def __init__(
        self, path: Path, load: Callable[[Path], dict[str, np.ndarray]], dtype: str
    ) -> None:
        self.dtype, self.json = DTYPES[dtype], json.loads(path.read_text())
        kind = self.json["model_quant_type"]
        rank = f"_{path.stem.split('_')[-1]}" if path.stem.split("_")[-1].isdigit() else ""
        weights = path.parent / f"quant_model_weight_{kind.lower()}{rank}.safetensors"
        for file in (path, weights):
            assert file.is_file() and not file.is_symlink()
            assert not stat.S_IMODE(file.stat().st_mode) & ~0o640, "PermissionError"
        self.tensors = load(path.parent)

    def config(self, name: str) -> str | None:
        """The type of a layer, None where it stays float."""
        patterns = [f"{name}.linear.weight", f"{name}.weight", name, f"{name}.fa_q.scale"]
        patterns.append(f"{name}.quant_type")
        if any(self.json.get(pattern) == "FLOAT" for pattern in patterns):
            return None
        return next((self.json[p].upper() for p in patterns if p in self.json), None)

    def linear(self, name: str, bias: bool) -> Linear:
        """The layer as it is loaded; ``bias`` says what the model's own linear has."""
        return Linear(self, name, bias)


class Linear:
    """Attributes are named as the loader's buffers."""

    def __init__(self, runtime: Runtime, name: str, bias: bool) -> None:
        self.dtype, self.tensors, self.prefix = runtime.dtype, runtime.tensors, name
        self.kind = runtime.config(name) or ""
        self.mul_scale = None
        if f"{name}.div.mul_scale" in self.tensors:
            assert self.kind not in ("W8A16", "W4A16", "W4A4_DYNAMIC"), "mul_scale is ignored"
            self.mul_scale = self.tensors[f"{name}.div.mul_scale"].astype(self.dtype)
            self.prefix = f"{name}.linear"
        self.weight = self.get("weight")
        self.bias = self.get("bias") if bias else None
        if self.kind in ("W8A16", "W4A16"):
            self.weight_scale = self.get("weight_scale").T.astype(self.dtype)
            if self.bias is not None and self.dtype == BF16:
                self.bias = self.bias.astype(FP32)
        if self.kind in ("W8A8_DYNAMIC", "W8A8_TIMESTEP", "W4A4_DYNAMIC"):
            scale = self.get("weight_scale").reshape(-1).astype(self.dtype)
            self.weight_scale = scale.astype(FP32) if self.dtype == FP16 else scale
            self.bias = None if self.bias is None else self.bias.astype(self.dtype)
        if self.kind in (*STATIC, "W8A8_TIMESTEP"):
            self.quant_bias, self.deq_scale = self.get("quant_bias"), self.get("deq_scale")
            held = FP32 if self.dtype == FP16 else self.dtype
            self.input_scale = self.get("input_scale").astype(held)
            self.input_offset = self.get("input_offset").astype(np.int8)
        if "MXFP" in self.kind:
            self.weight_scale = self.get("weight_scale")
            assert self.weight_scale.dtype == np.uint8
        if self.kind == "W4A4_MXFP4_DUALSCALE":
            assert self.weight_scale.shape[1] % 2 == 0, "reshape(N, -1, 2)"
            self.weight_dual_scale = self.get("weight_dual_scale")[..., 0]

    def get(self, suffix: str) -> np.ndarray:
        name = f"{self.prefix}.{suffix}"
        assert name in self.tensors, f"Critical parameter missing: {name}."
        return self.tensors[name]

    def __call__(self, x: np.ndarray, static: int | None = None) -> Interval:
        """The least and the largest output, in the model's type, of inputs of this type."""
        assert x.dtype == self.dtype
        if self.kind in ("W8A16", "W4A16"):
            return self.weight_only(x)
        if self.kind == "W4A4_MXFP4_DUALSCALE":
            return self.microscaling(self.dual(x))
        if self.mul_scale is not None:  # a product of two tensors of one type
            x = (x.astype("f8") * self.mul_scale.astype("f8")).astype(self.dtype)
        if "MXFP" in self.kind:
            four = self.kind == "W4A4_MXFP4"
            return self.microscaling(blocks(x.astype("f8"), four))
        if self.kind in STATIC:
            return self.static(x, 0, self.deq_scale, self.quant_bias)
        if static is not None:
            step = static
            return self.static(x, step, self.deq_scale[step], self.quant_bias[step])
        return self.dynamic(x)

    def weight_only(self, x: np.ndarray) -> Interval:
        assert self.weight.dtype == np.int8
        if self.kind == "W4A16":
            assert self.weight.min() >= -8 and self.weight.max() <= 7
        if self.bias is not None:
            assert self.bias.dtype == (FP32 if x.dtype == BF16 else FP16), "the operator refuses it"
        weight = self.weight.T.astype("f8") * self.weight_scale.astype("f8")
        return self.floats(x.astype("f8"), weight)

    def static(self, x: np.ndarray, step: int, deq: np.ndarray, bias: np.ndarray) -> Interval:
        if self.dtype == FP16:
            assert deq.dtype == np.int64, "the operator takes the bits"
            deq = deq.astype(np.uint32).view(FP32)
        assert deq.dtype == FP32 and bias.dtype == np.int32
        scale, offset = self.input_scale[step], self.input_offset[step]
        steps = x.astype(FP32) / scale.astype(FP32) + offset.astype(FP32)
        codes = np.clip(np.rint(steps), -128, 127).astype(np.int64)
        total = codes @ self.weight.astype(np.int64).T + bias
        y = (total.astype(FP32) * deq).astype(self.dtype)
        return y, y

    def dynamic(self, x: np.ndarray) -> Interval:
        largest = np.float32(7 if self.kind[:2] == "W4" else 127)
        wide = x.astype(FP32)
        step = np.abs(wide).max(axis=1, keepdims=True) / largest
        codes = np.rint(wide / step).astype(np.int64)
        total = (codes @ self.weight.astype(np.int64).T).astype(FP32)
        y = total * step * self.weight_scale.astype(FP32)
        if self.kind != "W4A4_DYNAMIC" and self.bias is not None:
            assert self.bias.dtype == self.dtype, "the operator refuses it"
            y = y + self.bias.astype(FP32)
        elif self.kind == "W4A4_DYNAMIC":
            assert self.bias is None, "the bias is dropped"
        return y.astype(self.dtype), y.astype(self.dtype)

    def dual(self, x: np.ndarray) -> np.ndarray:
        """What npu_dynamic_dual_level_mx_quant makes of x, dequantized."""
        wide = x.astype(FP32)
        if self.mul_scale is not None:
            wide = wide * self.mul_scale.astype(FP32)
        result = np.zeros(wide.shape)
        for start in range(0, wide.shape[1], 512):
            part = wide[:, start : start + 512]
            top = np.abs(part).max(axis=1, keepdims=True) / np.float32(6)
            quotient = (part / top).astype(self.dtype)
            result[:, start : start + 512] = blocks(quotient.astype("f8"), True) * top
        return result

    def microscaling(self, x: np.ndarray) -> Interval:
        rows, columns = len(self.weight), x.shape[1]
        if self.kind != "W4A4_MXFP4":
            assert self.bias is not None, "'NoneType' object has no attribute 'dtype'"
        powers = 2.0 ** (np.repeat(self.weight_scale.astype(int), 32, axis=1) - 127)
        if self.kind == "W8A8_MXFP8":
            values = self.weight.astype("f8")
        else:
            assert self.weight.dtype == np.uint8 and self.weight.shape == (rows, columns // 2)
            signed = np.concatenate([E2M1, -E2M1])
            values = np.stack([signed[self.weight & 15], signed[self.weight >> 4]], axis=2)
            values = values.reshape(rows, columns)
        values = values * powers[:, :columns]
        if self.kind == "W4A4_MXFP4_DUALSCALE":
            scales = np.repeat(self.weight_dual_scale.astype("f8"), 512, axis=1)
            values = values * scales[:, :columns]
        return self.floats(x, values.T)

    def floats(self, x: np.ndarray, weight: np.ndarray) -> Interval:
        bias = np.zeros(weight.shape[1]) if self.bias is None else self.bias.astype("f8")
        y = x @ weight + bias
        # every order of a float32 sum, and the rounding of each factor
        room = (len(weight) + 8) * 2.0**-24 * (np.abs(x) @ np.abs(weight) + np.abs(bias))
        low, high = (y - room).astype(FP32), (y + room).astype(FP32)
        return low.astype(self.dtype), high.astype(self.dtype)


def e4m3(v: np.ndarray) -> np.ndarray:
    return np.clip(v, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype("f8")


def e2m1(v: np.ndarray) -> np.ndarray:
    """The nearest of the eight magnitudes; a tie goes to the one with an even index (rint)."""
    result = np.empty(v.shape)
    for i, value in np.ndenumerate(v):
        gaps = np.abs(E2M1 - min(abs(value), 6))
        best = np.flatnonzero(gaps == gaps.min())
        pick = best[0] if len(best) == 1 else next(b for b in best if b % 2 == 0)
        result[i] = np.copysign(E2M1[pick], value)
    return result


def blocks(x: np.ndarray, four: bool) -> np.ndarray:
    """What npu_dynamic_mx_quant makes of x, dequantized: scale algorithm 0, rint."""
    result = np.zeros(x.shape)
    for t in range(len(x)):
        for start in range(0, x.shape[1], 32):
            part = x[t, start : start + 32]
            if part.any():
                step = 2.0 ** (np.floor(np.log2(np.abs(part).max())) - (2 if four else 8))
                cast = e2m1 if four else e4m3
                result[t, start : start + 32] = cast(part / step) * step
    return result


STEPS = 3
MS = {"bfloat16": ms.bfloat16, "float16": ms.float16, "float32": ms.float32}


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


def batch(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype("f4")


class Net(nn.Cell):
    """Both kinds of linears, with and without a bias; one of more than 512 inputs, one of odd
    sizes; a row of tiny weights, whose scale is below float16's normal numbers, and large columns.
    """

    def __init__(self, dtype: Any = ms.float32, only: bool | None = None):
        super().__init__()
        first, second = (True, False) if only is None else (only, only)
        self.a = nn.Dense(34, 66, has_bias=first, dtype=dtype)
        self.b = nn.SequentialCell(mint.nn.Linear(66, 1088, bias=second, dtype=dtype), nn.ReLU())
        self.c = nn.Dense(1088, 9, has_bias=first, dtype=dtype)
        self.d = mint.nn.Linear(9, 66, bias=second, dtype=dtype)
        for seed, p in enumerate(self.get_parameters()):
            values = batch(p.size, 1, seed).reshape(p.shape) * np.float32(0.3)
            if values.ndim == 2:
                values[1] *= 1e-5
                values[:, 3] *= 20
            p.set_data(Tensor(values).astype(dtype))

    def construct(self, x):
        return self.d(self.c(self.b(self.a(x))))


INPUTS = {"a": 34, "b.0": 66, "c": 1088, "d": 9}
SMOOTH = {"algorithm": "smoothquant"}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("W8A16", {}),
    ("W4A16", {"group_size": 0}),
    ("W8A8_DYNAMIC", {}),
    ("W8A8_DYNAMIC", SMOOTH),
    ("W8A8_DYNAMIC", {"algorithm": "awq+gptq"}),
    ("W8A8_PER_CHANNEL", {}),
    ("W8A8_PER_CHANNEL", SMOOTH),
    ("W8A8_PER_TENSOR", {}),
    ("W8A8_TIMESTEP", {}),
    ("W8A8_TIMESTEP", SMOOTH),
    ("W4A4_DYNAMIC", {}),
    ("W8A8_MXFP8", {}),
    ("W8A8_MXFP8", SMOOTH),
    ("W4A4_MXFP4", {}),
    ("W4A4_MXFP4", SMOOTH),
    ("W4A4_MXFP4_DUALSCALE", {}),
    ("W4A4_MXFP4_DUALSCALE", SMOOTH),
]
NEEDS_BIAS = ("W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE")  # others are refused, see tests/cells
ONLY = {**dict.fromkeys(NEEDS_BIAS, True), "W4A4_DYNAMIC": False}  # drops a bias: refused
CALIBRATED = (*STATIC, "W8A8_TIMESTEP")
EXCLUDED = {"W4A4_MXFP4_DUALSCALE": ["b.0", "d"], "W4A4_MXFP4": ["d"]}  # 3 blocks, 9 inputs


def calibration(dtype: Any) -> Iterator[Tensor]:
    for t in range(STEPS):
        TimestepManager.set_timestep_idx(t)
        x = (1 + t) * batch(9, 34, t)
        x[:, 5] *= 30
        yield Tensor(x).astype(dtype)


def policy(scheme: str) -> dict[str, Any]:
    made = TimestepPolicyConfig()
    made.register([1, 2], "static", "w8a8_static_linear")
    return {"timestep_policy": made} if scheme == "W8A8_TIMESTEP" else {}


def quantized(scheme: str, options: dict[str, Any], kind: str, **more: Any) -> nn.Cell:
    options = {**options, **policy(scheme), **more}
    if scheme in CALIBRATED or "algorithm" in options:
        options["calibration"] = calibration(MS[kind])
    exclude = EXCLUDED.get(scheme, [])
    return ms_quant.quantize(Net(MS[kind], ONLY.get(scheme)), scheme, exclude=exclude, **options)


def inside(found: np.ndarray, expected: Interval, dtype: np.dtype) -> None:
    with np.errstate(over="ignore"):
        found = found.astype(dtype).astype("f4")
    low, high = (end.astype("f4") for end in expected)
    wrong = ~((low <= found) & (found <= high))
    assert not wrong.any(), (int(wrong.sum()), found[wrong][:3], low[wrong][:3], high[wrong][:3])


@pytest.mark.parametrize("own", [True, False], ids=["own type", "dtype="])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("scheme", "options"), RUNS)
def test_a_runtime_and_a_fresh_network_compute_what_was_quantized(
    scheme: str,
    options: dict[str, Any],
    dtype: str,
    own: bool,
    tmp_path: Path,
    load_tensors: Callable,
) -> None:
    kind, given = (dtype, {}) if own else ("float32", {"dtype": dtype})
    network = quantized(scheme, options, kind, **given)
    path = Path(ms_quant.save_quantized(network, tmp_path / "out"))
    runtime = Runtime(path, load_tensors, dtype)
    fresh = ms_quant.quantize(Net(MS[kind], ONLY.get(scheme)), str(path), **policy(scheme))
    cells, loaded = dict(network.cells_and_names()), dict(fresh.cells_and_names())
    for name, columns in INPUTS.items():
        if name in EXCLUDED.get(scheme, []):
            assert runtime.config(name) is None and loaded[name].cls_name in ("Dense", "Linear")
            continue
        assert runtime.config(name) == scheme
        linear = runtime.linear(name, loaded[name].has_bias)
        x = 3 * batch(6, columns, 40)
        x[:, 7] *= 10
        x = x.astype(DTYPES[dtype])
        for step in range(STEPS):
            TimestepManager.set_timestep_idx(step)
            found = cells[name](Tensor(x.astype("f4"))).asnumpy()
            again = loaded[name](Tensor(x.astype("f4"))).asnumpy()
            np.testing.assert_array_equal(found.view(np.uint32), again.view(np.uint32))
            static = step if scheme == "W8A8_TIMESTEP" and step else None
            inside(found, linear(x, static), DTYPES[dtype])
    assert {p.name for p in fresh.get_parameters()} == {p.name for p in network.get_parameters()}


def test_float32_networks_are_loaded_as_they_were_and_their_rounding_is_said(
    tmp_path: Path,
) -> None:
    for scheme, options in RUNS[::2]:
        network = quantized(scheme, options, "float32")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            path = ms_quant.save_quantized(network, tmp_path / scheme)
        exact = scheme in ("W8A8_MXFP8", "W4A4_MXFP4") and not options
        said = [str(w.message) for w in warned if "is made for float32" in str(w.message)]
        assert len(said) == (not exact), said
        fresh = ms_quant.quantize(Net(only=ONLY.get(scheme)), path, **policy(scheme))
        x = Tensor(batch(3, 34, 50))
        TimestepManager.set_timestep_idx(1)
        np.testing.assert_array_equal(network(x).asnumpy(), fresh(x).asnumpy())


@pytest.mark.filterwarnings("ignore:.*is made for float32")
@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A16", "W8A8_PER_CHANNEL"])
def test_files_of_others_are_rounded_as_the_loader_rounds_them(
    scheme: str, tmp_path: Path, load_tensors: Callable
) -> None:
    """msModelSlim writes float32; what it was is not what a bfloat16 model computes with."""
    network = quantized(scheme, {} if scheme == "W8A16" else SMOOTH, "float32")
    path = Path(ms_quant.save_quantized(network, tmp_path / "f32"))
    before, changed = dict(network.cells_and_names()), 0
    for dtype in ("bfloat16", "float16"):
        if scheme in CALIBRATED and dtype == "float16":
            continue  # deq_scale is float32 there, which the operator does not take
        fresh = ms_quant.quantize(Net(), path, dtype=MS[dtype])
        runtime, loaded = Runtime(path, load_tensors, dtype), dict(fresh.cells_and_names())
        for name, columns in INPUTS.items():
            x = batch(6, columns, 40).astype(DTYPES[dtype])
            linear = runtime.linear(name, loaded[name].has_bias)
            if scheme == "W8A16" and dtype == "float16" and linear.bias is not None:
                continue  # the bias is float32 there, likewise
            found = loaded[name](Tensor(x.astype("f4"))).asnumpy()
            inside(found, linear(x), DTYPES[dtype])
            changed += int((found != before[name](Tensor(x.astype("f4"))).asnumpy()).sum())
    assert changed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("scheme", "options", "algorithm"),
    [
        ("W8A8_DYNAMIC", {}, "smoothquant"),
        ("W8A8", {}, "smoothquant"),
        ("W4A16", {"group_size": 0}, "minmax"),
        ("W4A4_MXFP4", {}, "smoothquant"),
        ("W8A8_MXFP8", {}, "smoothquant"),
        ("W4A4_MXFP4_DUALSCALE", {}, "smoothquant"),
    ],
)
def test_decoders_are_evaluated_as_they_run(
    scheme: str,
    options: dict[str, Any],
    algorithm: str,
    dtype: str,
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    load_tensors: Callable,
) -> None:
    """The linears with biases of a float32 model whose weights no narrow type holds."""
    source = tiny_model(
        family="qwen2", layers=1, dtype="float32", hidden_size=64, intermediate_size=64
    )
    calibrated = {"calib": calib_text, "samples": 2, "seq_len": 16}
    out = tmp_path / "out"
    run_job(
        QuantizeOptions(
            source,
            out,
            scheme=scheme,
            algorithm=algorithm,
            dtype=dtype,
            formats=("mindie-sd",),
            **split_options(options),
            float_undivided=scheme in NEEDS_BIAS,
            **(calibrated if algorithm != "minmax" else {}),
        )
    )
    (path,) = out.glob("quant_model_description_*.json")
    runtime, model = Runtime(path, load_tensors, dtype), open_model(out)
    count = 0
    for member in model.config.block(0).linears:
        name = f"model.layers.0.{member}"
        linear = model.linear(name)
        if linear is None:
            assert runtime.config(name) is None and scheme in NEEDS_BIAS
            continue
        x = batch(5, linear.weight.shape[1], 3).astype(DTYPES[dtype])
        expected = runtime.linear(name, linear.bias is not None)(x)
        inside(linear.forward(x.astype("f4")), expected, DTYPES[dtype])
        count += 1
    assert count == (3 if scheme in NEEDS_BIAS else 7)


def test_types_may_differ_between_layers(tmp_path: Path, load_tensors: Callable) -> None:
    network = ms_quant.quantize(Net(), "W8A16", include=["a"], dtype="bfloat16")
    ms_quant.quantize(network, "W8A8_DYNAMIC", include=["b*"], dtype="bfloat16")
    path = Path(ms_quant.save_quantized(network, tmp_path, rank=0))
    runtime = Runtime(path, load_tensors, "bfloat16")
    assert [runtime.config(name) for name in INPUTS] == ["W8A16", "W8A8_DYNAMIC", None, None]
    x = Tensor(batch(3, 34, 50))
    fresh = ms_quant.quantize(Net(), path)
    np.testing.assert_array_equal(network(x).asnumpy(), fresh(x).asnumpy())
    ms_quant.quantize(network, "W8A8_DYNAMIC", include=["c"])
    with pytest.raises(MsQuantError, match=r"b\.0 for bfloat16 and c for float32, expected"):
        ms_quant.save_quantized(network, tmp_path / "mixed")
