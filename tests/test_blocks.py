"""Smoothing folded into norms and linears: the float block computes what it did before.

Rounding is taken out of it: the linears here hold their weights as they are, so that a block of
NumPy in float64 must give the same from the tensors that folding has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.algorithms.problem import Problem, Solution, checked
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.numerics.activation import Float
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.block import QuantizedBlock, quantize
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.quantization.weights import Errors
from ms_quant.statistics.activation_range import BlockRanges, input_of, output_of
from ms_quant.statistics.observations import Observations
from ms_quant.statistics.observers import ActivationStats
from ms_quant.statistics.search_windows import SearchWindows

BF16, F16 = DTYPES["bfloat16"], DTYPES["float16"]
HIDDEN, INTER, DIM, HEADS = 16, 32, 4, 4
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": DIM,
    "vocab_size": 8,
    "attention_bias": True,
    "mlp_bias": True,
}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
Tensors = dict[str, np.ndarray]


def config_of(**more: Any) -> ModelConfig:
    return parse_config({**CONFIG, **more})


def random_block(config: ModelConfig, seed: int = 0) -> Tensors:
    """Numbers of bfloat16 with some channels far larger than others."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.block(0).tensors.items():
        values = rng.standard_normal(shape)
        if name in NORMS:
            values = np.exp(rng.standard_normal(shape))
        elif name.endswith(("v_proj.weight", "up_proj.weight")):
            values *= np.exp(rng.standard_normal((shape[0], 1)))
        tensors[name] = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return tensors


def tokens(seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((12, HIDDEN))
    x[:, 3] *= 20
    return x


def linear(x: np.ndarray, tensors: Tensors, path: str) -> np.ndarray:
    y = x @ tensors[f"{path}.weight"].astype(np.float64).T
    return y + tensors.get(f"{path}.bias", np.zeros(1))


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * gain


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Query head h reads the value head h // (query heads / value heads); without positions."""
    read, found = HEADS * DIM // v.shape[1], []
    for head in range(HEADS):
        mine = slice(head * DIM, (head + 1) * DIM)
        other = slice(head // read * DIM, (head // read + 1) * DIM)
        scores = q[:, mine] @ k[:, other].T / np.sqrt(DIM) / 20
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        found.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, other])
    return np.concatenate(found, axis=1)


def run(tensors: Tensors, x: np.ndarray) -> dict[str, np.ndarray]:
    """The input of every group, and under "out" the output of the block; float64."""
    seen = {"qkv": norm(x, tensors[NORMS[0]])}
    q, k, v = (linear(seen["qkv"], tensors, f"self_attn.{name}_proj") for name in "qkv")
    seen["o"] = attention(q, k, v)
    x = x + linear(seen["o"], tensors, "self_attn.o_proj")
    seen["gate_up"] = norm(x, tensors[NORMS[1]])
    gate, up = (linear(seen["gate_up"], tensors, f"mlp.{name}_proj") for name in ("gate", "up"))
    seen["down"] = gate / 2 * (1 + np.tanh(gate / 2)) * up  # SiLU
    seen["out"] = x + linear(seen["down"], tensors, "mlp.down_proj")
    return seen


class Exact:
    """A grid on which every weight is its own code."""

    group = 0

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return codes


def keep(problem: Problem, solution: Solution) -> tuple[dict[str, QuantizedLinear], dict]:
    linears = {
        name: QuantizedLinear(weight, Exact(), problem.biases.get(name), Float(), solution.smooth)
        for name, weight in checked(problem, solution).items()
    }
    return linears, {}


@dataclass
class Case:
    """A block before folding and after it."""

    plan: Plan
    before: Tensors
    block: QuantizedBlock
    x: np.ndarray

    @property
    def after(self) -> Tensors:
        """All the tensors of the block as a checkpoint would get them, weights not rounded."""
        tensors = {**self.before, **self.block.floats}
        for path, made in self.block.linears.items():
            tensors[f"{path}.weight"] = made.float_weight()
            if made.bias is not None:
                np.testing.assert_array_equal(tensors[f"{path}.bias"], made.bias)
        return tensors


@dataclass
class SeenWeights:
    """The parameters of a block, and errors of the groups' own outputs."""

    before: Tensors
    inputs: dict[str, np.ndarray]
    index: int = 0

    def get(self, name: str) -> np.ndarray | None:
        return self.before.get(name)

    def errors(self, group: LinearGroup, windows: SearchWindows) -> Errors:
        rows = self.inputs[group.name].astype(np.float32)

        def loss(candidate) -> float:
            return sum(
                float(np.square(made.forward(rows) - linear(rows, self.before, path)).sum())
                for path, made in candidate.items()
            )

        return Errors(loss, loss, loss)

    def drop(self, members: Sequence[str]) -> None:
        """The tests look at them again."""


def seen_by(
    config: ModelConfig, before: Tensors, x: np.ndarray, cached: dict[str, np.ndarray] | None
) -> tuple[SeenWeights, Observations]:
    inputs, stats = run(before, x), {}
    for name in ("qkv", "o", "gate_up", "down"):
        rows = inputs[name].astype(np.float32)
        stats[name] = ActivationStats(rows.shape[1], len(rows), with_hessian=True)
        stats[name].update(rows)
    windows, ranges = SearchWindows((1, len(x), x.shape[1]), 3, 0), BlockRanges(0)
    for group in config.block(0).groups:  # nothing comes near the end of float16
        ranges.absmax[input_of(group)] = np.zeros(group.in_features, "f4")
    for path, spec in config.block(0).linears.items():
        ranges.absmax[output_of(path)] = np.zeros(spec.out_features, "f4")
    return SeenWeights(before, inputs), Observations(stats, windows, ranges, cached)


def folded(
    scheme: str = "W8A8_DYNAMIC",
    algorithm: str = "smoothquant",
    *,
    hooks: BlockHooks = BlockHooks(rounding=keep),  # noqa: B008 - it does not change
    dtype: np.dtype = BF16,
    exclude: tuple[str, ...] = (),
    target: str = "",
    scheme_options: dict[str, Any] | None = None,
    algorithm_options: dict[str, Any] | None = None,
    change: Callable[[Tensors], None] = lambda tensors: None,
    cached: dict[str, np.ndarray] | None = None,
    **more: Any,
) -> Case:
    config = config_of(**more)
    before, x = random_block(config), tokens()
    change(before)
    if not target and "_PER_" in scheme:  # which hold their smoothing else
        target = "norm"
    plan = make_plan(
        config,
        scheme,
        algorithm,
        dtype=dtype,
        exclude=exclude,
        scheme_options=scheme_options,
        algorithm_options=algorithm_options,
        smoothing_target=target,
    )
    block = quantize(plan, *seen_by(config, before, x, cached), hooks)
    return Case(plan, before, block, x)


def assert_same_function(case: Case) -> None:
    """Folding multiplies and divides each weight in float32, three times at most, each a relative
    2**-24; an output is a sum of seven linears' products, one after the other."""
    expected, found = run(case.before, case.x), run(case.after, case.x)
    size = np.abs(expected["out"]).max()
    assert np.abs(found["out"] - expected["out"]).max() <= 1e-5 * size


def columns_of(case: Case, path: str) -> np.ndarray:
    """What the columns of a linear's weight were multiplied by."""
    name = f"{path}.weight"
    ratio = case.after[name].astype(np.float64) / case.before[name]
    np.testing.assert_allclose(ratio, ratio[:1].repeat(len(ratio), axis=0), rtol=2.0**-21)
    return ratio[0]


ALGORITHMS = [
    ("W8A8_DYNAMIC", "smoothquant", {}),
    ("W8A8_PER_CHANNEL", "smoothquant", {}),
    ("W8A8_MIX", "smoothquant", {}),
    ("W8A8FP8_DYNAMIC", "smoothquant", {}),
    ("W4A4_DYNAMIC", "osl", {}),
    ("W8A8_PER_TENSOR", "osl", {}),
    ("W4A16", "awq", {"group_size": 0}),
    ("W4A8_DYNAMIC", "awq", {}),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("scheme", "algorithm", "more"), ALGORITHMS, ids=str)
def test_the_block_computes_what_it_did(scheme, algorithm, more, kv_heads):
    case = folded(
        scheme, algorithm, scheme_options=more, target="norm", num_key_value_heads=kv_heads
    )
    assert_same_function(case)
    changed = {name for name in case.before if (case.after[name] != case.before[name]).any()}
    assert changed, "nothing was smoothed"
    assert set(case.block.floats) <= {
        *NORMS,
        "self_attn.v_proj.bias",
        "mlp.up_proj.bias",
    }
    assert all(made.smooth is None for made in case.block.linears.values())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_gains_are_what_is_stored_and_weights_make_up_for_it(alpha, dtype):
    case = folded(dtype=dtype, algorithm_options={"alpha": alpha})
    assert_same_function(case)
    for name, path in zip(NORMS, ("self_attn.q_proj", "mlp.gate_proj"), strict=True):
        gain = case.block.floats[name]
        assert (gain != case.before[name]).all()
        np.testing.assert_array_equal(gain.astype(dtype).astype(np.float32), gain)
        columns = columns_of(case, path)
        np.testing.assert_allclose(columns * gain, case.before[name], rtol=2.0**-21)


@pytest.mark.parametrize("algorithm", ["smoothquant", "osl"])
def test_a_vector_of_its_own_leaves_everything_else(algorithm):
    """Its reciprocal is stored, and tells the vector exactly."""
    case = folded("W8A8_PER_CHANNEL", algorithm, hooks=BlockHooks(), target="mul-scale")
    assert not case.block.floats
    for path, made in case.block.linears.items():
        again = (1 / made.mul_scale.astype("f8")).astype("f4")
        np.testing.assert_array_equal(again, made.smooth)
        error = np.abs(made.float_weight() - case.before[f"{path}.weight"])
        inside = np.abs(made.weight.astype(int)) < 127  # osl may clip the others
        assert inside.mean() > 0.8
        assert (error <= made.weight_scale[:, None] / made.smooth * (1 + 1e-3))[inside].all()
        assert len(np.unique(made.static.input_scale)) == 1


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scales_of_cached_values_follow_their_rows(kv_heads):
    """What is cached of v is divided by the smoothing of o; keys are not touched."""
    width = kv_heads * DIM
    cached = {f"self_attn.{n}_proj": np.linspace(1, 9, width, dtype="f4") for n in "kv"}
    case = folded("W4A4_DYNAMIC", num_key_value_heads=kv_heads, cached=cached)
    rows = case.before["self_attn.v_proj.bias"] / case.after["self_attn.v_proj.bias"]
    assert (rows != 1).all()
    for path, divisor in (("self_attn.k_proj", 1), ("self_attn.v_proj", rows)):
        exact, scale = cached[path] / divisor / 127, case.block.cache[path]
        assert (scale >= exact * (1 - 1e-6)).all()
        assert (scale <= exact * (1 + 2**-7)).all()  # rounded up to bfloat16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_of_one_value_head_share_their_vector(kv_heads):
    case = folded(num_key_value_heads=kv_heads)
    columns = columns_of(case, "self_attn.o_proj").reshape(kv_heads, HEADS // kv_heads, DIM)
    np.testing.assert_allclose(columns, columns[:, :1].repeat(HEADS // kv_heads, 1), rtol=2.0**-21)
    assert columns.std() > 0.1
    rows = columns[:, 0].reshape(-1)
    bias = case.before["self_attn.v_proj.bias"]
    np.testing.assert_allclose(case.after["self_attn.v_proj.bias"] * rows, bias, rtol=2.0**-21)
    weight, by = "self_attn.v_proj.weight", columns_of(case, "self_attn.q_proj")
    expected = case.before[weight] * by / rows[:, None]
    np.testing.assert_allclose(case.after[weight], expected, rtol=2.0**-20)


def test_down_is_smoothed_by_the_rows_of_up():
    case = folded()
    rows = columns_of(case, "mlp.down_proj")
    assert rows.std() > 0.1
    bias = case.before["mlp.up_proj.bias"]
    np.testing.assert_allclose(case.after["mlp.up_proj.bias"] * rows, bias, rtol=2.0**-21)
    expected = case.before["mlp.up_proj.weight"] * columns_of(case, "mlp.gate_proj") / rows[:, None]
    np.testing.assert_allclose(case.after["mlp.up_proj.weight"], expected, rtol=2.0**-20)
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        name = f"{path}.bias"  # what feeds no other linear keeps its bias
        np.testing.assert_array_equal(case.after[name], case.before[name])


def test_blocks_without_biases():
    case = folded(attention_bias=False, mlp_bias=False)
    assert_same_function(case)
    assert set(case.block.floats) == set(NORMS)


@pytest.mark.parametrize(
    ("exclude", "alone", "norms"),
    [
        ("*.v_proj", "self_attn.o_proj", {NORMS[1]}),
        ("*.q_proj", "self_attn.o_proj", {NORMS[1]}),  # fused with v, which stays float, too
        ("*.gate_proj", "mlp.down_proj", {NORMS[0]}),
    ],
)
@pytest.mark.parametrize("algorithm", ["smoothquant", "osl", "awq"])
def test_what_a_float_linear_feeds_is_not_smoothed(algorithm, exclude, alone, norms):
    case = folded("W8A8_DYNAMIC", algorithm, exclude=(exclude,))
    assert_same_function(case)
    assert {name for name in case.block.floats if name in NORMS} <= norms
    np.testing.assert_array_equal(case.after[f"{alone}.weight"], case.before[f"{alone}.weight"])
    for made in ("self_attn.v_proj", "mlp.up_proj"):
        if made not in case.block.linears:
            assert f"{made}.bias" not in case.block.floats


def test_a_float_consumer_leaves_what_feeds_it():
    case = folded(exclude=("*.o_proj", "*.down_proj"))
    assert_same_function(case)
    assert set(case.block.floats) == set(NORMS)


def set_gains(*values: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in NORMS:
            tensors[name][: len(values)] = values

    return change


@pytest.mark.parametrize("algorithm", ["smoothquant", "awq"])
def test_gains_of_zero_and_below(algorithm):
    """Nothing comes through a zero, so its column stays; a sign stays with the gain."""
    case = folded("W8A8_DYNAMIC", algorithm, change=set_gains(0.0, -2.0, -0.0, -0.5))
    assert_same_function(case)
    for name, path in zip(NORMS, ("self_attn.q_proj", "mlp.gate_proj"), strict=True):
        gain = case.after[name]
        np.testing.assert_array_equal(gain[[0, 2]], 0)
        assert (gain[[1, 3]] < 0).all() and np.isfinite(gain).all()
        columns = columns_of(case, path)
        np.testing.assert_array_equal(columns[[0, 2]], 1)
        assert (columns > 0).all()


@pytest.mark.parametrize(("gain", "size"), [(2.0**-24, 1e-6), (6e4, 1e4), (-6e4, 1e4)])
def test_gains_that_would_not_fit_the_stored_type_stay(gain, size):
    """A vector of ``size`` would make them 0 or infinite in float16."""

    def change(tensors: Tensors) -> None:
        set_gains(gain)(tensors)
        for name in ("q", "k", "v"):
            tensors[f"self_attn.{name}_proj.weight"][:, 0] = size

    case = folded(dtype=F16, change=change, algorithm_options={"alpha": 0.0})
    assert_same_function(case)
    assert case.after[NORMS[0]][0] == np.float32(gain)
    np.testing.assert_array_equal(
        case.after["self_attn.q_proj.weight"][:, 0], case.before["self_attn.q_proj.weight"][:, 0]
    )
    assert np.isfinite(case.after[NORMS[0]]).all()


def test_a_scheme_that_holds_its_smoothing_folds_nothing():
    case = folded("W8A8", "smoothquant", hooks=BlockHooks())
    assert not case.block.floats
    for path, made in case.block.linears.items():
        assert made.smooth is None and not made.static.folds_bias
        assert made.static.smooth.std() > 0.1
        error = made.float_weight() - case.before[f"{path}.weight"]
        step = made.weight_scale[:, None] / made.static.smooth
        assert (np.abs(error) <= step * (0.5 + 2.0**-14)).all()


def test_heads_share_nothing_where_nothing_is_folded():
    """Equation 4 of SmoothQuant for every channel of o, which each have a scale of their own."""
    case = folded("W8A8", "smoothquant", hooks=BlockHooks())
    rows = np.abs(run(case.before, case.x)["o"]).max(axis=0)
    columns = np.abs(case.before["self_attn.o_proj.weight"]).max(axis=0)
    found = case.block.linears["self_attn.o_proj"].static.smooth
    np.testing.assert_allclose(found, np.sqrt(rows / columns), rtol=2.0**-7)  # as bfloat16


@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("W8A8_DYNAMIC", "smoothquant"), ("W8A8_PER_CHANNEL", "smoothquant")]
)
def test_what_is_rounded_is_what_was_folded(scheme, algorithm):
    exact = folded(scheme, algorithm)
    rounded = folded(scheme, algorithm, hooks=BlockHooks())
    assert exact.block.floats.keys() == rounded.block.floats.keys()
    for name, values in exact.block.floats.items():
        np.testing.assert_array_equal(rounded.block.floats[name], values)
    dtype = exact.plan.distinct[0].storage.scale_dtype
    for path, made in rounded.block.linears.items():
        weight = exact.block.linears[path].weight
        grid = AffineFormat(8).fit(weight, path, dtype)
        np.testing.assert_array_equal(made.weight, grid.round(weight))
        np.testing.assert_array_equal(made.weight_scale, grid.scale[:, 0])


@pytest.mark.parametrize("scheme", ["W8A8_PER_CHANNEL", "W8A8_PER_TENSOR", "W8A8_MIX"])
def test_static_ranges_are_those_of_the_folded_block(scheme):
    """The step is that range over 255, rounded up to bfloat16, which has 8 bits; where the runtime
    multiplies, it may be one of the next seven, for its reciprocal's sake."""
    case = folded(scheme)
    inputs = run(case.after, case.x)
    rounded = folded(scheme, hooks=BlockHooks())
    for group in case.plan.groups(0):
        static = rounded.block.linears[group.members[0]].static
        rows = inputs[group.name]
        exact = (max(0.0, rows.max()) - min(0.0, rows.min())) / 255
        steps = 8 if scheme == "W8A8_MIX" else 1
        assert exact * (1 - 1e-5) <= static.scale <= exact * (1 + steps * 2.0**-7)


def test_columns_are_rounded_by_the_hessian_of_the_folded_block():
    """GPTQ makes the outputs of each linear better than rounding to nearest, at its new input."""
    errors = {}
    for algorithm in ("smoothquant", "smoothquant+gptq"):
        case = folded("W4A4_DYNAMIC", algorithm, hooks=BlockHooks())
        exact = folded("W4A4_DYNAMIC", "smoothquant")
        inputs = run(exact.after, exact.x)
        errors[algorithm] = [
            np.square(
                inputs[group.name]
                @ (
                    case.block.linears[member].float_weight()
                    - exact.block.linears[member].float_weight()
                ).T
            ).sum()
            for group in case.plan.groups(0)
            for member in group.members
        ]
    assert (np.array(errors["smoothquant+gptq"]) < errors["smoothquant"]).all()


def test_weights_are_transformed_before_anything_else():
    def halved(path: str, weight: np.ndarray, stats: ActivationStats | None) -> np.ndarray:
        assert path.startswith("model.layers.0.") and stats is not None
        return weight / 2

    whole, half = (
        folded(hooks=replace(BlockHooks(rounding=keep), transform=transform))
        for transform in (None, halved)
    )
    for path, made in half.block.linears.items():
        ratio = made.float_weight() / whole.block.linears[path].float_weight()
        np.testing.assert_allclose(ratio, ratio[:1].repeat(len(ratio), axis=0), rtol=1e-2)


def test_without_an_algorithm_nothing_is_folded_and_notes_are_kept():
    config, parts = config_of(), []
    before = random_block(config)
    plan = make_plan(config, "W8A8_DYNAMIC", "minmax", dtype=BF16)
    block = quantize(plan, SeenWeights(before, {}), None, progress=parts.append)
    assert not block.floats
    assert set(block.linears) == set(config.block(0).linears)
    assert block.notes == {group.name: {} for group in plan.groups(0)}
    assert parts == sorted(parts) and parts[-1] == 1
    assert folded(hooks=BlockHooks()).block.notes["qkv"] == {"alpha": 0.5}
