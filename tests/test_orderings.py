"""What theory predicts of schemes and algorithms, on the bundled model's outlier twin.

Measured is the error of every linear's output on held-out text, relative to that output, in the
mean over the linears of two blocks. Inputs are those of the float model, so that one linear's
error does not reach the next, and every pair is compared under the same rules.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import usual
from watched_block import block_with_inputs

from ms_quant.algorithms import get_algorithms
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.data.calibration import eval_windows, load_tokens
from ms_quant.evaluation.float32_forward import load_block
from ms_quant.formats.opening import FloatModel
from ms_quant.models.block_forward import Positions
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import VALUES
from ms_quant.statistics.observers import ActivationStats

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
MODEL, TEXT = ROOT / "models" / "stdlib-qwen3-6m", ROOT / "models" / "text"
WINDOWS, LENGTH, BLOCKS = 8, 256, 2
Group = tuple[dict[str, np.ndarray], ActivationStats, np.ndarray]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Weights, calibration statistics and held-out inputs of every group of the twin."""
    twin = tmp_path_factory.mktemp("model") / "twin"
    runpy.run_path(str(ROOT / "tools" / "inject_outliers.py"))["inject"](MODEL, twin)
    model = FloatModel(twin)
    calib = load_tokens(TEXT / "calibration.txt", twin, WINDOWS, LENGTH, 0)
    heldout = eval_windows(TEXT / "heldout.txt", twin, LENGTH)[:2]
    return _observe(model, np.concatenate([calib, heldout]))


def _observe(model: FloatModel, tokens: np.ndarray) -> list[Group]:
    found, hidden = [], model.tensor("model.embed_tokens.weight")[tokens]
    positions = Positions(model.config, LENGTH)
    for index in range(BLOCKS):
        hidden, inputs = block_with_inputs(load_block(model, index), hidden, positions)
        for group in model.config.block(0).groups:
            x = inputs[group.members[0]].reshape(len(tokens), LENGTH, -1)
            stats = ActivationStats(x.shape[2], WINDOWS * LENGTH, with_hessian=True)
            stats.update(x[:WINDOWS])
            weights = {
                member: model.tensor(f"{block_prefix(index)}{member}.weight")
                for member in group.members
            }
            found.append((weights, stats, x[WINDOWS:].reshape(-1, x.shape[2])))
    return found


def _errors(linears: Mapping[str, QuantizedLinear], weights: Any, x: np.ndarray) -> list[float]:
    pairs = ((linears[name].forward(x), x @ weight.T) for name, weight in weights.items())
    return [float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) for found, exact in pairs]


@pytest.fixture(scope="module")
def error(groups: list[Group]) -> Callable[..., float]:
    known: dict[Any, float] = {}

    def measure(scheme: str, algorithm: str = "minmax", **options: Any) -> float:
        key = (scheme, algorithm, *options.items())
        if key not in known:
            known[key] = float(np.mean([e for group in groups for e in _solve(key, group)]))
        return known[key]

    return measure


def _solve(key: tuple, group: Group) -> list[float]:
    weights, stats, heldout = group
    options = dict(key[2:])
    scheme, scales = usual(key[0], **{k: v for k, v in options.items() if k in VALUES})
    settings = {name: value for name, value in options.items() if name not in VALUES}

    def loss(linears: Mapping[str, QuantizedLinear]) -> float:
        return sum(e**2 for e in _errors(linears, weights, stats.rows[::4]))

    problem = Problem(
        "group", scheme, weights, {}, stats, DTYPES["bfloat16"], loss, scale_type=scales
    )
    return _errors(
        apply(problem, get_algorithms(key[1], scheme, settings).solve(problem)), weights, heldout
    )


@pytest.mark.parametrize("group_size", [0, 128, 64])
@pytest.mark.parametrize("algorithm", ["gptq", "awq", "clip", "ssz"])
def test_at_4_bits_algorithms_are_below_rounding_to_nearest(error, algorithm, group_size):
    plain = error("W4A16", group_size=group_size)
    assert error("W4A16", algorithm, group_size=group_size) < (
        plain if algorithm != "gptq" else 0.95 * plain
    )


@pytest.mark.parametrize("algorithm", ["minmax", "gptq"])
def test_smaller_groups_are_better(error, algorithm):
    found = [error("W4A16", algorithm, group_size=size) for size in (0, 128, 32)]
    assert found == sorted(found, reverse=True)
    assert error("W4A16", algorithm, group_size=128, symmetric=False) < found[1]


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A4_DYNAMIC"])
@pytest.mark.parametrize("algorithm", ["smoothquant", "osl"])
def test_smoothing_helps_where_activations_have_outliers(error, scheme, algorithm):
    assert error(scheme, algorithm) < 0.9 * error(scheme)
    assert error(scheme, f"{algorithm}+gptq") < error(scheme, algorithm)


@pytest.mark.parametrize("rule", ["mxfp4_msmodelslim", "mxfp4_cann0", "mxfp4_cann2_7.25"])
def test_a_second_scale_is_better_than_one(error, rule):
    assert error("W4A4_MXFP4_DUALSCALE", rule=rule) < error("W4A4_MXFP4", rule=rule)


def test_more_bits_are_better(error):
    assert error("W8A8_DYNAMIC") < error("W4A8_DYNAMIC") < error("W4A4_DYNAMIC")
    assert error("W8A8_MXFP8") < error("W4A8_MXFP") < error("W4A4_MXFP4")
    assert error("W8A16") < 0.2 * error("W4A16")


def test_a_branch_of_low_rank_helps(error):
    assert error("W4A4_MXFP4_SVD") < error("W4A4_MXFP4")


def test_flatquant_is_far_better_than_plain_int4(error):
    assert error("W4A4_FLATQUANT_DYNAMIC", steps=60) < 0.4 * error("W4A4_DYNAMIC")
