"""Weights rounded a few rows at a time are what they are when they are read whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed_models import DEEPSEEK, save_routed
from safetensors.numpy import load_file, save_file

from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.quantization import block, streamed

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "scales of bfloat16": ("W8A8_DYNAMIC", "ascend", {}),
    "scales of float16": ("W8A8_DYNAMIC", "ascend", {"dtype": "float16"}),
    "weights alone": ("W8A16", "ascend", {}),
    "zero points": ("W8A16", "ascend", {"scheme_options": {"symmetric": False}}),
    "groups": ("W4A16", "compressed-tensors", {"scheme_options": {"group_size": 32}}),
    "four bits": ("W4A8_DYNAMIC", "ascend", {}),
}

IN_NUMPY = ("scales of float16", "zero points", "groups")
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "torch_dtype": "bfloat16",
}
MOE = {**DEEPSEEK, "num_hidden_layers": 2, "n_routed_experts": 8, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("native", [True, False])
def test_rows_give_what_the_whole_weight_does(
    case: str,
    native: bool,
    tmp_path: Path,
    load_tensors: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (scheme, format, more), calls = CASES[case], list[int]()
    model = save_routed(tmp_path / "model", DENSE if scheme == "W8A16" else MOE)

    def ran(name: str) -> dict[str, np.ndarray]:
        run_job(QuantizeOptions(model, tmp_path / name, scheme, formats=(format,), **more))
        return load_tensors(tmp_path / name)

    monkeypatch.setattr(block, "is_streamed", lambda layer: False)
    whole = ran("whole")
    monkeypatch.undo()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return quantize_stored(*arguments, **options)

    quantize_stored = kernels.quantize_stored
    monkeypatch.setattr(kernels, "quantize_stored", counted)
    monkeypatch.setattr(kernels, "available", lambda: native)
    monkeypatch.setattr(streamed, "ELEMENTS", 200)
    found = ran("rows")
    assert bool(calls) == (native and case not in IN_NUMPY)
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_a_weight_with_nan_is_refused_by_its_name(tmp_path: Path) -> None:
    model = save_routed(tmp_path / "model", DEEPSEEK)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][5, 7] = np.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MsQuantError, match=rf"{name}.* holds 1 NaN"):
        run_job(QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC"))
