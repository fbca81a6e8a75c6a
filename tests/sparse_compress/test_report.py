"""The HTML page: what it says, that it stands alone, that names stay names."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sparse_compress.cli import app
from sparse_compress.pipeline import report
from sparse_compress.pipeline.info import info
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc

HOSTILE = '</script><img src=x onerror="alert(1)"><b>&amp;'


def row(layer: str = "model.layers.0.mlp.down_proj", **changes: Any) -> dict[str, Any]:
    sizes = {"raw_bytes": 1000, "stored_bytes": 600, "ratio": 0.6, "entropy_bytes": 450}
    place = {"layer": layer, "rank": 0, "shape": [10, 100], "sparsity": 0.25}
    return {**place, **sizes, "tiles": 7, "bypass_tiles": 2, **changes}


def result(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"output": "OUT", "format": "W8A8SC TP2", "rows": list(rows), **changes}


def counts(**at: int) -> np.ndarray:
    found = np.zeros(256, np.int64)
    for value, count in at.items():
        found[int(value[1:]) if value[0] == "p" else 256 - int(value[1:])] = count
    return found


def cells(page: str, name: str = "") -> list[list[str]]:
    """The rows of a table, or of all."""
    found = re.search(rf'<table id="{name}".*?</table>', page, re.S) if name else None
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found[0] if found else page)
    plain = [
        [re.sub(r"<wbr>", "", c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", r)] for r in rows
    ]
    return [[html.unescape(cell) for cell in row] for row in plain]


def test_the_table_and_its_totals() -> None:
    second = row("b", rank=1, raw_bytes=3000, stored_bytes=2400, ratio=0.8, sparsity=0.75)
    page = report.page(result(row(), second), [counts(p0=1), counts(p0=1)])
    table = cells(page, "layers")
    assert table[0] == list(report.COLUMNS)
    assert table[2] == [
        *("model.layers.0.mlp.down_proj", "0", "10x100", "25.0 %"),
        *("1,000", "600", "0.600", "450 (0.450)", "2/7"),
    ]
    assert [
        *("total", "", "", "62.5 %", "4,000", "3,000", "0.750"),
        *("900 (0.225)", "4/14"),
    ] in cells(page)
    assert (
        "2 compressed linears take 75.0 % of their int8 bytes; the entropy bound is 22.5 %" in page
    )


def test_the_charts_show_what_the_table_says() -> None:
    page = report.page(result(row(), row(rank=1, stored_bytes=700)), [counts(p0=1)] * 2)
    said = re.findall(r'data-t="(mlp.down_proj, .*?)"', page)
    assert said == [
        *("mlp.down_proj, raw: 2,000 bytes", "mlp.down_proj, stored: 1,300 bytes"),
        "mlp.down_proj, entropy bound: 900 bytes",
    ]
    assert "stored, block 0: 65 %" in page and "entropy bound, block 0: 45 %" in page


def test_the_histograms_are_over_the_values_that_occur() -> None:
    page = report.page(result(row(), row(rank=1)), [counts(m3=1, p0=9), counts(p2=10)])
    (data,) = re.findall(r'id="codes-data">(.*?)</script>', page)
    first, second = (one["parts"][0] for one in json.loads(data))
    assert (first["start"], first["step"], first["counts"]) == (-3, 1, [1, 0, 0, 9])
    assert (second["start"], second["counts"]) == (2, [10])


def test_names_are_not_html() -> None:
    hostile = result(row(HOSTILE), output=HOSTILE, pruning=HOSTILE, uncompressed={HOSTILE: HOSTILE})
    page = report.page(hostile, [counts(p0=1)])
    assert "<img" not in page and "<b>&amp;" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert cells(page, "layers")[1][0] == HOSTILE


def test_the_page_stands_alone_and_is_the_same_every_time() -> None:
    first, second = (report.page(result(row()), [counts(p0=1)]) for _ in range(2))
    assert first == second
    assert not re.findall(r'(?:src|href)\s*=\s*["\']', first)
    assert not re.findall(r"<link|@import|url\(", first)


def test_a_checkpoint_without_compressed_layers_has_a_page() -> None:
    page = report.page(result(uncompressed={"a": "too small"}), [])
    assert ["a", "too small"] in cells(page) and "No linear is compressed" in page


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (counts(p0=800), 0),
        (counts(p0=400, p1=400), 100),
        (np.full(256, 10), 2560),
        (counts(p0=700, p1=100), 55),  # 800 H(1/8) = 434.9 bits
    ],
)
def test_the_entropy_bound(data: np.ndarray, expected: int) -> None:
    assert report.entropy_bytes(data) == expected


def test_the_command(make: Callable[..., Any], tmp_path: Path) -> None:
    made, page = make(tp=2), tmp_path / "page.html"
    command = ["info", str(made.output), "--plot", str(page), "--json"]
    run = CliRunner().invoke(app, command, catch_exceptions=False)
    found = json.loads(run.stdout)
    assert found.pop("plot") == str(page)
    assert found == info(made.output)
    table = cells(page.read_text(), "layers")
    assert sorted(line[0] for line in table[1:]) == sorted(row["layer"] for row in found["rows"])
    (total,) = (line for line in cells(page.read_text()) if line[0] == "total")
    assert total[4:6] == [f"{found['raw_bytes']:,}", f"{found['stored_bytes']:,}"]
    assert "W8A8SC TP2" in page.read_text() and "Error of each group" in page.read_text()
    assert not list(tmp_path.glob(".*"))  # what it was written to at first


def test_measures_against_the_weights(make: Callable[..., Any]) -> None:
    made = make(tp=2)
    model = open_w8a8sc(made.output)
    assert isinstance(model, SparseModel)
    first = info(made.output)["rows"][0]
    _, group, fused = next(iter(model.layout.linears()))
    weight = model.decode(0, fused, group)
    share = np.unique(weight, return_counts=True)[1] / weight.size
    assert first["sparsity"] == 1 - np.count_nonzero(weight) / weight.size
    bits = -(share * np.log2(share)).sum() * weight.size
    assert first["entropy_bytes"] == pytest.approx(bits / 8, abs=1)
    assert first["entropy_bytes"] < first["stored_bytes"] < first["raw_bytes"]
