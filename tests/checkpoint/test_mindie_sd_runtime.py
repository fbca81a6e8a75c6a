"""Networks saved for MindIE-SD, read by its documented rules and formulas, written here anew.

Nothing of the package reads the files: lookup, packing, scales and products are NumPy and loops.
"""

from __future__ import annotations

import json
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
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

STEPS = 3
DROPPING = "W4A4_DYNAMIC"  # drops a bias: refused, see tests/cells/test_load.py
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


class Net(nn.Cell):
    """Odd sizes, a single row, both kinds of linears, at several depths."""

    def __init__(self, bias: bool = True, seed: int = 0):
        super().__init__()
        self.first = nn.Dense(34, 66, has_bias=bias)
        self.blocks = nn.CellList(
            [nn.SequentialCell(mint.nn.Linear(66, 70, bias=bias), nn.ReLU()) for _ in range(2)]
        )
        self.middle = nn.Dense(70, 66, has_bias=bias)
        self.last = mint.nn.Linear(70, 1, bias=bias)
        rng = np.random.default_rng(seed)
        for p in self.get_parameters():
            p.set_data(Tensor(rng.standard_normal(p.shape).astype("f4") * 0.3))

    def construct(self, x):
        x = self.blocks[0](self.first(x))
        return self.last(self.blocks[1](self.middle(x)))


LAYERS = {
    "first": (66, 34),
    "blocks.0.0": (70, 66),
    "blocks.1.0": (70, 66),
    "middle": (66, 70),
    "last": (1, 70),
}


class Runtime:
    """What MindIE-SD does with two files and the names of a model's linears."""

    def __init__(self, path: Path, load: Callable[[Path], dict[str, np.ndarray]], dtype: str):
        self.json = json.loads(path.read_text())
        self.dtype = dtype
        kind = self.json["model_quant_type"].lower()
        last = path.stem.split("_")[-1]
        rank = f"_{last}" if last.isdigit() else ""
        assert path.name == f"quant_model_description_{kind}{rank}.json"
        files = sorted(file.name for file in path.parent.iterdir())
        assert files == [path.name, f"quant_model_weight_{kind}{rank}.safetensors"]
        self.tensors = load(path.parent)

    def config(self, name: str) -> str | None:
        patterns = [f"{name}.linear.weight", f"{name}.weight", name, f"{name}.fa_q.scale"]
        patterns.append(f"{name}.quant_type")
        if any(self.json.get(pattern) == "FLOAT" for pattern in patterns):
            return None
        return next((self.json[p].upper() for p in patterns if p in self.json), None)

    def forward(self, name: str, x: np.ndarray, static: int | None = None) -> np.ndarray:
        kind, prefix = self.config(name), name
        x = x.astype(np.float64)
        if f"{name}.div.mul_scale" in self.tensors:
            assert kind not in ("W8A16", "W4A16", "W4A4_DYNAMIC"), "the factor is ignored"
            prefix = f"{name}.linear"
            x = (x.astype("f4") * self.tensors[f"{name}.div.mul_scale"]).astype("f8")

        def get(suffix: str) -> np.ndarray:
            assert f"{prefix}.{suffix}" in self.tensors, f"Critical parameter missing: {suffix}"
            return self.tensors[f"{prefix}.{suffix}"]

        weight = get("weight")
        rows = len(weight)
        bias = self.tensors.get(f"{prefix}.bias", np.zeros(rows, "f4")).astype("f8")
        if kind in ("W8A16", "W4A16"):
            assert weight.dtype == np.int8
            assert kind == "W8A16" or (weight.min() >= -8 and weight.max() <= 7)
            return x @ (weight * wide(get("weight_scale"), (rows, 1))).T + bias
        if kind in ("W8A8_PER_CHANNEL", "W8A8_PER_TENSOR"):
            return self.static(get, x, slice(None))
        if kind == "W8A8_TIMESTEP" and static is not None:
            assert get("input_scale").shape == get("input_offset").shape == (STEPS, 1)
            assert get("quant_bias").shape == get("deq_scale").shape == (STEPS, rows)
            return self.static(get, x, static)
        if kind in ("W8A8_DYNAMIC", "W8A8_TIMESTEP", "W4A4_DYNAMIC"):
            if kind == "W4A4_DYNAMIC":
                assert f"{prefix}.bias" not in self.tensors, "the bias is dropped"
            step = np.abs(x).max(axis=1, keepdims=True) / (7 if kind[:2] == "W4" else 127)
            codes = np.rint((x.astype("f4") / step.astype("f4")).astype("f8"))
            product = codes @ weight.astype("f8").T * step
            return product * wide(get("weight_scale"), (rows, 1)).T + bias
        if kind in ("W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE"):
            assert get("bias").dtype == np.float32, "fails on a bias of None"
        return self.microscaling(kind or "", get, x) + bias

    def static(self, get: Callable[[str], np.ndarray], x: np.ndarray, row: Any) -> np.ndarray:
        deq, step = get("deq_scale")[row], get("input_scale")[row]
        wanted = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32
        assert step.dtype == wanted
        if self.dtype == "float16":
            assert deq.dtype == np.int64
            deq = np.array([np.uint32(bits) for bits in deq], np.uint32).view(np.float32)
        steps = (x.astype("f4") / step.astype("f4")).astype("f4") + get("input_offset")[row]
        codes = np.clip(np.rint(steps), -128, 127).astype(np.int64)
        total = codes @ get("weight").astype(np.int64).T + get("quant_bias")[row]
        return total * deq.astype("f8")

    @staticmethod
    def microscaling(kind: str, get: Callable[[str], np.ndarray], x: np.ndarray) -> np.ndarray:
        columns, weight = x.shape[1], get("weight")
        assert get("weight_scale").dtype == np.uint8
        powers = 2.0 ** (np.repeat(get("weight_scale").astype(int), 32, axis=1) - 127)
        if kind == "W8A8_MXFP8":
            values = weight.astype("f4").astype("f8")
            return blocks(x, 8, e4m3) @ (values * powers[:, :columns]).T
        assert weight.dtype == np.uint8 and weight.shape[1] * 2 == columns
        signed = np.concatenate([E2M1, -E2M1])
        values = np.stack([signed[weight & 15], signed[weight >> 4]], axis=2)
        values = values.reshape(len(weight), columns) * powers[:, :columns]
        if kind == "W4A4_MXFP4":
            return blocks(x, 2, lambda v: e2m1(v, away=True)) @ values.T
        dual = get("weight_dual_scale")
        assert dual.dtype == np.float32 and dual.shape == (len(weight), -(-columns // 512), 1)
        values = values * np.repeat(dual[..., 0], 512, axis=1)[:, :columns]
        top = np.repeat(
            [[np.abs(r[s : s + 512]).max() / 6 for s in range(0, columns, 512)] for r in x], 512, 1
        )[:, :columns].astype("f4")
        scaled = (x.astype("f4") / top).astype("f8")
        return (blocks(scaled, 2, lambda v: e2m1(v, away=False)) * top) @ values.T


def wide(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    assert array.shape == shape
    return array.astype(np.float32).astype(np.float64)


def e4m3(v: np.ndarray) -> np.ndarray:
    return np.clip(v, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype("f8")


def e2m1(v: np.ndarray, away: bool) -> np.ndarray:
    """The nearest of the eight magnitudes; a tie goes up, or to the one with an even index."""
    result = np.empty(v.shape)
    for i, value in np.ndenumerate(v):
        gaps = np.abs(E2M1 - min(abs(value), 6))
        best = np.flatnonzero(gaps == gaps.min())
        pick = best[-1] if away or len(best) == 1 else next(b for b in best if b % 2 == 0)
        result[i] = np.copysign(E2M1[pick], value)
    return result


def blocks(x: np.ndarray, largest: int, cast: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    result = np.zeros(x.shape)
    for t in range(len(x)):
        for start in range(0, x.shape[1], 32):
            part = x[t, start : start + 32]
            step = 2.0 ** (np.floor(np.log2(np.abs(part).max())) - largest)
            result[t, start : start + 32] = cast(part / step) * step
    return result


def batch(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype("f4")


def calibration() -> Iterator[Tensor]:
    for t in range(STEPS):
        TimestepManager.set_timestep_idx(t)
        yield Tensor((1 + t) * batch(9, 34, t))


def policy() -> TimestepPolicyConfig:
    made = TimestepPolicyConfig()
    made.register([1, 2], "static", "w8a8_static_linear")
    return made


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("W8A16", {}),
    ("W4A16", {"group_size": 0}),
    ("W8A8_DYNAMIC", {}),
    ("W8A8_DYNAMIC", {"algorithm": "smoothquant"}),
    ("W8A8_PER_CHANNEL", {}),
    ("W8A8_PER_CHANNEL", {"algorithm": "smoothquant"}),
    ("W8A8_PER_TENSOR", {}),
    ("W8A8_TIMESTEP", {}),
    ("W8A8_TIMESTEP", {"algorithm": "smoothquant"}),
    ("W4A4_DYNAMIC", {}),
    ("W8A8_MXFP8", {}),
    ("W4A4_MXFP4", {}),
    ("W4A4_MXFP4_DUALSCALE", {}),
]


def quantized(scheme: str, bias: bool, options: dict[str, Any]) -> nn.Cell:
    options = dict(options)
    if scheme in ("W8A8_PER_CHANNEL", "W8A8_PER_TENSOR", "W8A8_TIMESTEP") or "algorithm" in options:
        options["calibration"] = calibration()
    if scheme == "W8A8_TIMESTEP":
        options["timestep_policy"] = policy()
    return ms_quant.quantize(Net(bias), scheme, exclude=["middle"], **options)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize(
    ("scheme", "options", "bias"),
    [(*run, bias) for run in RUNS for bias in (True, False) if not bias or run[0] != DROPPING],
)
def test_a_runtime_and_a_fresh_network_compute_what_was_quantized(
    scheme: str,
    options: dict[str, Any],
    bias: bool,
    dtype: str | None,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    network = quantized(scheme, bias, options)
    path = Path(ms_quant.save_quantized(network, tmp_path / "out", dtype=dtype))
    runtime = Runtime(path, load_tensors, dtype or "float32")
    given = {"timestep_policy": policy()} if scheme == "W8A8_TIMESTEP" else {}
    fresh = ms_quant.quantize(Net(bias), str(path), **given)
    cells, loaded = dict(network.cells_and_names()), dict(fresh.cells_and_names())
    for name, (rows, columns) in LAYERS.items():
        if name == "middle":
            assert runtime.config(name) is None and loaded[name].cls_name == "Dense"
            continue
        assert runtime.config(name) == scheme
        x = batch(6, columns, 40)
        for step in range(STEPS):
            TimestepManager.set_timestep_idx(step)
            found = cells[name](Tensor(x)).asnumpy()
            again = loaded[name](Tensor(x)).asnumpy()
            np.testing.assert_array_equal(found.view(np.uint32), again.view(np.uint32))
            expected = runtime.forward(name, x, step if step else None)
            assert found.shape == (6, rows)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    x = Tensor(batch(3, 34, 50))
    np.testing.assert_array_equal(network(x).asnumpy(), fresh(x).asnumpy())
    assert {p.name for p in fresh.get_parameters()} == {p.name for p in network.get_parameters()}


@pytest.mark.parametrize("scheme", ["W8A16", "W8A8_DYNAMIC", "W4A4_MXFP4"])
@pytest.mark.parametrize(("kind", "dtype"), [(ms.bfloat16, "bfloat16"), (ms.float16, "float16")])
def test_narrow_networks_have_scales_in_their_type(
    kind: Any,
    dtype: str,
    scheme: str,
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
) -> None:
    def make() -> nn.Cell:
        net = nn.SequentialCell(nn.Dense(34, 7, dtype=kind), nn.Dense(7, 3, dtype=kind))
        for seed, p in enumerate(net.get_parameters()):
            p.set_data(Tensor(batch(p.size, 1, seed).reshape(p.shape)).astype(kind))
        return net

    network = ms_quant.quantize(make(), scheme, exclude=["1"])
    path = Path(ms_quant.save_quantized(network, tmp_path, dtype=dtype, rank=0))
    runtime = Runtime(path, load_tensors, dtype)
    stored = {name: array.dtype.name for name, array in runtime.tensors.items()}
    if scheme != "W4A4_MXFP4":
        assert stored["0.weight_scale"] == ("bfloat16" if dtype == "bfloat16" else "float32")
    assert stored["1.weight"] == stored["1.bias"] == dtype
    fresh = ms_quant.quantize(make(), path)
    x = batch(5, 34, 3)
    for given in (Tensor(x), Tensor(x).astype(kind)):
        found, again = network[0](given), fresh[0](given)
        assert found.dtype == again.dtype == given.dtype
        np.testing.assert_array_equal(
            found.astype(ms.float32).asnumpy(), again.astype(ms.float32).asnumpy()
        )
    expected = runtime.forward("0", x)
    np.testing.assert_allclose(network[0](Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-4)


def test_types_may_differ_between_layers(tmp_path: Path, load_tensors: Callable) -> None:
    network = ms_quant.quantize(Net(), "W8A16", include=["first"])
    ms_quant.quantize(network, "W8A8_DYNAMIC", include=["blocks.*"])
    path = Path(ms_quant.save_quantized(network, tmp_path))
    runtime = Runtime(path, load_tensors, "float32")
    assert [runtime.config(name) for name in LAYERS] == [
        "W8A16",
        "W8A8_DYNAMIC",
        "W8A8_DYNAMIC",
        None,
        None,
    ]
    x = Tensor(batch(3, 34, 50))
    fresh = ms_quant.quantize(Net(), path)
    np.testing.assert_array_equal(network(x).asnumpy(), fresh(x).asnumpy())
