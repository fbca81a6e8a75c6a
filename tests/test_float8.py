"""Float8 blocks from the command to the file: quantized, read back, verified against the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import QuantizedModel
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "layers": 1}
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def make(tiny_model: Any, tmp_path: Path, calib_text: Path) -> Any:
    def run(algorithm: str = "minmax", dtype: str = "bfloat16", **model: Any) -> Path:
        source = tiny_model(**{"family": "qwen2", **SHAPE, **model})
        data = {} if algorithm == "minmax" else {"calib": calib_text, "samples": 2, "seq_len": 16}
        out = tmp_path / "out"
        run_job(
            QuantizeOptions(
                source,
                out,
                "W8A8FP8_BLOCK",
                algorithm,
                formats=("compressed-tensors",),
                dtype=dtype,
                **data,
            )
        )
        return out

    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_files(make: Any, load_tensors: Any, dtype: str) -> None:
    out = make(dtype=dtype)
    stored = load_tensors(out)
    for path, shape, blocks in ((K_PROJ, (64, 128), (1, 1)), (DOWN, (128, 256), (1, 2))):
        weight, scale = stored[f"{path}.weight"], stored[f"{path}.weight_scale"]
        assert (weight.dtype.name, weight.shape) == ("float8_e4m3fn", shape)
        assert (scale.dtype.name, scale.shape) == (dtype, blocks)
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    group = entry["config_groups"]["group_0"]
    assert entry["format"] == group["format"] == "float-quantized"
    assert group["weights"]["block_structure"] == [128, 128]
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": 128,
        "strategy": "group",
        "dynamic": True,
    }


@pytest.mark.parametrize("algorithm", ["minmax", "gptq", "smoothquant"])
def test_it_is_proved(make: Any, tmp_path: Path, algorithm: str) -> None:
    found = verify_checkpoint(make(algorithm), tmp_path / "model")
    assert (found.verdict, found.problems) == ("right", ())
    again = {"minmax": 7, "gptq": 0, "smoothquant": 3}[algorithm]  # smoothing may go into rows
    assert found.made_again >= again


def test_what_is_computed_is_what_the_files_say(make: Any, load_tensors: Any) -> None:
    out = make()
    stored, model = load_tensors(out), QuantizedModel(out)
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    linear = model.linear(DOWN)
    assert linear is not None
    weight = stored[f"{DOWN}.weight"].astype(np.float32)
    weight *= np.repeat(stored[f"{DOWN}.weight_scale"].astype(np.float32), 128, axis=1)
    seen = np.empty_like(x)
    for start in (0, 128):
        group = x[:, start : start + 128]
        scale = np.abs(group).max(axis=1, keepdims=True) / np.float32(448)
        codes = (group / scale).astype(stored[f"{DOWN}.weight"].dtype)
        seen[:, start : start + 128] = codes.astype(np.float32) * scale
    np.testing.assert_allclose(linear.forward(x), seen @ weight.T, rtol=1e-5, atol=1e-6)


def test_a_changed_code_or_scale_is_seen(
    make: Any, tmp_path: Path, load_tensors: Any, save_tensors: Any
) -> None:
    out = make()
    tensors = load_tensors(out)
    (out / "ms_quant.json").unlink()
    shard = next(out.glob("*.safetensors"))
    codes = tensors[f"{K_PROJ}.weight"].view(np.uint8)
    codes[3, 4] = 0x7F
    save_tensors(shard, tensors)
    (out / "model.safetensors.index.json").unlink()
    shard.rename(out / "model.safetensors")
    assert f"{K_PROJ}.weight: 1 of 8192 values are NaN" in verify_checkpoint(out).problems[0]
    codes[3, 4] = 0
    tensors[f"{K_PROJ}.weight_scale"] *= -1
    save_tensors(out / "model.safetensors", tensors)
    assert "scales are not positive" in verify_checkpoint(out).problems[0]


def test_inputs_that_groups_do_not_divide_are_refused(make: Any, tmp_path: Path) -> None:
    message = r"q_proj\.weight: groups of 128 do not divide K = 96; expected --float-undivided to"
    with pytest.raises(MsQuantError, match=message):
        make(hidden_size=96)
    assert not (tmp_path / "out").exists()
