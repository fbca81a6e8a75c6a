"""The search for a price, on functions in place of a model, and the directories it works in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.sealed import write_sealed
from ms_quant.job.directory import JobDirectory
from ms_quant.pipeline.request import CheckedJob, QuantizeOptions
from ms_quant.schemes.table import SCHEMES
from sparse_compress.rate import search
from sparse_compress.rate.goal import Goal
from sparse_compress.rate.search import (
    CLOSE,
    FARTHEST,
    MOST_TRIES,
    Search,
    at_price,
    measuring_directory,
    measuring_job,
    next_relative_mse,
    read_tries,
    remove_job,
    remove_measured,
)
from sparse_compress.rate.share import PRICES, Curve, predict

BUDGET = math.log1p(0.1)
FLOAT_LOSS = 2.0
CURVE = Curve(1 << 20, 1.0, PRICES, tuple(np.linspace(0.8, 0.2, len(PRICES))))
CURVES = {"model.layers.0.mlp.down_proj": CURVE}
Increase = Callable[[float], float]


def noisy(relative_mse: float) -> float:
    """Like a small model's loss over few tokens: a tenth up or down, the same each time."""
    factor = 1 + 0.1 * math.sin(1e5 * relative_mse)
    return 1.5 * relative_mse * factor


FUNCTIONS: dict[str, Increase] = {
    "as predicted": lambda relative_mse: relative_mse,
    "far below": lambda relative_mse: relative_mse / 40,
    "far above": lambda relative_mse: 40 * relative_mse,
    "with an intercept": lambda relative_mse: 0.06 + relative_mse,
    "better than float": lambda relative_mse: 3 * relative_mse - 0.05,
    "convex": lambda relative_mse: 20 * relative_mse**2,
    "steep": lambda relative_mse: 0.02 + 3000 * relative_mse**4,
    "concave": lambda relative_mse: 0.35 * math.sqrt(relative_mse),
    "a step": lambda relative_mse: 0.01 if relative_mse < 0.07 else 3.0,
    "noisy": noisy,
}


def tries_of(increase: Increase, first: float, most: int) -> list[tuple[float, float]]:
    """The tries that ``next_relative_mse`` leads to."""
    points = [(first, increase(first))]
    while len(points) < most and not CLOSE * BUDGET <= points[-1][1] <= BUDGET:
        relative_mse = next_relative_mse(points, BUDGET)
        points.append((relative_mse, increase(relative_mse)))
    return points


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "a step"])
@pytest.mark.parametrize("first", [BUDGET, BUDGET / 30, 30 * BUDGET])
def test_the_budget_is_reached_within_few_tries(name: str, first: float) -> None:
    points = tries_of(FUNCTIONS[name], first, MOST_TRIES)
    assert CLOSE * BUDGET <= points[-1][1] <= BUDGET, points


def test_powers_of_the_damage_are_met_at_once() -> None:
    assert len(tries_of(lambda relative_mse: 3 * relative_mse, BUDGET, MOST_TRIES)) == 2
    assert len(tries_of(lambda relative_mse: 20 * relative_mse**2, BUDGET, MOST_TRIES)) == 3
    assert (
        len(tries_of(lambda relative_mse: 0.35 * math.sqrt(relative_mse), BUDGET, MOST_TRIES)) == 3
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tries_go_on_only_where_there_is_something_to_learn(name: str) -> None:
    """Each is positive, not too far from the others, and between what was too good and too bad."""
    points = tries_of(FUNCTIONS[name], BUDGET, 20)
    for number in range(1, len(points)):
        before, (relative_mse, _) = points[:number], points[number]
        tried = [found for found, _ in before]
        assert min(tried) / FARTHEST <= relative_mse <= max(tried) * FARTHEST
        good = [found for found, increase in before if increase <= BUDGET]
        bad = [
            found
            for found, increase in before
            if increase > BUDGET and found > max(good, default=0)
        ]
        assert max(good, default=0) < relative_mse < min(bad, default=math.inf)


def test_a_step_is_narrowed_down() -> None:
    points = tries_of(FUNCTIONS["a step"], BUDGET, 30)
    good = max(relative_mse for relative_mse, increase in points if increase <= BUDGET)
    bad = min(relative_mse for relative_mse, increase in points if increase > BUDGET)
    assert good < 0.07 <= bad < 1.02 * good


@pytest.mark.parametrize(
    "points",
    [
        [(0.1, 0.0)],
        [(0.1, -1.0)],
        [(0.1, 0.01), (0.2, 0.01)],
        [(0.1, 0.5), (0.2, 0.4)],
        [(0.1, 0.5), (0.1, 0.5)],
        [(0.1, 0.5), (0.2, 0.01)],  # worse with less damage
        [(0.1, 0.0), (0.2, 0.5)],
        [(0.1, -1.0), (0.2, 0.5)],
    ],
)
def test_any_points_lead_to_a_positive_damage(points: list[tuple[float, float]]) -> None:
    assert 0.1 / FARTHEST <= next_relative_mse(points, BUDGET) <= 0.2 * FARTHEST


class World:
    """A search whose model is a function of the predicted damage."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch):
        self.options = QuantizeOptions(directory / "model", directory / "out")
        plan: Any = SimpleNamespace(
            config=SimpleNamespace(num_layers=1), scheme_of=lambda path: SCHEMES["W8A8"]
        )
        checkpoint: Any = None
        self.checked = CheckedJob(
            self.options, plan, checkpoint, checkpoint, None, {"seed": 1}, {}, 0, ("price",)
        )
        self.job, self.measured = directory / "out.job", directory / "out.job.measure"
        self.tries = self.measured / "tries.json"
        self.increase: Increase = lambda relative_mse: relative_mse
        self.evaluated: list[float | None] = []
        self.stop_at = -1
        patch.setattr(search, "FloatModel", lambda model: None)
        patch.setattr(search, "JobModel", lambda plan, job, model: job)
        patch.setattr(search, "read_curves", lambda checked, job: CURVES)
        patch.setattr(search, "run_blocks", self.make_block)
        patch.setattr(search, "prove_source", lambda checked, job, reading: None)
        patch.setattr(Search, "_loss", lambda _, model: self.loss(model))

    def make_block(self, checked: CheckedJob, job: JobDirectory, *_: object) -> None:
        job.block_file(0).write_text(str(job.record.get("price")))

    def loss(self, job: JobDirectory | None) -> float:
        if len(self.evaluated) == self.stop_at:
            raise KeyboardInterrupt
        price = None if job is None else job.record["price"]
        self.evaluated.append(price)
        if price is None:
            return FLOAT_LOSS
        return FLOAT_LOSS + self.increase(predict(CURVES, price).relative_mse)

    def find(self, increase: float = 0.1, tokens: int = 0) -> search.Found:
        goal = Goal(None, increase, np.full((1, 4), tokens, np.int32))
        return Search(self.checked, goal, lambda step, part: None).find()

    def job_price(self) -> float:
        return json.loads((self.job / "job.json").read_text())["price"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_what_is_found(world: World) -> None:
    world.increase = lambda relative_mse: 0.01 + 4 * relative_mse
    found = world.find()
    price, facts = found.facts["price"], found.facts
    increase = world.increase(predict(CURVES, price).relative_mse)
    assert CLOSE * BUDGET <= increase <= BUDGET
    assert facts["float_perplexity"] == pytest.approx(math.exp(FLOAT_LOSS))
    assert facts["perplexity"] == pytest.approx(math.exp(FLOAT_LOSS + increase))
    assert facts["perplexity"] <= 1.1 * facts["float_perplexity"]
    assert facts["predicted_ratio"] == predict(CURVES, price).ratio
    assert found.checked.record == {"seed": 1, "price": price}
    assert world.job_price() == price == world.evaluated[-1]  # its blocks are not made again
    assert world.evaluated[0] is None and None not in world.evaluated[1:]
    assert len(world.evaluated) <= 4


def test_the_best_of_the_tries_is_taken_and_the_others_are_forgotten(world: World) -> None:
    world.increase = lambda relative_mse: 0.01 if relative_mse < 0.07 else 3.0
    found = world.find()
    damages = [predict(CURVES, price).relative_mse for price in world.evaluated[1:] if price]
    best = max(relative_mse for relative_mse in damages if relative_mse < 0.07)
    assert predict(CURVES, found.facts["price"]).relative_mse == best
    assert len(damages) == len(set(damages)) <= MOST_TRIES
    was_last = world.evaluated[-1] == found.facts["price"]
    assert world.job.exists() is was_last
    assert not was_last or world.job_price() == found.facts["price"]


def test_a_killed_search_goes_on_with_the_same_prices(world: World) -> None:
    world.increase = lambda relative_mse: 0.02 + 3000 * relative_mse**4
    whole = world.find()
    expected = world.evaluated
    assert len(expected) >= 4
    for path in (world.job, world.measured):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    world.evaluated = []
    for stop in range(len(expected)):  # each evaluation is killed once, the next run repeats it
        world.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            world.find()
        assert world.evaluated == expected[:stop]
        assert (world.job_price() == expected[stop]) if stop else not world.job.exists()
    world.stop_at = -1
    found = world.find()
    assert found.facts == whole.facts and world.evaluated == expected


def test_tries_of_another_goal_are_not_taken_for_this_one(world: World) -> None:
    world.increase = lambda relative_mse: 0.005 + relative_mse
    first = world.find(0.1)
    remove_job(first.checked.job)
    seen = len(world.evaluated)
    second = world.find(0.3)
    assert math.log(second.facts["perplexity"] / second.facts["float_perplexity"]) > 2 * BUDGET
    assert second.facts["price"] > first.facts["price"]
    remove_job(second.checked.job)
    world.find(0.3, tokens=7)
    assert world.evaluated.count(None) == 3  # another text has another float loss
    assert len(world.evaluated) > seen
    world.evaluated = []
    assert world.find(0.1).facts == first.facts
    assert world.evaluated == []  # those of the first goal are still known


def test_a_budget_that_cannot_be_reached(world: World) -> None:
    world.increase = lambda relative_mse: 0.2 + relative_mse
    with pytest.raises(MsQuantError) as error:
        world.find()
    least = 100 * math.expm1(0.2 + predict(CURVES, 0.0).relative_mse)
    assert str(error.value) == (
        f"max ppl increase 10 % cannot be reached: the least that was found is {least:.3g} %, of "
        "which quantized activations are a part"
    )
    assert len(world.evaluated) == len(set(world.evaluated)) <= 1 + MOST_TRIES
    assert not world.job.exists()  # another goal may be tried
    before = list(world.evaluated)
    with pytest.raises(MsQuantError, match=r"max ppl increase 10 % cannot be reached"):
        world.find()
    assert world.evaluated == before
    assert world.find(0.5).facts["perplexity"] <= 1.5 * math.exp(FLOAT_LOSS)


def test_a_model_that_nothing_harms_ends_at_the_highest_price(world: World) -> None:
    world.increase = lambda relative_mse: 0.0
    found = world.find()
    assert predict(CURVES, found.facts["price"]) == predict(CURVES, 1e9)
    assert len(world.evaluated) <= 4
    assert world.job_price() == found.facts["price"]


def test_the_job_of_someone_else_is_refused(world: World) -> None:
    with JobDirectory(world.job, {"seed": 1, "price": 0.5}).open():
        pass
    match = r"out\.job: it was begun with price = 0\.5, now price is 0\.\d+; finish it"
    with pytest.raises(MsQuantError, match=match):
        world.find()
    assert world.job_price() == 0.5
    with JobDirectory(world.measured, {"seed": 1, "phase": "measure"}).open():
        (world.measured / "block-00000.safetensors").unlink()
    (world.measured / "job.json").write_text('{"seed": 2, "phase": "measure"}')
    with pytest.raises(MsQuantError, match=r"out\.job\.measure: it was begun with seed = 2, now"):
        world.find()


def test_measuring_has_a_directory_and_a_record_of_its_own(world: World) -> None:
    job = measuring_job(world.checked)
    assert job.directory == world.measured == measuring_directory(world.job)
    assert job.record == {"seed": 1, "phase": "measure"}
    assert at_price(world.checked, 0.25).job().record == {"seed": 1, "price": 0.25}
    assert world.checked.record == {"seed": 1}


def test_what_measuring_left_is_removed(world: World) -> None:
    with measuring_job(world.checked).open():
        for name in ("block-00000.safetensors", "tries.json", ".tries.json.77.tmp"):
            (world.measured / name).write_text("{}")
    remove_measured(world.checked)
    assert not world.measured.exists()
    remove_measured(world.checked)  # nothing is there
    assert not world.measured.exists()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "x"},
        {"job.json": '{"seed": 2, "phase": "measure"}', "tries.json": "{}"},
        {"job.json": '{"seed": 1, "phase": "measure", "price": 1.0}', "tries.json": "{}"},
        {"job.json": "not JSON", "block-00000.safetensors": "x"},
    ],
)
def test_foreign_directories_are_left_alone(world: World, files: dict[str, str]) -> None:
    world.measured.mkdir()
    for name, text in files.items():
        (world.measured / name).write_text(text)
    before = snapshot(world.measured)
    remove_measured(world.checked)
    assert snapshot(world.measured) == before


def test_files_of_someone_else_in_it_stay(world: World) -> None:
    with measuring_job(world.checked).open():
        (world.measured / "tries.json").write_text("{}")
        (world.measured / "thesis.txt").write_text("x")
    remove_measured(world.checked)
    assert snapshot(world.measured) == {"thesis.txt": b"x"}


def test_a_job_in_use_is_left_alone(world: World) -> None:
    job = measuring_job(world.checked)
    with job.open():
        remove_measured(world.checked)
        assert (world.measured / "job.json").exists()


def test_nothing_is_made_where_nothing_is(world: World) -> None:
    remove_job(at_price(world.checked, 0.5).job)
    assert not world.job.exists()
    world.job.write_text("a file")
    remove_job(at_price(world.checked, 0.5).job)
    assert world.job.read_text() == "a file"


@pytest.mark.parametrize(
    "text",
    [
        '{"KEY": 3}',
        '{"KEY": {}}',
        '{"KEY": {"losses": 2.0}}',
        '{"KEY": {"losses": ["2.0"]}}',
        '{"KEY": {"losses": [], "float": null}}',
        '{"KEY": {"losses": [1e999]}}',
    ],
)
def test_a_malformed_file_of_tries_is_named(tmp_path: Path, text: str) -> None:
    goal, path = Goal(None, 0.01, np.zeros((1, 4), np.int32)), tmp_path / "tries.json"
    key = json.dumps(json.dumps(goal.record(), sort_keys=True))
    path.write_text(text.replace('"KEY"', key))
    with suppress(ValueError):
        write_sealed(path, json.loads(path.read_text()))
    with pytest.raises(MsQuantError, match=r"tries\.json"):
        read_tries(path, goal)
    write_sealed(path, {json.loads(key): {"losses": [2.5], "float": 2.0}})
    assert read_tries(path, goal)[1] == {"losses": [2.5], "float": 2.0}
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(MsQuantError, match=r"tries\.json: is malformed or has changed; delete"):
        read_tries(path, goal)


@pytest.mark.parametrize(
    "change",
    [
        {"errors": [0.1]},
        {"ratios": None},
        {"sensitivity": float("nan")},
        {"sensitivity": 0},
        {"weights": "many"},
        {"errors": [-2.0] * len(PRICES)},
    ],
)
def test_a_note_that_holds_no_curve_is_refused(change: dict) -> None:
    good = {"weights": 8, "sensitivity": 0.5, "errors": [0.1] * len(PRICES)}
    good["ratios"] = [0.5] * len(PRICES)
    assert Curve.from_json(good).weights == 8
    with pytest.raises((TypeError, ValueError)):
        Curve.from_json({**good, **change})
