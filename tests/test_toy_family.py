"""A family whose blocks differ needs its own file and row, and nothing else.

Its first block is dense. One norm of its second block is read by a float router, two experts and an
MLP that all tokens pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import toy_family
from sealed import seal_again

from ms_quant.algorithms.problem import Problem, Solution, checked
from ms_quant.analysis.run import analyze
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.opening import open_model
from ms_quant.formats.registry import FORMATS
from ms_quant.models import families
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import ModelConfig, load_config, parse_config
from ms_quant.models.ranks import check_tp
from ms_quant.numerics.activation import Float
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan, plan_of_recipe
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_job
from ms_quant.quantization.block import quantize
from ms_quant.quantization.hooks import NO_HOOKS, BlockHooks
from ms_quant.quantization.observe import observe, wanted
from ms_quant.quantization.weights import LoadedWeights
from ms_quant.recipe import Recipe, Rule, Step
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = ml_dtypes.bfloat16
ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.1."
DATA = {"samples": 6, "seq_len": 32}


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[..., Path], save_tensors: Callable) -> Path:
    directory = tmp_path / "toy"
    directory.mkdir()
    for path in tiny_model("texts").glob("tokenizer*"):
        shutil.copy(path, directory)
    (directory / "config.json").write_text(json.dumps(toy_family.CONFIG))
    tensors = toy_family.tensors_of(parse_config(toy_family.CONFIG))
    stored = {name: tensor.astype(BF16) for name, tensor in tensors.items()}
    save_tensors(directory / "model.safetensors", stored)
    return directory


@pytest.fixture
def make(model: Path, tmp_path: Path, calib_text: Path) -> Callable[..., Path]:
    def run(scheme: str = "W8A8_DYNAMIC", algorithm: str = "minmax", **more: Any) -> Path:
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        options = QuantizeOptions(model, output, scheme, algorithm, **more)
        if prepared_with_data(options):
            options = QuantizeOptions(
                model, output, scheme, algorithm, **more, calib=calib_text, **DATA
            )
        run_job(options)
        return output

    def prepared_with_data(options: QuantizeOptions) -> bool:
        return options.algorithm not in ("minmax", "quarot") or options.scheme == "W8A8"

    return run


def losses(directory: Path, calib: Path, **more: Any) -> float:
    tokens = eval_windows(calib, directory, 32, 8)
    return perplexity(open_model(directory), tokens, **more).loss


def test_its_blocks_are_planned(model):
    config = load_config(model)
    plan = prepare(QuantizeOptions(model, model.with_name("x"), "W8A8_DYNAMIC")).plan
    assert [len(plan.groups(index)) for index in (0, 1)] == [4, 8]
    assert plan.float_linears() == [ROUTER.removesuffix(".weight")]
    dense, mixed = config.blocks
    assert dense.hidden == ("hidden states", "hidden states after attention", "output")
    edge = mixed.edge_of("mlp.gate")
    assert edge.consumers == ("experts.0.gate_up", "experts.1.gate_up", "shared.gate_up")
    assert mixed.group_of("mlp.gate") is None and mixed.taps[-1] == "router scores"
    check_tp(config, 2)
    with pytest.raises(MsQuantError, match="tp is 3, expected a divisor of num_attention_heads"):
        check_tp(config, 3)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(
    ("scheme", "algorithm", "more"),
    [
        ("W8A8_DYNAMIC", "minmax", {}),
        ("W8A8", "minmax", {}),
        ("W8A8_DYNAMIC", "smoothquant", {"smoothing_target": "norm"}),
    ],
    ids=["data-free", "static", "smoothed"],
)
def test_every_format_holds_it(format, scheme, algorithm, more, make, model, calib_text):
    """Written, read, verified and evaluated."""
    output = make(scheme, algorithm, formats=(format,), **more)
    result = verify_checkpoint(output, model)
    assert not result.problems and result.left_float == 1
    assert result.quantized == 7 + 4 + 3 * 3
    exact = losses(model, calib_text)
    assert losses(output, calib_text) == pytest.approx(exact, rel=0.02)


class Exact:
    """A grid on which every weight is its own code."""

    group = 0

    def values(self, codes: np.ndarray, start: int = 0) -> np.ndarray:
        return codes


def keep(problem: Problem, solution: Solution) -> tuple[dict[str, QuantizedLinear], dict]:
    return {
        name: QuantizedLinear(weight, Exact(), problem.biases.get(name), Float(), solution.smooth)
        for name, weight in checked(problem, solution).items()
    }, {}


def second_block(
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> tuple[ModelConfig, BlockForward, Positions, np.ndarray]:
    config = parse_config(toy_family.CONFIG)
    tensors = toy_family.tensors_of(config)
    change(tensors)
    hidden = np.random.default_rng(1).normal(size=(6, 24, 64)).astype(np.float32)
    block = BlockForward.load(config, 1, tensors.__getitem__)
    return config, block, Positions(config, 24), hidden


@pytest.mark.parametrize("algorithm", ["smoothquant", "osl", "awq"])
@pytest.mark.parametrize("exclude", ["", "*.mlp.experts.*", "*.mlp.shared_experts.*"])
def test_all_that_reads_one_norm_is_smoothed_together(algorithm, exclude):
    """The block computes what it did, whatever of it stays float. Where experts do, or where a
    search would read all of them, the norm is left alone."""

    def stored(tensors: dict[str, np.ndarray]) -> None:
        """Powers of two make up for no rounding of a gain."""
        for name, array in tensors.items():
            tensors[name] = array.astype(BF16).astype(np.float32)

    config, block, at, hidden = second_block(stored)
    scheme, options = ("W4A16", {"group_size": 32}) if algorithm == "awq" else ("W8A8_DYNAMIC", {})
    plan = make_plan(
        config,
        scheme,
        algorithm,
        dtype=np.dtype(BF16),
        exclude=[exclude] if exclude else [],
        scheme_options=options,
        smoothing_target="norm",
    )
    hooks = BlockHooks(rounding=keep)
    seen = observe(block, at, [hidden], hidden.shape, wanted([plan], 1, hooks))
    made = quantize(plan, LoadedWeights(block, at), seen, hooks)
    readers = config.block(1).readers(config.block(1).edge_of("mlp.gate"))
    changed = {name.removesuffix(".weight") for name in made.floats}
    floats = {path for path in readers if path not in made.linears}
    together = algorithm == "smoothquant" and ".experts." not in exclude
    expected = {"post_attention_layernorm", *floats} if together else set()
    assert changed - {"input_layernorm"} == expected
    arrays = {**block.arrays, **made.floats}
    arrays |= {f"{path}.weight": linear.weight for path, linear in made.linears.items()}
    assert any((arrays[name] != block.arrays[name]).any() for name in arrays)
    after = BlockForward.load(config, 1, lambda name: arrays[name.split(".", 3)[3]])
    np.testing.assert_allclose(after(hidden, at), block(hidden, at), rtol=2e-3, atol=2e-3)


def test_verify_finds_a_router_that_was_not_folded(make, model, load_tensors, save_tensors):
    output = make(algorithm="smoothquant", formats=("ascend",))
    tensors, source = load_tensors(output), load_tensors(model)
    assert (tensors[ROUTER] != source[ROUTER]).any()
    result = verify_checkpoint(output, model)
    assert not result.problems
    (file,) = output.glob("*.safetensors")
    save_tensors(file, {**tensors, ROUTER: source[ROUTER]})
    seal_again(output)
    (problem,) = verify_checkpoint(output, model).problems
    assert problem.startswith(f"{ROUTER}: ") and "what the norm before it was" in problem


@pytest.mark.parametrize(
    ("scheme", "algorithm", "more"),
    [
        ("W4A16", "awq+gptq", {"scheme_options": {"group_size": 32}}),
        ("W8A8_DYNAMIC", "quarot", {}),
        ("W8A8", "osl", {"kv_cache": "C8"}),
        ("W8A8_MIX", "flexsmooth", {}),
        ("W8A8_DYNAMIC", "smoothquant", {"dtype": "float16", "exclude": ("*.mlp.experts.*",)}),
    ],
    ids=str,
)
def test_algorithms_know_it(scheme, algorithm, more, make, model, calib_text):
    output = make(scheme, algorithm, **more)
    assert not verify_checkpoint(output, model).problems
    exact = losses(model, calib_text)
    assert losses(output, calib_text) == pytest.approx(exact, rel=0.05)


def test_it_writes_text(make):
    prompt = np.arange(5)
    for directory in (make("W8A16"), make("W8A8", kv_cache="C8")):
        assert len(list(Generator(open_model(directory)).generate(prompt, 4))) == 4


def test_a_float16_runtime_computes_it(make, calib_text):
    output = make(dtype="float16")
    near = losses(output, calib_text)
    assert losses(output, calib_text, float16=True) == pytest.approx(near, rel=0.01)


def planned(model: Path, *steps: Step) -> dict[str, str]:
    """The algorithms of the groups of the second block."""
    recipe = Recipe((Rule("W8A8_DYNAMIC"),), steps)
    plan = plan_of_recipe(load_config(model), recipe, np.dtype(BF16), smoothing_target="norm")
    found = {str(group): layer.algorithms.name for group, layer in plan.layers.items() if layer}
    prefix = "model.layers.1."
    return {n.removeprefix(prefix): name for n, name in found.items() if n.startswith(prefix)}


def test_a_recipe_names_kinds_of_groups(model):
    found = planned(model, Step("smoothquant", groups=("gate_up",)))
    smoothed = {name for name, algorithm in found.items() if algorithm == "smoothquant"}
    assert smoothed == {"experts.0.gate_up", "experts.1.gate_up", "shared.gate_up"}


def test_readers_of_one_norm_cannot_be_smoothed_in_two_ways(model):
    one = Step("smoothquant", {"alpha": 0.5}, include=("*.experts.*",))
    assert planned(model, one)["shared.gate_up"] == "minmax"  # its columns are multiplied, too
    other = Step("flexsmooth", include=("*.shared_experts.*",))
    with pytest.raises(MsQuantError, match="read one input, which the"):
        planned(model, one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_expert_that_no_token_reaches_is_refused(dtype):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[ROUTER][1] = tensors[ROUTER][0]  # the first of the best

    config, block, at, hidden = second_block(change)
    plan = make_plan(config, "W8A8_DYNAMIC", "smoothquant", dtype=DTYPES[dtype])
    seen = observe(block, at, [hidden], hidden.shape, wanted([plan], 1, NO_HOOKS))
    assert not seen.ranges.divisions(config)
    with pytest.raises(MsQuantError, match="gate_proj: no token of the calibration data reaches"):
        quantize(plan, LoadedWeights(block, at), seen)


def test_taps_are_shown():
    config, block, at, hidden = second_block()
    shown: dict[str, list[np.ndarray]] = {tap: [] for tap in config.block(1).taps}
    watched = block.with_taps({tap: [found.append] for tap, found in shown.items()})
    np.testing.assert_array_equal(watched(hidden, at), block(hidden, at))
    shapes = {tap: [x.shape for x in found] for tap, found in shown.items()}
    assert shapes == {
        "q": [(6, 4, 24, 16)],
        "k": [(6, 2, 24, 16)],
        "v": [(6, 2, 24, 16)],
        "attention output": [(6, 24, 64)],
        "router scores": [(6 * 24, 2)],
    }


def test_each_expert_is_analysed(model: Path, calib_text: Path) -> None:
    found = analyze(model, calib_text, ["W8A8", "W8A16"], **DATA)
    names = [group.name for group in found.groups if group.block == 1]
    assert len(names) == 8 and {"experts.1.gate_up", "shared.down"} <= set(names)
    for group in found.groups:
        error = group.schemes["W8A8"]
        assert error.output_error > 0 and error.block_error > 0 and error.loss_increase > 0
        assert group.input is not None
        routed = group.name.startswith("experts")
        assert (group.input.tokens < DATA["samples"] * DATA["seq_len"]) == routed
