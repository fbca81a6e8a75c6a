"""The tensors of a linear in the ascend format: bytes by hand, and there and back, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import given, spec_of

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.formats.ascend import format as ascend
from ms_quant.formats.ascend.tensors import narrowed, parts, widened
from ms_quant.models.config import parse_config
from ms_quant.numerics import rotation
from ms_quant.numerics.activation import (
    ObservedRange,
    PerToken,
    Phased,
    PhasedActivation,
    StaticActivation,
)
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.support import SUPPORT

BF16, FP16 = DTYPES["bfloat16"], DTYPES["float16"]
RAW = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10,
}
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
ROWS = [name for name, rows in SUPPORT.items() if rows[0].format == "ascend"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ROWS),
    ("W8A16", {"symmetric": False}),
    ("W4A8_DYNAMIC", {"group_size": 32}),
]


def plan(scheme: str, dtype: np.dtype = BF16, raw: dict | None = None, **options: Any) -> Plan:
    config = parse_config({**RAW, **(raw or {})})
    return make_plan(config, scheme, "minmax", dtype=dtype, scheme_options=options)


CODES = np.array([[1, -1, 7, -8], [0, 2, -3, 4]], np.int8)


def stored(scheme: str, linear: QuantizedLinear, path: str = K_PROJ, **options: Any):
    """A function that gives a tensor of a linear by its suffix."""
    dtype = options.pop("dtype", BF16)
    chosen = plan(scheme, dtype, **options)
    layer, group, _ = given(chosen, path)
    made = parts(layer, group, linear.weight.shape)
    return lambda suffix: made[suffix].make(linear)


def test_bytes_of_int4_weights() -> None:
    grid = AffineFormat(4).grid({"weight_scale": np.float32([[0.5], [0.25]])})
    linear = QuantizedLinear(CODES, grid)
    get = stored("W4A8_DYNAMIC", linear)  # pairs of outputs: 1, 0 is 01
    assert get("weight").view(np.uint8).tolist() == [[0x01, 0x2F, 0xD7, 0x48]]
    assert get("scale_bias").tolist() == [[8 * 0.5 * -1], [8 * 0.25 * 3]]
    assert get("weight_offset").tolist() == [[0], [0]]
    assert stored("W4A4_DYNAMIC", linear)("weight").tolist() == CODES.tolist()


def test_scale_bias_of_a_row_parallel_linear_sums_sixteenths() -> None:
    codes = np.tile(np.arange(-8, 8, dtype=np.int8).repeat(2), (2, 1))
    grid = AffineFormat(4).grid({"weight_scale": np.float32([[1], [0.5]])})
    found = stored("W4A8_DYNAMIC", QuantizedLinear(codes, grid), DOWN)("scale_bias")
    sums = [16 * code for code in range(-8, 8)]  # 8 * (code + code)
    assert found.tolist() == [sums, [total / 2 for total in sums]]


def test_two_levels_are_multiplied_in_scale_bias() -> None:
    scale = {"weight_scale": np.float32([[0.5], [2]])}
    second = {"weight_scale_second": np.float32([[1, 3], [5, 7]])}
    linear = QuantizedLinear(CODES, TwoLevelFormat(2).grid({**scale, **second}))
    get = stored("W4A8_DYNAMIC", linear, group_size=32)
    first, other = 8 * 0.5 * (0 * 1 - 1 * 3), 8 * 2 * (2 * 5 + 1 * 7)
    assert get("scale_bias").tolist() == [[first], [other]]
    assert get("weight_scale_second").tolist() == [[1, 3], [5, 7]]


def test_offsets_are_what_the_runtime_adds() -> None:
    arrays = {"weight_scale": np.ones((2, 1), "f4"), "weight_zero_point": np.int8([[-8], [0]])}
    linear = QuantizedLinear(CODES, AffineFormat(8, symmetric=False).grid(arrays))
    found = stored("W8A16", linear, symmetric=False)("weight_offset")
    assert found.tolist() == [[8], [0]] and not np.signbit(found[1, 0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_static_tensors(dtype: np.dtype) -> None:
    static = StaticActivation(np.float32(0.5), -3, np.full(4, 0.5, "f4"), folds_bias=True)
    grid = AffineFormat().grid({"weight_scale": np.float32([[0.25], [1]])})
    linear = QuantizedLinear(CODES, grid, np.float32([1, -0.3]), PhasedActivation(static))
    get = stored("W8A8_MIX", linear, dtype=dtype)
    assert get("input_scale").tolist() == [0.5] and get("input_offset").tolist() == [-3.0]
    # sums -1 and 3; 3 * sum, + 1 / 0.125, - 0.3 / 0.5 which is -0.6
    assert get("quant_bias").tolist() == [-3 + 8, 9 - 1]
    found = get("deq_scale")
    if dtype == FP16:
        assert found.dtype == np.int64 and found.tolist() == [0x3E000000, 0x3F000000]
    else:
        assert found.dtype == np.float32 and found.tolist() == [0.125, 0.5]


def test_widened_scales() -> None:
    scale = np.float32([0.0123, 1.0])
    assert widened(scale).tolist() == [1011451376, 0x3F800000]
    np.testing.assert_array_equal(narrowed(widened(scale)), scale)


def random_linear(chosen: Plan, path: str, bias: bool, seed: int = 0) -> QuantizedLinear:
    """A linear as a job makes it, with everything that algorithms of its chain add."""
    rng, layer, shape = np.random.default_rng(seed), chosen.distinct[0], spec_of(chosen, path).shape
    scheme = layer.scheme
    weight = rng.standard_normal(shape, np.float32)
    weight[0] = 0
    adds = {row.adds for row in layer.algorithms.rows}
    branch = kronecker = None
    if "kronecker" in adds:
        factors = rotation.balanced_factors(shape[1], path)
        left, right = (rng.standard_normal((n, n)).astype(chosen.dtype) for n in factors)
        kronecker = Kronecker(left.astype(np.float32), right.astype(np.float32))
    if "branch" in adds:
        rank = min(32, *shape)
        l1, l2 = (
            rng.standard_normal(s).astype(chosen.dtype)
            for s in ((rank, shape[1]), (shape[0], rank))
        )
        branch = LowRank(l1.astype(np.float32), l2.astype(np.float32))
    grid = scheme.weight.fit(weight, path, layer.storage.scale_dtype)
    ends = np.full(shape[1], -2.7, "f4"), np.full(shape[1], 4.1, "f4")
    seen = None if scheme.activation.dynamic else ObservedRange(*ends, chosen.dtype, path)
    return QuantizedLinear(
        grid.round(weight),
        grid,
        rng.standard_normal(shape[0], np.float32) if bias else None,
        PerToken(4, 0.75) if kronecker else scheme.activation.fit(seen, None),
        kronecker=kronecker,
        branch=branch,
    )


def there_and_back(chosen: Plan, path: str, linear: QuantizedLinear, file: Path) -> QuantizedLinear:
    layer, group, spec = given(chosen, path)
    made = parts(layer, group, spec.shape)
    plans = [TensorPlan(f"{path}.{name}", part.dtype, part.shape) for name, part in made.items()]
    write_file(file, plans, lambda tensor: made[tensor.name.rpartition(".")[2]].make(linear))
    return ascend.read_linear(layer, group, spec, Checkpoint(file.parent), path, linear.bias)


@pytest.mark.parametrize("path", [K_PROJ, DOWN])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_what_is_read_computes_the_same(
    scheme: str, options: dict, dtype: np.dtype, bias: bool, path: str, tmp_path: Path
) -> None:
    chosen = plan(scheme, dtype, **options)
    linear = random_linear(chosen, path, bias)
    found = there_and_back(chosen, path, linear, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found.weight, linear.weight)
    x = np.random.default_rng(1).standard_normal((5, linear.weight.shape[1]), np.float32)
    for decode in (False, True):
        np.testing.assert_array_equal(
            found.forward(x, decode).view(np.uint32), linear.forward(x, decode).view(np.uint32)
        )
    if isinstance(chosen.distinct[0].scheme.activation, Phased):
        assert not np.array_equal(found.forward(x), found.forward(x, decode=True))


@pytest.mark.parametrize("change", ["smooth", "clip_ratio"])
def test_what_has_no_tensor_is_refused(change: str) -> None:
    chosen = plan("W4A4_DYNAMIC")
    linear = random_linear(chosen, K_PROJ, False)
    changes: dict[str, Any] = {"smooth": np.ones(64, "f4")}
    if change == "clip_ratio":
        changes = {"activation": PerToken(4, 0.75)}
    layer, group, _ = given(chosen, K_PROJ)
    with pytest.raises(MsQuantError, match=f"has no place for {change} of a linear"):
        ascend.linear_tensor(layer, group, replace(linear, **changes), "weight")
