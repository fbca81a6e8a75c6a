"""docs/choose.md repeats measurements of docs/accuracy.md and names formats that hold a scheme."""

from __future__ import annotations

from pathlib import Path

from ms_quant.algorithms import ALGORITHMS
from ms_quant.formats.registry import FORMATS
from ms_quant.schemes.table import SCHEMES

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    text = (DOCS / page).read_text()
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_are_measured() -> None:
    measured = {tuple(row[:6]) for row in rows("accuracy.md", "scheme | options")}
    shown = [(row[1], "", *row[2:]) for row in rows("choose.md", "you want")]  # no options
    assert len(shown) > 8
    assert not [row for row in shown if row not in measured]


def test_servers_take_the_schemes_that_are_named() -> None:
    for _, format, schemes in rows("choose.md", "server"):
        for name in schemes.replace(",", "").split():
            if name in SCHEMES and format in FORMATS:
                networks = name == "W8A8_TIMESTEP"
                assert networks or format in {held.format for held in SCHEMES[name].held}, name


def test_algorithms_exist() -> None:
    for _, algorithms, _ in rows("choose.md", "you see"):
        for name in algorithms.split("`")[1::2]:
            assert set(name.split("+")) <= set(ALGORITHMS), name
