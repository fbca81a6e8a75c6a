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

from ms_quant.errors import MsQuantError
from sparse_compress.cli import app
from sparse_compress.pipeline import report
from sparse_compress.pipeline.info import entropy_bytes, info
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


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(c) for c in re.findall(r"<t[dh]>(.*?)</t[dh]>", r)] for r in rows]


def without_plotly(page: str) -> str:
    """The page but for plotly.js itself, which is the first script."""
    start, end = page.index("<script>"), page.index("</script>")
    assert end - start > 1 << 20
    return page[:start] + page[end:]


def test_the_table_and_its_totals() -> None:
    second = row("b", rank=1, raw_bytes=3000, stored_bytes=2400, ratio=0.8, sparsity=0.75)
    page = report.page(result(row(), second), [counts(p0=1), counts(p0=1)])
    table = cells(page)
    assert table[0] == list(report._COLUMNS)
    assert table[1] == [
        *("model.layers.0.mlp.down_proj", "0", "10x100", "25.0 %"),
        *("1,000", "600", "0.600", "450 (0.450)", "2/7"),
    ]
    assert table[3] == [
        *("total", "", "", "62.5 %", "4,000", "3,000", "0.750"),
        *("900 (0.225)", "4/14"),
    ]


def test_the_charts_show_what_the_table_says() -> None:
    rows = [row(), row(rank=1, stored_bytes=700)]
    bars = json.loads(report.size_chart(rows).to_json())["data"]
    assert [bar["name"] for bar in bars] == ["raw", "stored", "entropy bound"]
    assert [bar["x"] for bar in bars] == [[1000, 1000], [600, 700], [450, 450]]
    assert bars[0]["y"] == ["0.mlp.down_proj, rank 0", "0.mlp.down_proj, rank 1"]


def test_the_histograms_are_over_the_values_that_occur() -> None:
    figure = report.value_chart([row(), row()], [counts(m3=1, p0=9), counts(p2=10)])
    heat = json.loads(figure.to_json())["data"][0]
    assert heat["x"] == [-3, -2, -1, 0, 1, 2]
    assert heat["customdata"] == [[0.1, 0, 0, 0.9, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert heat["z"][0] == [-1, None, None, pytest.approx(np.log10(0.9)), None, None]


def test_names_are_not_html() -> None:
    hostile = result(row(HOSTILE), output=HOSTILE, pruning=HOSTILE, uncompressed={HOSTILE: HOSTILE})
    page = without_plotly(report.page(hostile, [counts(p0=1)]))
    assert "<img" not in page
    assert "<b>" not in page
    assert page.count("<script") == page.count("</script>") - 1  # the one that was cut off
    assert cells(page)[1][0] == HOSTILE
    names = json.loads(report.size_chart([row(HOSTILE)]).to_json())["data"][0]["y"]
    assert html.unescape(names[0]) == f"{HOSTILE}, rank 0" != names[0]


def test_the_page_stands_alone_and_is_the_same_every_time() -> None:
    first, second = (report.page(result(row()), [counts(p0=1)]) for _ in range(2))
    assert first == second
    assert not re.findall(r'(?:src|href)\s*=\s*["\']', without_plotly(first))
    assert not re.findall(r"<link|@import|url\(", without_plotly(first))


def test_a_checkpoint_without_compressed_layers_has_a_page() -> None:
    page = report.page(result(uncompressed={"a": "too small"}), [])
    assert "<li>a: too small</li>" in page
    assert cells(page)[1][0] == "total"


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
    assert entropy_bytes(data) == expected


def test_refusals_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "out"
    checkpoint.mkdir()
    for path, message in (
        (checkpoint, "expected a file name in a directory there is"),
        (tmp_path / "none" / "page.html", "expected a file name in a directory there is"),
        (checkpoint / "page.html", "lies in the checkpoint"),
    ):
        with pytest.raises(MsQuantError, match=message):
            report.check_page(path, checkpoint)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MsQuantError, match=r"missing: pip install 'ms-quant\[report\]'"):
        report.check_page(tmp_path / "page.html", checkpoint)


def test_the_command(make: Callable[..., Any], tmp_path: Path) -> None:
    made, page = make(tp=2), tmp_path / "page.html"
    command = ["info", str(made.output), "--plot", str(page), "--json"]
    run = CliRunner().invoke(app, command, catch_exceptions=False)
    found = json.loads(run.stdout)
    assert found.pop("plot") == str(page)
    assert found == info(made.output)
    table = cells(page.read_text())
    assert [line[0] for line in table[1:-1]] == [line["layer"] for line in found["rows"]]
    assert table[-1][4] == f"{found['raw_bytes']:,}"
    assert table[-1][5] == f"{found['stored_bytes']:,}"
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
