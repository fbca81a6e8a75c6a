"""docs/recipes.md says what is read and what is refused, as the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ms_quant.recipe import (
    LANGUAGES,
    REFUSED_LANGUAGES,
    modelslim,
    modelslim_v0,
    modelslim_v0_anti,
    modelslim_v0_calib,
)
from ms_quant.recipe.modelslim_linear import PAIRS, WEIGHT_METHODS
from ms_quant.recipe.modelslim_processors import PROCESSORS, REFUSED

METHODS = {"none", "histogram", "dualscale"}.union(*WEIGHT_METHODS.values())
TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first cell is ``head``."""
    lines = TEXT.split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def named(text: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", text)


def test_processors_and_their_keys() -> None:
    found = {named(cells[0])[0]: set(named(cells[1])) for cells in rows("processor")}
    assert found == {name: set(keys) for name, (keys, _) in PROCESSORS.items()}


def test_pairs_of_quantizers() -> None:
    found = [cells[1] for cells in rows("`linear_quant`: activation, weight")]
    assert set(found) == set(PAIRS.values())


def test_refused_processors() -> None:
    found = {named(cells[0])[0]: cells[1].rstrip(" |") for cells in rows("refused processor")}
    assert found == REFUSED


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ("key of `spec`", [*modelslim.SPEC, *modelslim.UNREAD]),
        ("key of `spec`, v0", modelslim_v0.SPEC),
        ("key of `calib_cfg`", modelslim_v0_calib.KEYS),
        ("`anti_method`", [*modelslim_v0_anti.METHODS, *modelslim_v0_anti.REFUSED]),
        ("method", list(METHODS)),
    ],
)
def test_keys(head: str, keys: list[str]) -> None:
    found = [name for cells in rows(head) for name in named(cells[0])]
    assert sorted(found) == sorted(keys)


def test_what_else_is_named() -> None:
    def row(head: str, key: str) -> str:
        return next(" ".join(cells) for cells in rows(head) if key in named(cells[0]))

    assert set(modelslim.RUNNERS) <= set(named(row("key of `spec`", "runner")))
    assert set(modelslim.FORMATS) <= set(named(row("key of `spec`", "save")))
    assert modelslim.DATASET in named(row("key of `spec`", "dataset"))
    assert modelslim_v0.DATASET in named(row("key of `spec`, v0", "calib_dataset"))
    for key in (*modelslim_v0_anti.KEYS, "disable_anti_names"):
        assert re.search(rf"`{key}\b", row("key of `spec`, v0", "anti_cfg")), key
    for key in modelslim_v0.CALIB_PARAMS:
        assert re.search(rf"`{key}\b", row("key of `spec`, v0", "calib_params")), key
    for key in modelslim_v0.SAVE_PARAMS:
        assert re.search(rf"`{key}\b", row("key of `spec`, v0", "calib_save_params")), key
    for kind in modelslim_v0_calib.EIGHT_BITS:
        assert f"`{kind}`" in row("key of `spec`, v0", "calib_params")
    for language in (*LANGUAGES, *REFUSED_LANGUAGES):
        assert re.search(rf"[`: ]{language}`", TEXT), language


def test_the_counts_add_up() -> None:
    counts = [int(cells[-1].rstrip(" |")) for cells in rows("what happens")]
    assert sum(counts) == 89
    head = re.search(r"Of the 89 recipes .* (\d+) are understood, and (\d+) of the", TEXT)
    assert head and int(head[2]) == counts[0] and int(head[1]) == sum(counts[:4])
    parts = re.search(r"run: (.*)", TEXT)
    assert parts and sum(map(int, re.findall(r" (\d+)(?=,| \|)", parts[1]))) == 2 * counts[0]
