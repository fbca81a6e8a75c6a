"""Smoothing where experts and latent attention are: a float decoder computes what it did, and its
router chooses what it chose; and errors of candidates that look at no other expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import routed_models
from routed_models import QWEN, routed_tensors
from slow_routed import SlowRouted

from ms_quant.algorithms.problem import InputMaxima, Problem, Solution, checked
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import parse_config
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.activation import Float
from ms_quant.numerics.folding import few_bits
from ms_quant.numerics.linear import QuantizedLinear, quantize_linear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.quantization.block import QuantizedBlock, quantize
from ms_quant.quantization.folding import fold_for_experts
from ms_quant.quantization.hooks import BlockHooks
from ms_quant.quantization.observe import observe, wanted
from ms_quant.quantization.weights import LoadedWeights
from ms_quant.statistics.expert_errors import errors_of
from ms_quant.statistics.observations import Observations

BF16, F32 = DTYPES["bfloat16"], DTYPES["float32"]
Tensors = dict[str, np.ndarray]
NORM, ROUTER = "post_attention_layernorm.weight", "mlp.gate.weight"
DEEPSEEK = {**routed_models.DEEPSEEK, "n_routed_experts": 8, "num_experts_per_tok": 2}
QWEN2 = {
    **QWEN,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 40,
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "deepseek, dense": (DEEPSEEK, 0),
    "deepseek": (DEEPSEEK, 1),
    "deepseek, one projection of queries": ({**DEEPSEEK, "q_lora_rank": None}, 1),
    "qwen3": (QWEN, 0),
    "qwen2": (QWEN2, 0),
}
WINDOWS, LENGTH = 8, 32


class Exact:
    """A grid on which every weight is its own code."""

    group = 0

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return codes


def keep(problem: Problem, solution: Solution) -> tuple[dict[str, QuantizedLinear], dict]:
    weights = checked(problem, solution).items()
    return {n: QuantizedLinear(w, Exact(), problem.biases.get(n), Float()) for n, w in weights}, {}


@dataclass
class Case:
    """A block before folding and after it; what both read."""

    plan: Plan
    index: int
    before: Tensors
    x: np.ndarray
    block: BlockForward
    seen: Observations
    made: QuantizedBlock

    @property
    def after(self) -> Tensors:
        """The tensors of the block, weights not rounded."""
        tensors = {**self.before, **self.made.floats}
        for path, made in self.made.linears.items():
            tensors[f"{path}.weight"] = made.float_weight()
        return tensors

    def slow(self, tensors: Mapping[str, np.ndarray]) -> SlowRouted:
        prefix = f"model.layers.{self.index}."
        return SlowRouted(self.plan.config, {f"{prefix}{n}": t for n, t in tensors.items()})


def case(
    raw: dict[str, Any],
    index: int,
    algorithm: str = "smoothquant",
    scheme: str = "W8A8_DYNAMIC",
    dtype: np.dtype = BF16,
    exclude: tuple[str, ...] = ("model.layers.3.*",),
    hooks: BlockHooks = BlockHooks(rounding=keep),  # noqa: B008 - it does not change
) -> Case:
    config = parse_config(dict(raw))
    prefix, tensors = f"model.layers.{index}.", routed_tensors(raw)
    before = {
        name: tensors[prefix + name].astype(BF16).astype(np.float32)
        if not name.endswith("bias")
        else tensors[prefix + name]
        for name in config.block(index).tensors
    }
    if not config.further_layers:
        exclude = tuple(pattern for pattern in exclude if "layers.3" not in pattern)
    plan = make_plan(
        config, scheme, algorithm, dtype=dtype, exclude=exclude, smoothing_target="norm"
    )
    x = np.random.default_rng(2).normal(size=(WINDOWS, LENGTH, 64)).astype(np.float32)
    block = BlockForward(config, index, {n: t.copy() for n, t in before.items()}, {})
    at = Positions(config, LENGTH)
    seen = observe(block, at, [x], x.shape, wanted([plan], index, hooks))
    assert all(stats.tokens for stats in seen.stats.values())
    made = quantize(plan, LoadedWeights(block, at), seen, hooks)
    return Case(plan, index, before, x, block, seen, made)


@pytest.mark.parametrize(("raw", "index"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("algorithm", ["smoothquant", "osl"])
def test_the_block_computes_what_it_did(raw: dict[str, Any], index: int, algorithm: str) -> None:
    """Up to the rounding of weights in float32, as which everything is stored here."""
    found = case(raw, index, algorithm, dtype=F32)
    expected = found.slow(found.before).block(index, found.x[0].astype(np.float64))
    slow = found.slow(found.after)
    made = slow.block(index, found.x[0].astype(np.float64))
    assert np.abs(made - expected).max() <= 1e-5 * np.abs(expected).max()
    changed = {n for n, t in found.before.items() if (found.after[n] != t).any()}
    if "kv_lora_rank" in raw:
        assert {"self_attn.kv_b_proj.weight", "self_attn.o_proj.weight"} <= changed
        assert ("self_attn.q_a_layernorm.weight" in changed) == (raw["q_lora_rank"] is not None)
    experts = index in found.plan.config.routing.sparse
    assert ({NORM, ROUTER} <= changed) == (experts and algorithm == "smoothquant")


@pytest.mark.parametrize("name", [name for name in MODELS if "dense" not in name])
def test_the_router_chooses_bit_for_bit_what_it_chose(name: str) -> None:
    raw, index = MODELS[name]
    found = case(raw, index)
    smooth = found.before[NORM] / found.after[NORM]
    assert (np.frexp(smooth)[0] == 0.5).all() and len(np.unique(smooth)) > 1
    for path in found.plan.config.block(index).edge_of("mlp.gate").floats:
        before, after = found.before[f"{path}.weight"], found.after[f"{path}.weight"]
        np.testing.assert_array_equal(after, before * smooth)
        np.testing.assert_array_equal(after, after.astype(BF16).astype(np.float32))
    products = []
    for tensors in (found.before, {**found.before, **{n: found.after[n] for n in (NORM, ROUTER)}}):
        shown: list[np.ndarray] = []
        block = BlockForward(found.plan.config, index, tensors, {})
        block.with_taps({"router scores": [lambda x, shown=shown: shown.append(x.copy())]}).branch(
            1, found.x, Positions(found.plan.config, LENGTH)
        )
        products.append(shown[0])
    assert products[0].tobytes() == products[1].tobytes()


def test_rows_of_values_are_divided_and_rows_of_keys_stay() -> None:
    found = case(DEEPSEEK, 1)
    before, after = (
        tensors["self_attn.kv_b_proj.weight"].reshape(4, 32, 32)
        for tensors in (found.before, found.after)
    )
    np.testing.assert_array_equal(after[:, :16], before[:, :16])
    columns = found.after["self_attn.o_proj.weight"] / found.before["self_attn.o_proj.weight"]
    smooth = columns[0].reshape(4, 16)
    np.testing.assert_allclose(columns, np.broadcast_to(columns[0], columns.shape), rtol=1e-6)
    np.testing.assert_allclose(smooth, few_bits(smooth), rtol=1e-6)
    assert smooth.max() > 1.5 * smooth.min()
    exact = (before[:, 16:] / few_bits(smooth)[..., None]).astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(after[:, 16:], exact)


@pytest.mark.parametrize("name", [name for name in MODELS if "dense" not in name])
def test_what_experts_read_is_smoothed_without_their_weights(name: str) -> None:
    """Maxima that are found expert by expert decide what all weights together did."""
    raw, index = MODELS[name]
    found = case(raw, index)
    spec = found.plan.config.block(index)
    edge = spec.edge_of("mlp.gate")
    readers = [m for name in edge.consumers for m in spec.group(name).members]
    weights = [found.before[f"{path}.weight"] for path in readers]
    rows = np.concatenate([found.seen.stats[n].rows for n in edge.consumers])
    act = np.max([found.seen.stats[n].absmax for n in edge.consumers], axis=0)
    assert (act >= np.abs(rows).max(axis=0)).all()
    asked: list[str] = []

    def get(name: str) -> np.ndarray:
        asked.append(name)
        return found.before[name]

    columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    folded = fold_for_experts(found.plan, index, edge, lambda: InputMaxima(act, columns), get)
    assert set(asked) == {NORM, *(f"{path}.weight" for path in edge.floats)} == set(folded.floats)
    for name, array in folded.floats.items():
        np.testing.assert_array_equal(array, found.after[name], err_msg=name)
    wide = np.sqrt(act.astype(np.float64) / columns)
    assert (np.abs(np.log2(folded.solution.smooth / wide)) <= 0.5 + 1e-6).all()
    assert folded.solution.note == {"alpha": 0.5}


@pytest.mark.parametrize("algorithm", ["osl", "flexsmooth"])
def test_a_search_leaves_what_experts_read(algorithm: str) -> None:
    found = case(DEEPSEEK, 1, algorithm)
    assert NORM not in found.made.floats and ROUTER not in found.made.floats
    assert "input_layernorm.weight" in found.made.floats
    spec = found.plan.config.block(1)

    def maxima() -> InputMaxima:
        raise AssertionError("all weights would have been read")

    if algorithm != "flexsmooth":  # which takes given strengths
        get = found.before.__getitem__
        folded = fold_for_experts(found.plan, 1, spec.edge_of("mlp.gate"), maxima, get)
        assert folded.solution.smooth is None and not folded.floats


def test_experts_that_stay_float_leave_the_norm_that_they_read() -> None:
    exclude = ("model.layers.3.*", "*.mlp.experts.*")
    found = case(DEEPSEEK, 1, exclude=exclude)
    assert NORM not in found.made.floats
    assert not any("experts" in name or "gate" in name for name in found.made.floats)
    np.testing.assert_array_equal(
        found.after["mlp.shared_experts.up_proj.weight"] != 0,
        found.before["mlp.shared_experts.up_proj.weight"] != 0,
    )


def refuses(path: str) -> Any:
    def called(rows: np.ndarray) -> np.ndarray:
        raise AssertionError(f"{path} is read")

    return called


def half_clipped(block: BlockForward, members: Any) -> dict[str, QuantizedLinear]:
    return {
        path: quantize_linear(block.arrays[f"{path}.weight"], None, None, F32, 0.5)
        for path in members
    }


def searched(raw: dict[str, Any], index: int = 1) -> Case:
    return case(raw, index, "osl")


@pytest.mark.parametrize("raw", [DEEPSEEK, {**DEEPSEEK, "q_lora_rank": None}])
def test_a_search_in_attention_reads_no_expert(raw: dict[str, Any]) -> None:
    found = searched(raw)
    block, at, windows = found.block, Positions(found.plan.config, LENGTH), found.seen.windows
    experts = {path: refuses(path) for path in block.spec.linears if path.startswith("mlp.")}
    for group in found.plan.groups(1):
        if group.members[0].startswith("mlp."):
            continue
        candidate = half_clipped(block, group.members)
        errors = errors_of(block.with_linears(experts), at, group, windows)
        linears = {path: QuantizedForward(linear) for path, linear in candidate.items()}
        made = block.with_linears(linears).branch(0, windows.states[0], at)
        wrong = np.square(made.astype(np.float64) - windows.states[1])
        assert errors.mse(candidate) == pytest.approx(wrong.mean(), rel=1e-5) and wrong.any()
        shares = wrong.sum(-1) / np.square(windows.states[1].astype(np.float64)).sum(-1)
        assert errors.relative_mse(candidate) == pytest.approx(shares.mean(), rel=1e-5)


def test_in_a_dense_block_it_is_the_whole_block() -> None:
    found = searched(DEEPSEEK, 0)
    block, at, windows = found.block, Positions(found.plan.config, LENGTH), found.seen.windows
    group = block.spec.group("o")
    candidate = half_clipped(block, group.members)
    linears = {path: QuantizedForward(linear) for path, linear in candidate.items()}
    made = block.with_linears(linears)(windows.states[0], at)
    wrong = np.square(made.astype(np.float64) - windows.states[2]).mean()
    assert errors_of(block, at, group, windows).mse(candidate) == pytest.approx(wrong, rel=1e-5)


@pytest.mark.parametrize(("raw", "index"), [(DEEPSEEK, 1), (QWEN, 0), (QWEN2, 0)])
@pytest.mark.parametrize("kind", ["gate_up", "down"])
@pytest.mark.parametrize("label", ["experts.6", "shared"])
def test_an_expert_is_compared_at_its_own_output_over_its_own_tokens(
    raw: dict[str, Any], index: int, kind: str, label: str
) -> None:
    found = searched(raw, index)
    block, at, windows = found.block, Positions(found.plan.config, LENGTH), found.seen.windows
    branch = block.spec.branches[1]
    if label == "shared" and branch.shared is None:
        return
    mlp = branch.shared if label == "shared" else branch.experts[6]
    group = block.spec.group(f"{label}.{kind}")
    others = {p: refuses(p) for p in block.spec.linears if "proj" in p and p not in mlp.modules}
    candidate = half_clipped(block, group.members)
    alone = block.with_linears(others)
    errors = errors_of(alone, at, group, windows)
    rows = block.norm(NORM[:-7], windows.states[1]).reshape(-1, 64)
    chosen, weights = branch.route(block, rows)
    if label == "shared":
        tokens, factors = np.arange(len(rows)), np.ones((len(rows), 1))
        if branch.gate:
            factors = 1 / (1 + np.exp(-rows @ found.before[f"{branch.gate}.weight"].T))
    else:
        tokens, place = np.nonzero(chosen == 6)
        factors = weights[tokens, place, None]
    linears = {path: QuantizedForward(linear) for path, linear in candidate.items()}
    exact, made = (
        factors * mlp.outer(ops, mlp.gated(ops, rows[tokens]))
        for ops in (alone, alone.with_linears(linears))
    )
    wrong = np.square((made - exact).astype(np.float64))
    assert errors.mse(candidate) == pytest.approx(wrong.mean(), rel=1e-4) and wrong.any()
    shares = wrong.sum(-1) / np.square(exact.astype(np.float64)).sum(-1)
    assert errors.relative_mse(candidate) == pytest.approx(shares.mean(), rel=1e-4)
    worst = shares.mean() + 0.02 * shares.max()
    assert errors.token_error(candidate) == pytest.approx(worst, rel=1e-4)


def test_an_expert_without_a_token_has_no_error() -> None:
    found = searched(DEEPSEEK)
    block, at, windows = found.block, Positions(found.plan.config, LENGTH), found.seen.windows
    block.arrays["mlp.gate.e_score_correction_bias"][:] = 0
    block.arrays["mlp.gate.e_score_correction_bias"][3] = -9
    windows.routed = None
    group = block.spec.group("experts.3.down")
    errors = errors_of(block, at, group, windows)
    candidate = half_clipped(block, group.members)
    for error in (errors.mse, errors.relative_mse, errors.token_error):
        assert error(candidate) == 0


def test_folds_that_gain_nothing() -> None:
    """Keys' rows of kv_b_proj against queries' of q_b_proj: exact, and no code changes."""
    config = parse_config(dict(DEEPSEEK))
    tensors = {n: t.astype(np.float64) for n, t in routed_tensors(DEEPSEEK).items()}
    ids, prefix = np.arange(9), "model.layers.1.self_attn."
    factors = 2.0 ** np.random.default_rng(0).integers(-3, 4, (4, 16, 1))
    changed = {}
    for name, size, factor in (("q_b_proj", 24, factors), ("kv_b_proj", 32, 1 / factors)):
        rows = tensors[f"{prefix}{name}.weight"].copy().reshape(4, size, 32)
        rows[:, :16] *= factor
        changed[f"{prefix}{name}.weight"] = rows.reshape(-1, 32)
    found = SlowRouted(config, {**tensors, **changed}).logits(ids)
    np.testing.assert_allclose(found, SlowRouted(config, tensors).logits(ids), atol=1e-11)
    codes = [
        quantize_linear(weights[f"{prefix}q_b_proj.weight"].astype(np.float32), None, None, F32)
        for weights in (tensors, changed)
    ]
    np.testing.assert_array_equal(codes[0].weight, codes[1].weight)
