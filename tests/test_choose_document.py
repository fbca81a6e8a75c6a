"""docs/choose.md repeats what docs/accuracy.md measured and docs/formats.md says of runtimes."""

from __future__ import annotations

from pathlib import Path

from ms_quant.algorithms import ALGORITHMS

DOCS = Path(__file__).parents[1] / "docs"
BUNDLED = "scheme | options | algorithms | bytes/weight | model | twin"
FORMATS = ("golden-stick", "ascend", "compressed-tensors", "mindie-sd")  # of the columns


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    text = (DOCS / page).read_text()
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_are_measured() -> None:
    measured = {tuple(row[:6]) for row in rows("accuracy.md", BUNDLED)}
    shown = [(row[1], "", *row[2:]) for row in rows("choose.md", "you want")]  # no options
    assert len(shown) > 8
    assert not [row for row in shown if row not in measured]


def test_servers_are_those_of_the_whole_table() -> None:
    served = {(row[0], row[1]): row[2] for row in rows("formats.md", "scheme | format")}
    for scheme, *cells in rows("choose.md", "scheme | vllm-mindspore"):
        for format, cell in zip(FORMATS, cells, strict=True):
            assert cell == _in_short(served.get((scheme, format), "")), (scheme, format)


def _in_short(served: str) -> str:
    if not served or served.startswith("no runtime"):
        return ""
    return "in part" if "only with" in served or "does not serve" in served else "yes"


def test_algorithms_exist() -> None:
    for _, algorithms, _ in rows("choose.md", "you see"):
        for name in algorithms.split("`")[1::2]:
            assert set(name.split("+")) <= set(ALGORITHMS), name
