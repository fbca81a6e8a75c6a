"""What the compressed-tensors library makes of weights is what is written here, and is read back.

tests/golden/compressed_tensors/library.json was made by tools/make_golden_compressed_tensors.py,
whose formulas stand here again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import given, held, with_layer

from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.compressed_tensors import format as format
from ms_quant.formats.compressed_tensors.config import quantization_config
from ms_quant.formats.compressed_tensors.tensors import parts, read_linear
from ms_quant.models.config import parse_config
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.layer import layer_plan
from ms_quant.plan.plan import Plan

FORMAT = "compressed-tensors"
LIBRARY = Path(__file__).parents[1] / "golden" / "compressed_tensors" / "library.json"
GOLDEN = json.loads(LIBRARY.read_text())
ROWS, COLUMNS, ROW = 16, 64, 3
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("W4A16 per group", "W4A16", {"group_size": 32}),
    ("W4A16 per group, asymmetric", "W4A16", {"group_size": 32, "symmetric": False}),
    ("W4A16 per channel, asymmetric", "W4A16", {"group_size": 0, "symmetric": False}),
    ("W8A16 per channel", "W8A16", {}),
    ("W8A16 per group, asymmetric", "W8A16", {"group_size": 32, "symmetric": False}),
    ("W8A8", "W8A8", {}),
]
RAW = {
    "model_type": "qwen3",
    "hidden_size": COLUMNS,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": ROWS,
    "vocab_size": 10,
}
K_PROJ = "model.layers.0.self_attn.k_proj"


def plan(scheme: str, options: dict[str, Any]) -> Plan:
    dtype = DTYPES["bfloat16"]
    made = make_plan(parse_config(RAW), "W8A16", "minmax", dtype=dtype, format=FORMAT)
    return with_layer(made, layer_plan(scheme, "minmax", dtype, options=options, format=FORMAT))


def linear(chosen: Plan) -> QuantizedLinear:
    """The weight of the golden file, rounded on its scales and zero points."""
    format: Any = chosen.distinct[0].scheme.weight
    size, levels = format.group_size or COLUMNS, 1 << format.bits
    i, j = np.ogrid[:ROWS, :COLUMNS]
    weight = (((37 * i + 11 * j) % 97 - 48) / 32).astype(np.float32)
    i, g = np.ogrid[:ROWS, : COLUMNS // size]
    arrays = {"weight_scale": ((8 + (3 * i + 5 * g) % 8) / (4 * levels)).astype(np.float32)}
    if not format.symmetric:
        points = (37 * i + 11 * g) % levels - levels // 2
        arrays["weight_zero_point"] = points.astype(np.int8)
    grid = format.grid(arrays)
    static = StaticActivation(np.float32(0.5), 3, np.full(COLUMNS, 0.5, "f4"))
    return QuantizedLinear(grid.round(weight), grid, None, static)


@pytest.mark.parametrize(("case", "scheme", "options"), CASES)
def test_bytes_are_the_librarys(case: str, scheme: str, options: dict[str, Any]) -> None:
    chosen = plan(scheme, options)
    layer, group, _ = given(chosen, K_PROJ)
    made = linear(chosen)
    names = {"weight_scale", "input_scale", "input_zero_point"}
    assert parts(layer, (ROWS, COLUMNS)).keys() - names == GOLDEN[case]["tensors"].keys()
    for suffix, expected in GOLDEN[case]["tensors"].items():
        found = format.linear_tensor(layer, group, made, suffix)
        assert (found.dtype.name, list(found.shape)) == (expected["dtype"], expected["shape"])
        assert found.tobytes().hex() == expected["bytes"], suffix


@pytest.mark.parametrize(("case", "scheme", "options"), CASES)
def test_the_librarys_bytes_are_read(
    case: str, scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    chosen = plan(scheme, options)
    made, arrays = linear(chosen), {}
    for suffix, part in parts(chosen.distinct[0], (ROWS, COLUMNS)).items():
        stored = GOLDEN[case]["tensors"].get(suffix)
        arrays[suffix] = part.make(made)
        if stored is not None:
            data = np.frombuffer(bytes.fromhex(stored["bytes"]), stored["dtype"])
            arrays[suffix] = data.reshape(stored["shape"])
    plans = [TensorPlan(f"{K_PROJ}.{key}", a.dtype, a.shape) for key, a in arrays.items()]
    write_file(
        tmp_path / "model.safetensors", plans, lambda tensor: arrays[tensor.name.rpartition(".")[2]]
    )
    found = read_linear(*given(chosen, K_PROJ), Checkpoint(tmp_path), K_PROJ, None)
    np.testing.assert_array_equal(found.weight, made.weight)
    assert found.float_weight()[ROW].tolist() == GOLDEN[case][f"row {ROW} read back"]


@pytest.mark.parametrize(("case", "scheme", "options"), CASES)
def test_arguments_are_the_librarys(case: str, scheme: str, options: dict[str, Any]) -> None:
    """Those that the library itself writes, none more and none less."""
    config = quantization_config([(held(scheme, FORMAT, **options), [])], [])
    assert config["config_groups"]["group_0"]["weights"] == GOLDEN[case]["weights"]


def test_codes_of_a_static_input_are_the_librarys() -> None:
    x = ((29 * np.arange(24) % 64 - 32) / 8).astype(np.float32)
    static = StaticActivation(np.float32(3 / 128), -37, np.full(24, 3 / 128, "f4"))
    assert static.codes(x).tolist() == GOLDEN["static input"]["codes"]
    assert static.fake(x).tolist() == GOLDEN["static input"]["values"]
