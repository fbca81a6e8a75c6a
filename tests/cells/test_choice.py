"""What each linear becomes: recipes and predicates; looking before; what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, nn

import ms_quant
from ms_quant.algorithms import AlgorithmPipeline, get_algorithms
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
from ms_quant.recipe.records import Rule, Step
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import get_scheme

pytestmark = pytest.mark.usefixtures("blocking_mindspore")

DATA = np.random.default_rng(3).normal(size=(40, 32)).astype("f4")


def network(seed: int = 0) -> nn.Cell:
    rng = np.random.default_rng(seed)
    made = nn.SequentialCell(nn.Dense(32, 64), nn.ReLU(), nn.Dense(64, 32), nn.Dense(32, 8))
    for parameter in made.get_parameters():
        parameter.set_data(Tensor(rng.normal(size=parameter.shape).astype("f4") * 0.2))
    return made


def became(made: nn.Cell) -> list[tuple[str, str, str]]:
    return [(row.path, row.scheme, row.algorithm) for row in ms_quant.summary(made)]


def same(one: nn.Cell, other: nn.Cell) -> None:
    found = dict(other.parameters_and_names())
    assert {name for name, _ in one.parameters_and_names()} == set(found)
    for name, parameter in one.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), found[name].asnumpy(), err_msg=name)


RECIPE = """
apiversion: ms_quant_v1
rules:
  - scheme: W8A8
    include: ["0"]
    algorithms: [ssz]
  - scheme: W4A16
    options: {group_size: 32}
    include: ["2"]
    algorithms: [gptq]
steps:
  - algorithm: smoothquant
    options: {alpha: 0.6}
    include: ["0"]
"""


@pytest.mark.parametrize("kind", ["str", "path", "record"])
def test_a_recipe_gives_schemes_algorithms_and_options(tmp_path, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = {"str": str(path), "path": path, "record": ms_quant.load_recipe(path)}[kind]
    made = ms_quant.quantize(network(), recipe, calibration=[DATA])
    assert became(made) == [
        ("0", "W8A8", "smoothquant+ssz"),
        ("2", "W4A16", "gptq"),
        ("3", "FLOAT", "-"),
    ]
    apart = network()
    ms_quant.quantize(
        apart, "W4A16", include=["2"], group_size=32, calibration=[DATA], algorithm="gptq"
    )
    options = {
        "include": ["0"],
        "calibration": [DATA],
        "algorithm": "smoothquant+ssz",
        "alpha": 0.6,
    }
    same(ms_quant.quantize(apart, "W8A8", **options), made)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (
            {"rules": (Rule("W8A16", include=("9",), where="rules[0]"),)},
            {},
            "rules[0]: pattern '9' ",
        ),
        ({"kv_cache": "C8"}, {}, "kv_cache: is for checkpoints, expected a recipe of rules and st"),
        (
            {"steps": (Step("smoothquant", groups=("qkv",), where="steps[0]"),)},
            {},
            "steps[0]: groups",
        ),
        (
            {"steps": (Step("quarot", where="steps[0]"),)},
            {},
            "algorithm 'quarot': quarot rotates a whole decoder checkpoint",
        ),
        ({}, {"algorithm": "ssz"}, "algorithm: given with a recipe, which says all"),
        ({}, {"group_size": 32}, "group_size: given with a recipe, which says all"),
    ],
)
def test_a_recipe_that_is_none_for_a_network(recipe, options, message):
    made = ms_quant.Recipe(**{"rules": (Rule("W8A16", where="rules[0]"),), **recipe})
    with pytest.raises(MsQuantError, match=f"^{re.escape(message)}"):
        ms_quant.quantize(network(), made, **options)


@dataclass(frozen=True)
class Layer:
    scheme: Scheme
    algorithms: AlgorithmPipeline


def test_a_predicate_gives_names_records_or_none():
    scheme = get_scheme("W4A16", group_size=32)
    seen = []

    def choose(path, cell):
        seen.append((path, type(cell).__name__))
        if path == "0":
            return "W8A8_DYNAMIC"
        return Layer(scheme, get_algorithms("ssz", scheme)) if path == "2" else None

    made = ms_quant.quantize(network(), choose, algorithm="ssz")
    assert seen == [("0", "Dense"), ("2", "Dense"), ("3", "Dense")]
    assert became(made) == [
        ("0", "W8A8_DYNAMIC", "ssz"),
        ("2", "W4A16", "ssz"),
        ("3", "FLOAT", "-"),
    ]
    seen.clear()
    ms_quant.quantize(network(), choose, include=["2"])
    assert seen == [("2", "Dense")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (8, "^0: the predicate gives 8, expected the name of a scheme, a record with a scheme and"),
        ("W4", "^0: scheme 'W4' is unknown"),
    ],
)
def test_other_answers_are_refused(answer, message):
    made = network()
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(made, lambda path, cell: answer)
    assert not any(isinstance(cell, QuantLinear) for cell in made)


def test_what_is_no_scheme():
    with pytest.raises(MsQuantError, match=r"^scheme is 8, expected the name of a scheme, a recip"):
        ms_quant.quantize(network(), 8)
    with pytest.raises(
        MsQuantError, match=r"^Dense: is a linear itself, expected the name of a sch"
    ):
        ms_quant.quantize(nn.Dense(4, 4), lambda path, cell: "W8A16")


# Looking before anything is replaced


def test_calibrate_replaces_nothing_and_tells_the_ranges():
    made = network()
    observed = ms_quant.calibrate(made, [DATA[:15], DATA[15:]])
    assert [type(made[i]) for i in (0, 2, 3)] == [nn.Dense] * 3
    stats = observed["0"].stats
    np.testing.assert_array_equal(stats.low, DATA.min(axis=0))
    np.testing.assert_array_equal(stats.high, DATA.max(axis=0))
    assert (observed.calls, stats.tokens) == (2, 40)
    absmax = np.abs(DATA).max(axis=0)
    assert observed["0"].outlier_ratio == pytest.approx(absmax.max() / np.median(absmax))
    lines = str(observed).splitlines()
    assert lines[0].split() == ["linears", "tokens", "low", "high", "max", "/", "median", "block"]
    assert lines[1].split()[:4] == ["0", "40", f"{DATA.min():.4g}", f"{DATA.max():.4g}"]


@pytest.mark.parametrize(
    ("kept", "used", "message"),
    [
        (
            {},
            {"algorithm": "gptq"},
            "0: calibrate kept too few products of channels for gptq, expe",
        ),
        (
            {},
            {"algorithm": "osl"},
            "0: calibrate kept too few calls of blocks for osl, expected ms",
        ),
        ({}, {"algorithm": "histogram"}, "0: calibrate kept too few histogram for histogram"),
        (
            {},
            {"scheme": "W4A4_FLATQUANT_DYNAMIC"},
            "0: calibrate kept too few tokens for flatquant",
        ),
        (
            {},
            {"scheme": "W8A8_TIMESTEP"},
            "0: calibrate kept no ranges of timesteps, expected time",
        ),
        ({"include": ["2"]}, {}, "0: is not among what calibrate looked at, expected it there"),
        ({}, {"groups": ()}, "groups: given with observations, expected it for calibrate"),
    ],
)
def test_observations_that_lack_what_is_needed(kept, used, message):
    observed = ms_quant.calibrate(network(), [DATA], **kept)
    made = network()
    with pytest.raises(MsQuantError, match=f"^{re.escape(message)}"):
        ms_quant.quantize(made, calibration=observed, **used)
    assert not any(isinstance(cell, QuantLinear) for cell in made)


def test_linears_that_calibrate_does_not_reach_are_told_when_they_are_needed():
    observed = ms_quant.calibrate(network(), [])
    with pytest.raises(
        MsQuantError, match=r"^0: no calibration input reached it; exclude it or add"
    ):
        ms_quant.quantize(network(), calibration=observed)
    with pytest.raises(
        MsQuantError, match=r"^algorithm 'magic' is unknown, expected one of minmax, "
    ):
        ms_quant.calibrate(network(), [DATA], algorithm="magic")
    with pytest.raises(
        MsQuantError, match=r"^Dense: is a linear itself, expected a network of them"
    ):
        ms_quant.calibrate(nn.Dense(32, 4), [DATA])


# What became of it


def test_errors_of_a_summary_are_those_of_outputs_or_weights():
    exact = network()
    made = ms_quant.quantize(network(), "W8A8_DYNAMIC", include=["0"])
    ms_quant.quantize(made, "W8A8", include=["2"], calibration=[DATA])
    first, second, third = ms_quant.summary(made)
    weight = exact[0].weight.asnumpy()
    rounded = made[0].weight.asnumpy() * made[0].weight_scale.asnumpy()[:, None]
    expected = np.square(rounded - weight).sum() / np.square(weight).sum()
    assert first.error == pytest.approx(expected, rel=1e-4) and first.error_of == "weight"
    hidden = np.maximum(made[0](Tensor(DATA)).asnumpy(), 0)
    output = exact[2](Tensor(hidden)).asnumpy()
    wrong = made[2](Tensor(hidden)).asnumpy() - output
    expected = np.square(wrong).sum() / np.square(output).sum()
    assert second.error == pytest.approx(expected, rel=1e-2) and second.error_of == "output"
    assert (third.scheme, third.error) == ("FLOAT", None)
    assert len(ms_quant.summary(made)) == 3
    text = str(ms_quant.summary(made)).splitlines()
    assert text[1].split()[:6] == ["0", "QuantLinear", "64", "x", "32", "W8A8_DYNAMIC"]


@pytest.mark.parametrize("format", ["mindie-sd", "network"])
def test_what_is_loaded_has_a_scheme_and_no_known_error(tmp_path, format):
    made = ms_quant.quantize(network(), "W8A8_DYNAMIC", dtype="bfloat16")
    path = ms_quant.save_quantized(made, str(tmp_path), format=format)
    again = ms_quant.load_quantized(network(1), path)
    assert [row.scheme for row in ms_quant.summary(again)] == ["W8A8_DYNAMIC"] * 3
    assert {row.error for row in ms_quant.summary(again)} == {None}
    same(made, again)
    same(made, ms_quant.quantize(network(1), path))


def test_formats_that_are_none(tmp_path):
    made = ms_quant.quantize(network(), "W8A8_DYNAMIC")
    with pytest.raises(
        MsQuantError, match=r"^format is 'ascend', expected 'mindie-sd', 'network' or"
    ):
        ms_quant.save_quantized(made, tmp_path, format="ascend")
    with pytest.raises(
        MsQuantError, match=r"^whole: given with format 'mindie-sd', which holds lin"
    ):
        ms_quant.save_quantized(made, tmp_path, format="mindie-sd", whole=True)
