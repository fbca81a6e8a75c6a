"""A choice as a recipe and as a model, and what groups cost."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.analysis.records import GroupSensitivity, InputFacts, Sensitivity
from ms_quant.analysis.run import run_analysis
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import BadFileError
from ms_quant.files.sealed import write_sealed
from ms_quant.formats.float_model import open_float
from ms_quant.mixed_precision.costs import AT_RUN_TIME, FLOAT, costs
from ms_quant.mixed_precision.decision import HEAVY_TAILS, steady_costs
from ms_quant.mixed_precision.heldout import (
    BUNDLED,
    BUNDLED_WINDOWS,
    OTHER_WINDOWS,
    heldout_windows,
)
from ms_quant.mixed_precision.recipe import recipe_of
from ms_quant.mixed_precision.request import CheckedMixed, MixedOptions, prepare_mixed
from ms_quant.mixed_precision.trials import TRIALS, Increase, Trials
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.best import with_best
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.planning import make_plan, plan_of_recipe
from ms_quant.plan.plan import all_groups
from ms_quant.progress import silent
from ms_quant.recipe import from_native, to_native
from ms_quant.recipe.checks import checked

ROOT = Path(__file__).parent.parent.parent
MODEL, TEXT = ROOT / "models" / "stdlib-qwen3-6m", ROOT / "models" / "text"
BF16 = DTYPES["bfloat16"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("schemes", "algorithm", "options"),
    [
        (("W8A8", FLOAT), "quarot+smoothquant", {"alpha": 0.7}),
        (("W8A8_MIX", "W8A8_DYNAMIC", "W8A16", FLOAT), "osl+gptq", {"gptq.damping": 0.05}),
        (("W8A8", "W8A16"), "histogram", {}),
    ],
)
def test_a_recipe_gives_each_group_its_scheme(
    seed: int, schemes: tuple[str, ...], algorithm: str, options: dict[str, Any]
) -> None:
    config, rng = open_float(MODEL).config, np.random.default_rng(seed)
    groups = [group for group, _ in all_groups(config)]
    choice = {group: str(rng.choice(schemes)) for group in groups}
    choice[groups[0]] = schemes[0]
    job = QuantizeOptions(
        MODEL, Path("out"), algorithm=algorithm, algorithm_options=options, calib=Path("c.txt")
    )
    recipe = recipe_of(config, choice, job, "ascend", {"asked": {"choose": list(schemes)}})
    again = from_native(to_native(recipe))
    assert checked(again) == recipe and again.made == recipe.made
    plan = plan_of_recipe(config, again, BF16)
    for group in groups:
        layer = plan.layers[group]
        assert (FLOAT if layer is None else layer.scheme.name) == choice[group]
        if layer is None:
            continue
        rotated = "quarot" in algorithm
        assert ("quarot" in layer.algorithms.names) == rotated
        smooths = layer.scheme.name != "W8A16" and algorithm != "histogram"
        assert layer.algorithms.any("smooths") == smooths
        assert layer.algorithms.any("histogram") == (
            algorithm == "histogram" and layer.scheme.name == "W8A8"
        )
        if "gptq" in algorithm:
            assert layer.algorithms.options["gptq"].damping == 0.05
        if "alpha" in options:
            assert layer.algorithms.options["smoothquant"].alpha == 0.7


def test_a_recipe_of_schemes_without_calibration_names_no_data() -> None:
    config = open_float(MODEL).config
    choice = {group: "W8A16" for group, _ in all_groups(config)}
    job = QuantizeOptions(MODEL, Path("out"), calib=Path("c.txt"), samples=4)
    recipe = recipe_of(config, choice, job, "ascend", {})
    assert recipe.calib is None and recipe.samples is None


def test_costs_are_ordered_as_runtimes_work() -> None:
    config = open_float(MODEL).config
    names = ["W8A8", "W8A8_MIX", "W8A8_DYNAMIC", "W8A16"]
    plans = {name: make_plan(config, name, "minmax", dtype=BF16, format="ascend") for name in names}
    for group, known in costs(plans).items():
        work = [known[name].work for name in [*names, FLOAT]]
        assert work == sorted(work), group
        assert known[FLOAT].bits == 16 * known[FLOAT].weights
        assert known["W8A8_DYNAMIC"].product == 8 + AT_RUN_TIME
        assert 8 < known["W8A8"].bits / known["W8A8"].weights < 8.5


def _asked(model: Path, tmp_path: Path, algorithm: str, format: str) -> CheckedMixed:
    job = QuantizeOptions(
        model,
        tmp_path / "out",
        algorithm=algorithm,
        calib=TEXT / "calibration.txt",
        samples=8,
        seq_len=64,
        formats=(format,),
    )
    choose = ["W8A8", FLOAT] if format == "golden-stick" else ["W8A8", "W8A8_DYNAMIC", FLOAT]
    return prepare_mixed(
        MixedOptions(job, choose, max_ppl_increase=0.01, heldout=TEXT / "heldout.txt")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "format"),
    [("minmax", "golden-stick"), ("smoothquant", "ascend"), ("quarot+smoothquant", "ascend")],
)
def test_what_is_put_together_is_what_is_written(
    tmp_path: Path, algorithm: str, format: str
) -> None:
    """Where smoothing is folded into norms these are rounded, and with them other codes: errors are
    then of the same size, and over ten times as large without the smoothing."""
    model = tmp_path / "twin"
    runpy.run_path(str(ROOT / "tools" / "inject_outliers.py"))["inject"](MODEL, model)
    asked = _asked(model, tmp_path, algorithm, format)
    assert asked.analysis is not None
    asked.directory.mkdir()
    run_analysis(asked.analysis)
    trials, rng = Trials(asked, lambda step, part: None), np.random.default_rng(3)
    choice = {group: str(rng.choice(asked.options.choose)) for group in asked.costs}
    assembled, made = trials.estimate(choice), trials.increase(choice)
    if format == "golden-stick":
        assert assembled.loss == pytest.approx(made.loss, abs=1e-6)
    one, exact, other = (np.array(losses["prefill"]) for losses in trials.measured.values())
    ratio = np.linalg.norm(one - exact) / np.linalg.norm(other - exact)
    assert 0.25 < ratio < 4
    assert trials.estimate(choice) == assembled  # what was measured is not measured again


@pytest.mark.parametrize(
    "losses",
    [
        {"float": [1.0]},
        {"float": {}},
        {"float": {"decode": [1.0] * 8}},
        {"float": {"prefill": [1.0] * 8, "other": [1.0] * 8}},
        {"float": {"prefill": [1.0] * 7}},
        {"float": {"prefill": ["1.0"] * 8}},
        {"0a": {"prefill": 1.0}},
    ],
)
def test_malformed_trials_are_refused(tmp_path: Path, losses: dict[str, Any]) -> None:
    asked = _asked(MODEL, tmp_path, "minmax", "golden-stick")
    assert asked.heldout is not None and len(asked.heldout) == 8
    asked.directory.mkdir()
    path = asked.directory / TRIALS
    write_sealed(path, {"float": {"prefill": [1.0] * 8}})
    assert Trials(asked, silent).measured
    write_sealed(path, losses)
    with pytest.raises(
        BadFileError, match=rf"{TRIALS}: is malformed or has changed; delete it to measure again"
    ):
        Trials(asked, silent)
    write_sealed(path, {"float": {"prefill": [1.0] * 8}})
    path.write_text(path.read_text().replace("1.0", "1.5", 1))
    with pytest.raises(BadFileError, match=rf"{TRIALS}: is malformed or has changed"):
        Trials(asked, silent)


def test_what_is_measured_is_within_with_its_error(tmp_path: Path) -> None:
    """Two choices of one mean: that which is sure is within the budget."""
    asked = _asked(MODEL, tmp_path, "minmax", "golden-stick")
    asked.directory.mkdir()
    trials, exact = Trials(asked, silent), [1.0] * 8
    trials.measured["float"] = {"prefill": exact}
    found = {}
    for name, off in (("sure", 0.001), ("unsure", 0.03)):
        losses = [1.008 + off * (-1) ** k for k in range(8)]
        found[name] = trials._found(name, lambda title, losses=losses: {"prefill": losses})
        assert found[name].loss == pytest.approx(0.008)
        assert found[name].bound == pytest.approx(0.008 + off / 7**0.5)
    budget = math.log1p(0.01)
    assert found["sure"].bound < budget < found["unsure"].bound
    assert Increase(0.008, None, "prefill").bound == 0.008


@pytest.mark.parametrize(
    ("algorithm", "format", "left"),
    [
        ("quarot+smoothquant", "golden-stick", {FLOAT}),
        ("quarot+smoothquant", "ascend", {"W8A8_DYNAMIC", FLOAT}),
        ("smoothquant", "golden-stick", {"W8A8", FLOAT}),
    ],
)
def test_heavy_tails_get_no_static_scale(
    tmp_path: Path, algorithm: str, format: str, left: set[str]
) -> None:
    """Of a rotated model: there they are not those of an outlier channel."""
    asked = _asked(MODEL, tmp_path, algorithm, format)
    facts = {"absmax": 9.0, "channel_median": 1.0, "token_median": 1.0, "massive_tokens": 0}
    usual = InputFacts(
        **facts, channels=(), positions=(), tokens=512, std=9.0, quantile=0.1, kurtosis=10.0
    )
    groups = tuple(
        GroupSensitivity(0, name, name, (), 1, replace(usual, kurtosis=kurtosis), {})
        for name, kurtosis in (("qkv", 10.0), ("down", HEAVY_TAILS + 1))
    )
    found = steady_costs(asked, Sensitivity(1, "", {}, ("W8A8",), groups))
    changed = GroupId(0, "down")
    assert set(found[changed]) == left
    assert all(costs == asked.costs[group] for group, costs in found.items() if group != changed)


def test_without_a_text_all_of_the_bundled_one_is_measured(tmp_path: Path) -> None:
    job = QuantizeOptions(MODEL, tmp_path, calib=TEXT / "calibration.txt", samples=8, seq_len=64)
    notes: list[str] = []
    found = heldout_windows(job, None, True, notes.append)
    assert found is not None and len(found) == OTHER_WINDOWS + BUNDLED_WINDOWS
    whole = eval_windows(BUNDLED, MODEL, 64)
    places = [np.flatnonzero((whole == window).all(axis=1))[0] for window in found[OTHER_WINDOWS:]]
    assert places == sorted(set(places)) and places[0] == 0
    assert places[-1] > 0.9 * len(whole)
    assert notes[0].startswith(f"perplexity is measured on {OTHER_WINDOWS} other windows of ")


def test_best_is_what_a_scheme_has_and_a_model_can(tiny_model: Callable[..., Path]) -> None:
    def best(*schemes: str, config: ModelConfig, algorithm: str = "best", **options: Any) -> Any:
        job = QuantizeOptions(MODEL, Path("out"), algorithm=algorithm, algorithm_options=options)
        made = with_best(job, schemes, config)
        return made.algorithm, made.algorithm_options

    config = open_float(MODEL).config
    assert best("W8A8", config=config, algorithm="osl") == ("osl", {})
    only = {"smoothquant.only": "*down_proj"}
    assert best("W8A8", config=config) == ("quarot+smoothquant", only)
    assert best("W8A8", config=config, alpha=0.7) == ("quarot+smoothquant", {**only, "alpha": 0.7})
    assert best("W8A16", config=config) == ("minmax", {})
    assert best(FLOAT, "W8A8_DYNAMIC", config=config) == ("quarot", {})
    odd = tiny_model(hidden_size=92, num_attention_heads=2, num_key_value_heads=2)
    assert best("W8A8", config=open_float(odd).config) == ("smoothquant", {})


def test_group_ids_are_kept(tiny_model: Callable[..., Path]) -> None:
    config = open_float(tiny_model()).config
    plans = {"W8A8": make_plan(config, "W8A8", "minmax", dtype=BF16, exclude=["*.0.*down_proj"])}
    known = costs(plans)
    assert set(known[GroupId(0, "down")]) == {FLOAT}
    assert set(known[GroupId(1, "down")]) == {FLOAT, "W8A8"}
