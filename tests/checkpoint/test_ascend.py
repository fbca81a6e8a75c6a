"""The ascend flavour against tables and bytes written by hand, and there and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.algorithms import get_chain
from ms_quant.checkpoint import ascend
from ms_quant.checkpoint.ascend_tensors import narrowed, parts, widened
from ms_quant.checkpoint.flavour import group_of
from ms_quant.checkpoint.reader import Checkpoint
from ms_quant.checkpoint.writer import TensorPlan, write_file
from ms_quant.errors import MsQuantError
from ms_quant.models.config import parse_config
from ms_quant.numerics.activation import PerToken, Phased, PhasedActivation, Seen, StaticActivation
from ms_quant.numerics.grid import AffineFormat, TwoLevelFormat
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan import Choices, Plan, make_plan
from ms_quant.schemes import SCHEMES

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
ROWS = [name for name, scheme in SCHEMES.items() if scheme.flavour == "ascend"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"group_size": 64} if name == "W4A16" else {}) for name in ROWS),
    ("W4A16", {"group_size": 0}),
    ("W4A16", {"group_size": 32, "symmetric": False}),
    ("W8A16", {"group_size": 32}),
    ("W8A16", {"symmetric": False}),
    ("W4A8_DYNAMIC", {"group_size": 32}),
    ("W4A4_MXFP4_DUALSCALE", {"dual_block_size": 32}),
]


def plan(scheme: str, dtype: np.dtype = BF16, raw: dict | None = None, **options: Any) -> Plan:
    config = parse_config({**RAW, **(raw or {})})
    return make_plan(config, scheme, "minmax", dtype=dtype, options=Choices(scheme=options))


def table(chosen: Plan, path: str) -> dict[str, str]:
    """Each tensor of a linear as ``"dtype [shape]"``."""
    tensors = ascend.FLAVOUR.tensor_plans(chosen)
    return {
        t.name.removeprefix(f"{path}."): f"{t.dtype} {list(t.shape)}"
        for t in tensors
        if t.name.startswith(f"{path}.")
    }


def scales(level: str, *shape: int) -> dict[str, str]:
    return {f"weight_{n}{level}": f"float32 {list(shape)}" for n in ("scale", "offset")}


STATIC = {
    "input_scale": "float32 [1]",
    "input_offset": "float32 [1]",
    "deq_scale": "float32 [32]",
    "quant_bias": "int32 [32]",
}
MX = {"weight_scale": "uint8 [32, 2]"}
PLAIN, PACKED = {"weight": "int8 [32, 64]"}, {"weight": "int8 [16, 64]"}
BYTES = {"weight": "uint8 [32, 32]"}
E4M3 = {"weight": "float8_e4m3fn [32, 64]"}


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("W8A8_PER_TENSOR", {}, {**PLAIN, **STATIC}),
        ("W8A8_PER_CHANNEL", {}, {**PLAIN, **STATIC}),
        ("W8A8_MIX", {}, {**PLAIN, **STATIC, **scales("", 32, 1)}),
        ("W8A16", {}, {**PLAIN, **scales("", 32, 1)}),
        ("W8A16", {"group_size": 32}, {**PLAIN, **scales("", 32, 2)}),
        ("W4A16", {"group_size": 0}, {"weight": "int8 [32, 32]", **scales("", 32, 1)}),
        ("W4A16", {"group_size": 32}, {**PACKED, **scales("", 32, 2)}),
        (
            "W4A8_DYNAMIC",
            {},
            {**PACKED, **scales("", 32, 1), "scale_bias": "float32 [32, 1]"},
        ),
        (
            "W4A8_DYNAMIC",
            {"group_size": 32},
            {
                **PACKED,
                **scales("", 32, 1),
                **scales("_second", 32, 2),
                "scale_bias": "float32 [32, 1]",
            },
        ),
        ("W4A4_DYNAMIC", {}, {**PLAIN, **scales("", 32, 1)}),
        ("W8A8FP8_DYNAMIC", {}, {**E4M3, **scales("", 32, 1)}),
        ("W8A8_MXFP8", {}, {**E4M3, **MX}),
        ("W4A8_MXFP", {}, {**BYTES, **MX}),
        ("W4A4_MXFP4", {}, {**BYTES, **MX}),
        (
            "W4A4_MXFP4_DUALSCALE",
            {},
            {**BYTES, **MX, "weight_dual_scale": "float32 [32, 1, 1]"},
        ),
        (
            "W4A4_MXFP4_SVD",
            {},
            {
                **BYTES,
                **MX,
                "svd_lowrank_l1": "bfloat16 [32, 64]",
                "svd_lowrank_l2": "bfloat16 [32, 32]",
            },
        ),
    ],
)
def test_tensors_of_a_column_parallel_linear(scheme: str, options: dict, expected: dict) -> None:
    assert table(plan(scheme, **options), K_PROJ) == {**expected, "bias": "float32 [32]"}


def test_tensors_of_a_row_parallel_linear_and_of_float16() -> None:
    assert table(plan("W4A8_DYNAMIC"), DOWN)["scale_bias"] == "float32 [64, 16]"
    assert table(plan("W8A8_MIX", FP16), DOWN)["deq_scale"] == "int64 [64]"
    assert table(plan("W8A8_MIX", FP16), K_PROJ)["bias"] == "float32 [32]"
    assert table(plan("W4A4_MXFP4_SVD", FP16), DOWN)["svd_lowrank_l1"] == "float16 [32, 128]"


def test_a_kronecker_transform_has_tensors_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ms_quant.algorithms import ALGORITHMS

    monkeypatch.setitem(ALGORITHMS, "clip", replace(ALGORITHMS["clip"], adds="kronecker"))
    chosen = plan("W4A4_DYNAMIC")
    chosen = replace(chosen, chain=get_chain("clip", chosen.scheme))
    expected = {"left_trans": "bfloat16 [8, 8]", "right_trans": "bfloat16 [8, 8]"}
    added = {"clip_ratio": "float32 [1]", "bias": "float32 [32]", **scales("", 32, 1)}
    assert table(chosen, K_PROJ) == {**PLAIN, **expected, **added}


def test_description() -> None:
    raw = {"tie_word_embeddings": True}
    chosen = make_plan(
        parse_config({**RAW, **raw}),
        "W4A16",
        "minmax",
        dtype=BF16,
        exclude=("*.gate_proj", "*.o_proj"),
        options=Choices(scheme={"group_size": 32}),
    )
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    expected: dict[str, Any] = {
        "model.embed_tokens.weight": "FLOAT",
        "model.layers.0.input_layernorm.weight": "FLOAT",
        "model.layers.0.post_attention_layernorm.weight": "FLOAT",
        "model.norm.weight": "FLOAT",
        "lm_head.weight": "FLOAT",  # tied: there is no such tensor, but the runtime asks
        f"{attention}.o_proj.weight": "FLOAT",
        f"{mlp}.gate_proj.weight": "FLOAT",
        f"{mlp}.up_proj.weight": "FLOAT",
        "version": "1.0.0",
        "model_quant_type": "W4A16",
        "group_size": 32,
        "metadata": {},
        "optional": {},
    }
    for path in (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"):
        expected |= {f"{path}.weight": "W4A16", f"{path}.weight_scale": "W4A16"}
        expected |= {f"{path}.weight_offset": "W4A16", f"{path}.bias": "FLOAT"}
    path = f"{mlp}.down_proj"
    expected |= {f"{path}.{n}": "W4A16" for n in ("weight", "weight_scale", "weight_offset")}
    assert ascend.FLAVOUR.description(chosen) == expected


@pytest.mark.parametrize(("scheme", "size"), [("W8A8_MIX", 0), ("W8A8_MXFP8", 32)])
def test_group_size_of_the_description(scheme: str, size: int) -> None:
    found = ascend.FLAVOUR.description(plan(scheme))
    assert (found["group_size"], found["model_quant_type"]) == (size, scheme)


def test_branches_are_float_in_the_description() -> None:
    found = ascend.FLAVOUR.description(plan("W4A4_MXFP4_SVD"))
    assert found[f"{DOWN}.svd_lowrank_l1"] == found[f"{DOWN}.svd_lowrank_l2"] == "FLOAT"
    assert found[f"{DOWN}.weight"] == found[f"{DOWN}.weight_scale"] == "W4A4_MXFP4_SVD"


CODES = np.array([[1, -1, 7, -8], [0, 2, -3, 4]], np.int8)


def stored(scheme: str, linear: QuantizedLinear, path: str = K_PROJ, **options: Any):
    """A function that gives a tensor of a linear by its suffix."""
    dtype = options.pop("dtype", BF16)
    chosen = plan(scheme, dtype, **options)
    made = parts(chosen, group_of(chosen, path), linear.weight.shape)
    return lambda suffix: made[suffix].make(linear)


def test_bytes_of_int4_weights() -> None:
    grid = AffineFormat(4).grid({"weight_scale": np.float32([[0.5], [0.25]])})
    linear = QuantizedLinear(CODES, grid)
    get = stored("W4A16", linear, group_size=0)  # pairs of inputs: 1, -1 is f1
    assert get("weight").view(np.uint8).tolist() == [[0xF1, 0x87], [0x20, 0x4D]]
    get = stored("W4A16", linear, group_size=32)  # pairs of outputs: 1, 0 is 01
    assert get("weight").view(np.uint8).tolist() == [[0x01, 0x2F, 0xD7, 0x48]]
    get = stored("W4A8_DYNAMIC", linear)
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
    arrays = {
        "weight_scale": np.ones((2, 2), "f4"),
        "weight_zero_point": np.int8([[-8, 0], [3, 7]]),
    }
    linear = QuantizedLinear(CODES, AffineFormat(4, 2, symmetric=False).grid(arrays))
    found = stored("W4A16", linear, group_size=32, symmetric=False)("weight_offset")
    assert found.tolist() == [[8, 0], [-3, -7]] and not np.signbit(found[0, 1])


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
    rng, scheme = np.random.default_rng(seed), chosen.scheme
    shape = chosen.config.linear_shapes()[path.split(".", 3)[3]]
    weight = rng.standard_normal(shape, np.float32)
    weight[0] = 0
    branch = None
    if chosen.chain.any("adds"):
        rank = min(32, *shape)
        l1, l2 = (
            rng.standard_normal(s).astype(chosen.dtype)
            for s in ((rank, shape[1]), (shape[0], rank))
        )
        branch = LowRank(l1.astype(np.float32), l2.astype(np.float32))
    grid = scheme.weight.fit(weight, path, scheme.scale_dtype(chosen.dtype))
    ends = np.full(shape[1], -2.7, "f4"), np.full(shape[1], 4.1, "f4")
    seen = None if scheme.activation.dynamic else Seen(*ends, chosen.dtype, path)
    return QuantizedLinear(
        grid.round(weight),
        grid,
        rng.standard_normal(shape[0], np.float32) if bias else None,
        scheme.activation.fit(seen, None),
        branch=branch,
    )


def there_and_back(chosen: Plan, path: str, linear: QuantizedLinear, file: Path) -> QuantizedLinear:
    group = group_of(chosen, path)
    made = parts(chosen, group, linear.weight.shape)
    plans = [TensorPlan(f"{path}.{name}", part.dtype, part.shape) for name, part in made.items()]
    write_file(file, plans, lambda name: made[name.rpartition(".")[2]].make(linear))
    return ascend.read_linear(chosen, group, Checkpoint(file.parent), path, linear.bias)


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
    if isinstance(chosen.scheme.activation, Phased):
        assert not np.array_equal(found.forward(x), found.forward(x, decode=True))


def test_a_transform_and_its_clip_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    from ms_quant.algorithms import ALGORITHMS

    monkeypatch.setitem(ALGORITHMS, "clip", replace(ALGORITHMS["clip"], adds="kronecker"))
    chosen = plan("W4A4_DYNAMIC")
    linear = random_linear(chosen, K_PROJ, True)
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal((8, 8)).astype(BF16).astype(np.float32) for _ in range(2))
    linear = replace(linear, kronecker=Kronecker(left, right), activation=PerToken(4, 0.75))
    chosen = replace(chosen, chain=get_chain("clip", chosen.scheme))
    found = there_and_back(chosen, K_PROJ, linear, tmp_path / "model.safetensors")
    x = rng.standard_normal((5, 64), np.float32)
    assert found.activation == linear.activation
    np.testing.assert_array_equal(found.forward(x), linear.forward(x))


@pytest.mark.parametrize(
    ("scheme", "raw", "message"),
    [
        ("W4A8_DYNAMIC", {"intermediate_size": 72}, r"0\.mlp\.down_proj\.weight: 72 inputs, expec"),
        ("W4A8_DYNAMIC", {"intermediate_size": 81}, r"0\.mlp\.gate_proj\.weight: 81 outputs, "),
        ("W4A16", {"intermediate_size": 81}, r"0\.mlp\.gate_proj\.weight: 81 outputs, expected an"),
    ],
)
def test_a_shape_that_cannot_be_packed_is_refused(scheme: str, raw: dict, message: str) -> None:
    options = {"group_size": 32} if scheme == "W4A16" else {}
    with pytest.raises(MsQuantError, match=message):
        plan(scheme, raw=raw, **options)
    choices = Choices(scheme=options, float_undivided=True)
    made = make_plan(parse_config({**RAW, **raw}), scheme, "minmax", dtype=BF16, options=choices)
    assert DOWN in made.float_linears() and K_PROJ in made.quantized()


def test_an_input_scale_for_each_channel_is_refused() -> None:
    chosen = plan("W8A8_MIX")
    chosen = replace(chosen, scheme=SCHEMES["W8A8"])
    with pytest.raises(MsQuantError, match="the ascend flavour cannot hold scheme W8A8"):
        ascend.check(chosen, chosen.groups(0)[0], (32, 64), "x")


def test_output_bytes_are_those_of_the_tensors(
    tiny_model: Callable[..., Path], tmp_path: Path, load_tensors: Callable
) -> None:
    from ms_quant.pipeline import QuantizeOptions, quantize_checkpoint

    source = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16, shards=1)
    made = quantize_checkpoint(QuantizeOptions(source, tmp_path / "out", "W4A8_MXFP"))
    assert made["flavour"] == "ascend"
    tensors = load_tensors(tmp_path / "out")
    assert made["tensor_bytes"] == sum(array.nbytes for array in tensors.values())
