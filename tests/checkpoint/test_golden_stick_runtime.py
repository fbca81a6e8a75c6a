"""Whole golden-stick checkpoints, read by the Native backend's rules, written here anew.

Nothing of the package reads them: what a layer is and what it computes are plain loops and NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.formats.opening import open_model
from ms_quant.pipeline.run import QuantizeOptions, run_job

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
SHAPES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 2, "seq_len": 16}
ENDINGS = ("quantization_description.json", "quant_model_description.json")
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
SHARDS = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
BF16 = np.dtype(ml_dtypes.bfloat16)


class Native:
    """What the Native backend looks for and what it would take without a word."""

    def __init__(self, directory: Path, tensors: dict[str, np.ndarray]):
        config = json.loads((directory / "config.json").read_text())
        assert not {"quantization_config", "compression_config"} & config.keys()
        found = [p for p in directory.iterdir() if p.name.endswith(ENDINGS)]
        if len(found) != 1:
            raise ValueError("expected exactly one description")
        self.description = json.loads(found[0].read_text())
        self.tensors = tensors
        self.model_type = {"bfloat16": BF16, "float16": np.dtype("f2")}[config["torch_dtype"]]
        modules: dict[str, set[str]] = {}
        for name, kind in self.description.items():
            if kind not in ("FLOAT", "W8A8", "W8A8S"):
                raise ValueError("Unsupported quantization strategy")
            modules.setdefault(name.rpartition(".")[0], set()).add(kind)
        assert all(len(kinds) == 1 for kinds in modules.values())

    def kind(self, prefix: str) -> str:
        """The first entry whose name, fused, contains the layer's prefix."""
        for name, kind in self.description.items():
            for shard, fused in FUSED.items():
                name = name.replace(shard, fused)
            if prefix in name:
                return kind
        return "FLOAT"

    def forward(self, index: int, fused: str, x: np.ndarray) -> list[np.ndarray]:
        """What each part of a fused layer gives; the last part's input parameters win."""
        paths = [f"model.layers.{index}.{shard}" for shard in SHARDS[fused]]
        scale = self._get(paths[-1], "input_scale", self.model_type, x.shape[1]).astype("f4")
        offset = self._get(paths[-1], "input_offset", np.dtype("i1"), x.shape[1]).astype("f4")
        codes = np.clip(np.rint(x / scale + offset), -128, 127).astype(np.int64)
        return [self._product(path, codes) for path in paths]

    def _product(self, path: str, codes: np.ndarray) -> np.ndarray:
        weight = self.tensors[f"{path}.weight"]
        rows = len(weight)
        assert weight.dtype == np.int8
        bias = self._get(path, "quant_bias", np.dtype("i4"), rows).astype(np.int64)
        scale = self._get(path, "deq_scale", np.dtype("f4"), rows)
        y = (codes @ weight.T.astype(np.int64) + bias) * scale.astype("f8")
        if f"{path}.bias" in self.tensors:
            y = y + self._get(path, "bias", self.model_type, rows).astype("f8")
        return y

    def _get(self, path: str, suffix: str, dtype: np.dtype, size: int) -> np.ndarray:
        found = self.tensors[f"{path}.{suffix}"]
        assert (found.dtype, found.shape) == (dtype, (size,))
        return found


@pytest.fixture
def make(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path, load_tensors: Callable
) -> Callable[..., tuple[Path, Native]]:
    def run(scheme: str = "W8A8", **options: Any) -> tuple[Path, Native]:
        source = tiny_model(family="qwen2", layers=2, **SHAPES)
        if scheme == "W8A8":
            options = {**options, "calib": calib_text, **CALIBRATED}
        request = QuantizeOptions(source, tmp_path / "out", scheme, **options)
        run_job(request)
        return tmp_path / "out", Native(tmp_path / "out", load_tensors(tmp_path / "out"))

    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("algorithm", "target"), [("minmax", ""), ("smoothquant", ""), ("smoothquant", "norm")]
)
def test_the_runtime_computes_what_was_quantized(make, algorithm, target, dtype):
    directory, runtime = make(algorithm=algorithm, smoothing_target=target, dtype=dtype)
    model = open_model(directory)
    for fused, shards in SHARDS.items():
        assert runtime.kind(f"model.layers.1.{fused}") == "W8A8"
        linears = [model.linear(f"model.layers.1.{shard}") for shard in shards]
        x = np.random.default_rng(0).standard_normal((5, linears[0].weight.shape[1]), np.float32)
        for linear, found in zip(linears, runtime.forward(1, fused, x), strict=True):
            np.testing.assert_allclose(linear.forward(x), found, rtol=1e-5, atol=1e-5)


def test_float_layers_and_heads(make):
    _, runtime = make(exclude=("*.0.*.up_proj", "*.1.*.o_proj"))
    kinds = {
        f"{index}.{fused}": runtime.kind(f"model.layers.{index}.{fused}")
        for index in range(2)
        for fused in SHARDS
    }
    floats = {path for path, kind in kinds.items() if kind == "FLOAT"}
    assert floats == {"0.mlp.gate_up_proj", "1.self_attn.o_proj"}
    assert runtime.kind("lm_head") == runtime.kind("model.norm") == "FLOAT"
    assert set(runtime.description) == set(runtime.tensors)


def test_the_other_scheme_is_none_of_native(make):
    """``not_served_by`` says so before any work."""
    with pytest.raises(ValueError, match="Unsupported quantization strategy"):
        make("W8A8_DYNAMIC")


def test_a_second_description_is_none(make, tmp_path):
    directory, runtime = make()
    (directory / "quant_model_description.json").write_text("{}")
    with pytest.raises(ValueError, match="exactly one description"):
        Native(directory, runtime.tensors)
