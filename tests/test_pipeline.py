"""Quantizing a checkpoint against plain NumPy, and everything that may stop it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.budget import BUDGET, Budget
from ms_quant.data.calibration import load_tokens
from ms_quant.errors import MsQuantError
from ms_quant.job.directory import JobDirectory
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

BF16 = ml_dtypes.bfloat16
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
Tensors = dict[str, np.ndarray]


@pytest.fixture
def quantize(tmp_path: Path, calib_text: Path) -> Callable[..., Path]:
    """Quantizes with four windows of sixteen tokens."""

    def run(model: Path, name: str = "out", budget: Budget = BUDGET, **options: Any) -> Path:
        wanted = {"calib": calib_text, "samples": 4, "seq_len": 16}
        if options.get("scheme") == "W8A8_DYNAMIC":
            wanted = {}
        run_job(QuantizeOptions(model, tmp_path / name, **{**wanted, **options}), budget=budget)
        return tmp_path / name

    return run


STRENGTH = {"algorithm_options": {"alpha": 0.7}}


def rounded_up(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The smallest value of a 16-bit type that is at least x, found among all there are."""
    infinity = int(np.array(np.inf).astype(dtype).view(np.uint16))
    every = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)
    return every[np.searchsorted(every, np.asarray(x, np.float64))].astype(np.float32)


def by_hand(x: np.ndarray, weights: Tensors, smooth: np.ndarray, dtype: np.dtype) -> Tensors:
    """The W8A8 tensors of linears that read ``x``, float32 (tokens, in); suffixes after paths."""
    xs = x / smooth
    low, high = min(0.0, float(xs.min())), max(0.0, float(xs.max()))
    scale = np.float32((high - low) / 255)
    offset = int(np.clip(np.rint(-128 - low / float(scale)), -128, 127))
    stored = rounded_up(float(scale) * smooth.astype(np.float64), dtype)
    found = {}
    for path, weight in weights.items():
        smoothed = weight * (stored / scale)
        step = np.abs(smoothed).max(axis=1) / np.float32(127)
        codes = np.clip(np.rint(smoothed / step[:, None]), -128, 127).astype(np.int8)
        found[f"{path}.weight"] = codes
        found[f"{path}.deq_scale"] = scale * step
        found[f"{path}.quant_bias"] = (-offset * codes.astype(np.int64).sum(1)).astype(np.int32)
        found[f"{path}.input_scale"] = stored.astype(dtype)
        found[f"{path}.input_offset"] = np.full(x.shape[1], offset, np.int8)
    return found


def linear_inputs(model: Path, tensors: Tensors, batches: list[np.ndarray]) -> Tensors:
    """What every linear of the float model reads, tokens concatenated."""
    from mindspore import Tensor, nn

    from ms_quant.cells.decoder import CausalLM, forward
    from ms_quant.models.config import load_config

    seen: dict[str, list[np.ndarray]] = {}

    class Spy(nn.Cell):
        def __init__(self, path: str, inner: nn.Cell):
            super().__init__()
            self.path, self.inner = path, inner

        def construct(self, x: Tensor) -> Tensor:
            seen.setdefault(self.path, []).append(x.asnumpy().reshape(-1, x.shape[-1]).copy())
            return self.inner(x)

    network = CausalLM(load_config(model))
    for name, parameter in network.parameters_and_names():
        parameter.set_data(Tensor(tensors[name].astype(np.float32)))
    for index, block in enumerate(network.model.layers):
        for path in (path for group in GROUPS for path in group):
            part, last = path.split(".")
            parent = getattr(block, part)
            setattr(parent, last, Spy(f"model.layers.{index}.{path}", getattr(parent, last)))
    for batch in batches:
        forward(network, batch)
    return {path: np.concatenate(parts) for path, parts in seen.items()}


def smoothing(x: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    act = np.abs(x).max(axis=0).astype(np.float64)
    weight = np.max([np.abs(w).max(axis=0) for w in weights], axis=0).astype(np.float64)
    return np.maximum(act**alpha / weight ** (1 - alpha), 1e-5).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "family", "batch"),
    [
        ({}, {"family": "qwen3"}, 4),
        ({}, {"family": "llama", "dtype": "float16", "biases": True}, 3),  # a short last batch
        ({}, {"family": "qwen2", "dtype": "float32", "tied": True}, 1),
        (
            {"algorithm": "smoothquant", **STRENGTH},
            {"family": "qwen2", "shards": 3},
            4,
        ),
        ({"exclude": ("*.0.mlp.up_proj", "*.v_proj")}, {"family": "qwen3"}, 4),
        ({"dtype": "float16"}, {"family": "qwen3"}, 4),
    ],
)
def test_calibrated_tensors_are_those_of_the_oracle(
    options: dict,
    family: dict,
    batch: int,
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Path],
    calib_text: Path,
    load_tensors: Callable[[Path], Tensors],
) -> None:
    model = tiny_model(**family)
    source = load_tensors(model)
    found = load_tensors(quantize(model, budget=Budget(batch_tokens=batch * 16), **options))
    given = options.get("dtype") or family.get("dtype", "bfloat16")
    dtype = np.dtype(np.float16 if given == "float16" else BF16)
    tokens = load_tokens(calib_text, model, 4, 16, 0)
    inputs = linear_inputs(model, source, [tokens[i : i + batch] for i in range(0, 4, batch)])
    expected = {name: array.astype(np.float32).astype(dtype) for name, array in source.items()}
    floats = {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    floats |= {f"model.layers.{i}.{path}" for i in range(2) for path in GROUPS[0]}
    for index in range(2):
        for group in GROUPS:
            paths = [f"model.layers.{index}.{path}" for path in group]
            if options.get("exclude") and set(paths) <= floats:
                continue
            weights = {path: source[f"{path}.weight"].astype(np.float32) for path in paths}
            x = inputs[paths[0]]
            smooth = np.ones(x.shape[1], np.float32)
            if options.get("algorithm") == "smoothquant":
                smooth = smoothing(x, list(weights.values()), options["algorithm_options"]["alpha"])
            expected.update(by_hand(x, weights, smooth, dtype))
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_data_free_tensors_are_those_of_the_oracle(
    dtype: str,
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Path],
    load_tensors: Callable[[Path], Tensors],
) -> None:
    model = tiny_model(family="qwen2", dtype=dtype)
    found = load_tensors(quantize(model, scheme="W8A8_DYNAMIC"))
    stored = np.dtype(np.float16 if dtype == "float16" else BF16)
    for name, array in load_tensors(model).items():
        exact, path = array.astype(np.float32), name.removesuffix(".weight")
        if path.endswith("_proj"):
            scale = np.abs(exact).max(axis=1) / np.float32(127)
            if stored == BF16:
                scale = rounded_up(scale, stored)
            codes = np.clip(np.rint(exact / scale[:, None]), -128, 127)
            np.testing.assert_array_equal(found.pop(f"{path}.weight"), codes.astype(np.int8))
            scales = found.pop(f"{path}.weight_scale")
            assert scales.dtype == (stored if stored == BF16 else np.float32)
            np.testing.assert_array_equal(scales.astype(np.float32), scale)
        else:
            np.testing.assert_array_equal(found.pop(name), exact.astype(stored), name)
    assert not found


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_the_same_bytes_again_and_from_shards_and_in_any_order(
    scheme: str,
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Path],
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    def reverse(tensors: Tensors) -> None:
        for name in reversed(list(tensors)):
            tensors[name] = tensors.pop(name)

    model, options = tiny_model(), {"scheme": scheme, "shard_bytes": 6000}
    first = file_contents(quantize(model, "first", **options))
    assert len([name for name in first if name.endswith(".safetensors")]) > 2
    assert file_contents(quantize(model, "second", **options)) == first
    del first["ms_quant.json"]  # it says what the source was
    for name, change in (("sharded", {"shards": 4}), ("reversed", {"change": reverse})):
        other = quantize(tiny_model(name, **change), f"out-{name}", **options)
        contents = file_contents(other)
        del contents["ms_quant.json"]
        assert contents == first, name


def test_what_the_output_directory_holds(
    tiny_model: Callable[..., Path], quantize: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model()
    output = quantize(model, shard_bytes=6000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    description = json.loads((output / "quantization_description.json").read_text())
    assert sorted(index["weight_map"]) == sorted(description)
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in output.glob("*.safetensors"))
    assert shards[0] == f"quant-model-00001-of-{len(shards):05d}.safetensors"
    record = json.loads((output / "ms_quant.json").read_text())["record"]
    assert record["calibration"]["samples"] == 4 and record["calibration"]["seq_len"] == 16
    assert record["calibration"]["seed"] == 0 and record["scheme"] == "W8A8"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["calib.txt", "model", "out"]  # no job, no partial directory


def test_a_finished_output_says_so_and_is_not_touched(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(tiny_model(), tmp_path / "out", calib=calib_text, seq_len=16)
    assert run_job(options).finished_before is False
    before = {path: path.stat().st_mtime_ns for path in options.output.iterdir()}
    (tmp_path / "out.job").mkdir()
    record = json.dumps(prepare(options).record)
    (tmp_path / "out.job" / "job.json").write_text(record)  # as after a kill at the very end
    assert run_job(options).finished_before is True
    assert {path: path.stat().st_mtime_ns for path in options.output.iterdir()} == before
    assert not (tmp_path / "out.job").exists()


OTHER = [
    ({"scheme": "W8A8_DYNAMIC"}, "scheme = 'W8A8', now scheme is 'W8A8_DYNAMIC'"),
    ({"algorithm": "smoothquant"}, "algorithm = 'minmax', now algorithm is 'smoothquant'"),
    ({"dtype": "float16"}, "dtype = 'bfloat16', now dtype is 'float16'"),
    ({"samples": 3}, "calibration.samples = 4, now calibration.samples is 3"),
    ({"seq_len": 8}, "calibration.seq_len = 16, now calibration.seq_len is 8"),
    ({"seed": 1}, "calibration.seed = 0, now calibration.seed is 1"),
    ({"exclude": ("*.o_proj",)}, "exclude = [], now exclude is ['*.o_proj']"),
]


@pytest.mark.parametrize(("changed", "message"), OTHER)
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_other_options_are_refused_with_both_values(
    changed: dict,
    message: str,
    state: str,
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(layers=1)
    if state == "finished":
        quantize(model)
    else:
        interrupt(monkeypatch, lambda: quantize(model))
    with pytest.raises(MsQuantError) as error:
        quantize(model, **changed)
    assert message in str(error.value)


def interrupt(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Stops a job when its first block is finished."""

    def stop(job: JobDirectory, index: int, *rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "finish_block", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
