"""What a page says, that it stands alone, and that names stay names."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import HOSTILE, hostile_facts, large_facts

from ms_quant.errors import MsQuantError
from ms_quant.report.charts import Line, bars, heat, lines
from ms_quant.report.page import check_page
from ms_quant.report.report import report_page
from ms_quant.report.results import Results, read_results
from ms_quant.report.strange import LONGEST, readable
from ms_quant.report.weights import code_counts, spread_counts


def words(page: str) -> str:
    return html.unescape(
        re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", "", page, flags=re.S)
    )


def test_the_page_of_a_large_model_is_bounded_and_says_what_is_wrong_first() -> None:
    page = report_page(large_facts(), Results())
    assert len(page) < 1_500_000
    said = words(page)
    assert "1 of 576 measured groups are off by more than 10 %: model.layers.5.down (31 %)" in said
    assert "--exclude model.layers.5.down_proj" in said
    assert "Perplexity is not measured: run ms-quant eval Large-W8A8" in said
    assert said.index("1 of 576") < said.index("The tensors take 10.0 GiB, 53 %")
    assert report_page(large_facts(), Results()) == page  # the same every time


def test_names_are_neither_elements_nor_scripts() -> None:
    facts, weights, found = hostile_facts()
    results = Results()
    assert results.add(found)
    page = report_page(facts, results, weights)
    assert not re.search(r"<(img|iframe|object|link|base)\b", page)
    assert page.count("<script") == page.count("</script>") == 2  # our own, and the histograms
    assert page.count("</style>") == page.count("</title>") == 1
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)
    assert json.loads(data)[0]["parts"][0]["counts"]
    assert HOSTILE[0] in words(page)
    assert "'unsafe-inline'; script-src 'sha256-" in page and "default-src 'none'" in page


def test_commands_in_sentences_quote_what_a_shell_would_run() -> None:
    facts, weights, _ = hostile_facts()
    said = words(report_page(facts, Results(), weights))
    assert """--exclude '"><img src=x onerror="document.title='"'"'owned'"'"'">'""" in said


def test_strange_text_is_made_readable() -> None:
    assert readable("a\u202eb\x00c\x1b[31m") == "a\ufffdb\ufffdc\ufffd[31m"
    assert readable("\udcff") == "\ufffd"
    assert len(readable("x" * 10_000)) < LONGEST


def test_charts_show_their_values() -> None:
    drawn = bars("Bytes", [("whole", [2048]), ("part", [1024])], ["stored"])
    assert re.findall(r"width:([\d.]+)%", drawn) == ["50", "25"] and "2.0 KiB" in drawn
    drawn = lines("Title", [Line("one", {0: 1.0, 4: 100.0})], "block", "magnitude")
    assert 'points="0,100 100,0"' in drawn and "one, block 4: 100" in drawn
    assert lines("Title", [Line("one", {})], "block", "magnitude") == ""
    drawn = lines("Title", [Line("one", {0: 0.5})], "block", "share", linear=True, percent=True)
    assert "50 %" in drawn
    drawn = heat("Title", ["a", "b"], [("block 0", [1.0, None])])
    assert "--v:1" in drawn and "<td></td>" in drawn


def test_every_value_is_counted_once() -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    found = code_counts("codes", codes)
    assert (found.start, found.step, list(found.counts)) == (-128, 4, [4] * 64)
    found = code_counts("codes", np.array([[-7, 7, 0, 0]], np.int8))
    assert sum(found.counts) == 4 and found.counts[7] == 2
    values = np.linspace(-3, 2, 1000, dtype=np.float32)
    spread = spread_counts("floats", "value", values)
    assert sum(spread.counts) == 1000 and spread.start == -3


def test_where_no_page_can_be_made(tmp_path: Path) -> None:
    checkpoint = tmp_path / "out"
    checkpoint.mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 99)
    for path, message in (
        (checkpoint, "is a directory, expected the name of an HTML file"),
        (tmp_path / "none" / "page.html", "expected a file name in a directory there is"),
        (checkpoint / "page.html", "lies in the checkpoint"),
        (tmp_path / "model.safetensors", "exists and is no HTML page"),
    ):
        with pytest.raises(MsQuantError, match=message):
            check_page(path, checkpoint)
    (tmp_path / "page.html").write_text(report_page(large_facts(2), Results()))
    check_page(tmp_path / "page.html", checkpoint)


def test_results_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(MsQuantError, match="no such file, expected what ms-quant eval --json"):
        read_results([path])
    for text, message in (
        ("{}", "has neither a perplexity"),
        ('{"perplexity": "x"}', "has neither a perplexity"),
        ("[1]", "r.json"),
        ("no", "r.json"),
    ):
        path.write_text(text)
        with pytest.raises(MsQuantError, match=message) as caught:
            read_results([path])
        assert "\n" not in str(caught.value)


def test_heat_maps_of_heads(tmp_path: Path) -> None:
    path, found = (
        tmp_path / "map.json",
        {
            "mode": "rf_v1",
            "layers": ["blocks.0.<attn>", "blocks.1.attn"],
            "errors": [[0.25, 0.125, 0.0625], [0.5]],
            "densities": [[0.5, 0.5, None], "no"],
            "kinds": [["spatial", "spatial", "temporal"], []],
        },
    )
    for given in (found, {"heat_map": found, "attention": [{"path": "blocks.0.<attn>"}]}):
        path.write_text(json.dumps(given))
        results = read_results([path])
        page = report_page(large_facts(2), results)
        assert results.maps == [found] and "<attn>" not in page
        for text in ("25 %", "12 %", "6.2 %", "50 %", "0-1</td>", "rf_v1"):
            assert text in page, text


@pytest.mark.parametrize("rows", [[[None]], [["x"]], [{}], 3, [[True]]])
def test_maps_without_numbers_draw_nothing(rows: Any) -> None:
    results = Results(maps=[{"layers": ["a"], "errors": rows}])
    assert "by layer and head" not in report_page(large_facts(2), results)
