"""An HTML page about a compressed checkpoint: one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_quant.errors import BadArgumentError
from ms_quant.files.atomic import write_bytes
from ms_quant.models.names import short_name

Row = dict[str, Any]
Histograms = Sequence[NDArray[np.int64]]

_ROW_PIXELS = 26
_BARS = (
    ("raw", "raw_bytes", "#b8c0cc"),
    ("stored", "stored_bytes", "#2a6fbb"),
    ("entropy bound", "entropy_bytes", "#e08a3c"),
)
_COLUMNS = (
    *("layer", "rank", "shape", "zeros", "raw bytes", "stored bytes", "ratio"),
    *("entropy bound", "bypassed tiles"),
)
_MEASURES = (
    ("raw", "the int8 weight, a byte a value, without padding."),
    ("stored", "the UNZIP tiles of the weight and their index, as the files hold them."),
    ("ratio", "stored / raw."),
    (
        "entropy bound",
        "the fewest bytes in which a code could hold the weight if it knew how often each value "
        "occurs and nothing else (order-0 entropy); in brackets, as a share of raw. UNZIP stays "
        "above it: its codes are 3, 6, 9 or 12 bits long and do not cross 64-bit words.",
    ),
    ("zeros", "the share of values that are 0: pruned, or rounded to 0."),
    (
        "bypassed tiles",
        "tiles (128 rows by 256 columns) that coding would not make smaller; they are stored raw.",
    ),
)
_VALUES = (
    "How often each int8 value occurs in each layer. The colour is logarithmic; "
    "a value without one does not occur."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1200px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e7ec; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #9aa4b2; }
tfoot td { font-weight: 600; border-top: 2px solid #9aa4b2; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.5rem; }
"""


def check_page(path: Path, checkpoint: Path) -> None:
    """Refuses what would fail after the work, or spoil the checkpoint.

    Args:
        path: the HTML file to make.
        checkpoint: the directory that it will be about.

    Raises:
        MsQuantError: plotly is not installed, there is no directory for the file, or the file
            would lie in the checkpoint, whose files are all accounted for.
    """
    if find_spec("plotly") is None:
        raise BadArgumentError(
            "--plot needs plotly, which is missing: pip install 'ms-quant[report]'"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadArgumentError(
            f"{path}: cannot be made, expected a file name in a directory there is"
        )
    if path.resolve().is_relative_to(checkpoint.resolve()):
        raise BadArgumentError(
            f"{path}: lies in the checkpoint {checkpoint}, where verify would refuse it; "
            "expected a file elsewhere"
        )


def write_page(path: Path, result: dict[str, Any], histograms: Histograms) -> None:
    """Writes the page.

    Args:
        path: the HTML file; it appears when it is complete.
        result: what :func:`sparse_compress.pipeline.info.info` returns.
        histograms: 256 counts for each row of it, by byte value: -1 counts at 255.

    Raises:
        MsQuantError: the file cannot be written.
    """
    write_bytes(path, page(result, histograms).encode())


def page(result: dict[str, Any], histograms: Histograms) -> str:
    """The page that :func:`write_page` writes."""
    from plotly.offline import get_plotlyjs

    rows = result["rows"]
    title = escape(f"UNZIP compression of {result['output']}")
    charts = ""
    if rows:
        charts = (
            f"<h2>Bytes of each layer</h2>\n{_figure(size_chart(rows), 'sizes')}\n"
            f"<h2>Values of each layer</h2>\n<p>{_VALUES}</p>\n"
            f"{_figure(value_chart(rows, histograms), 'values')}\n"
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{_facts(result)}\n<h2>Layers</h2>\n{_table(rows)}\n{_uncompressed(result)}"
        f"<h2>What the columns mean</h2>\n{_measures()}\n{charts}</body>\n</html>\n"
    )


def label(row: Row) -> str:
    """What a chart calls a row."""
    return f"{short_name(row['layer'])}, rank {row['rank']}"


def size_chart(rows: Sequence[Row]) -> Any:
    """Raw, stored and entropy bound of each layer: plotly bars."""
    from plotly import graph_objects

    names = [_plain(label(row)) for row in rows]
    bars = [
        graph_objects.Bar(
            y=names, x=[row[key] for row in rows], name=name, marker_color=color, orientation="h"
        )
        for name, key, color in _BARS
    ]
    figure = graph_objects.Figure(bars)
    figure.update_layout(barmode="group", xaxis_title="bytes", legend_traceorder="normal")
    return _laid_out(figure, 2 * len(rows))


def value_chart(rows: Sequence[Row], histograms: Histograms) -> Any:
    """The share of each int8 value in each layer: a plotly heat map with a logarithmic scale."""
    from plotly import graph_objects

    counts = np.roll(np.stack(list(histograms)), 128, axis=1)
    used = np.flatnonzero(counts.any(axis=0))
    counts = counts[:, used[0] : used[-1] + 1]
    share = counts / counts.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.log10(share)
    ticks = [0, -1, -2, -3, -4, -5, -6]
    heat = graph_objects.Heatmap(
        x=list(range(int(used[0]) - 128, int(used[-1]) - 127)),
        y=[_plain(label(row)) for row in rows],
        # A value that does not occur has no colour.
        z=np.where(counts > 0, scale, np.nan).tolist(),
        customdata=share.tolist(),
        hovertemplate="%{y}<br>value %{x}: %{customdata:.4%}<extra></extra>",
        colorscale="Viridis",
        colorbar={
            "title": "share",
            "tickvals": ticks,
            "ticktext": [f"{100 * 10.0**t:g} %" for t in ticks],
        },
    )
    figure = graph_objects.Figure(heat)
    figure.update_layout(xaxis_title="int8 value")
    return _laid_out(figure, len(rows))


def _laid_out(figure: Any, lines: int) -> Any:
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(
        height=160 + _ROW_PIXELS * lines, margin={"t": 30, "r": 20}, template="plotly_white"
    )
    return figure


def _figure(figure: Any, name: str) -> str:
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False}
    )


def _plain(text: str) -> str:
    """Plotly takes text for HTML, too."""
    return escape(text, quote=False)


def _facts(result: dict[str, Any]) -> str:
    asked = [
        f"{key} {result[key]}"
        for key in ("sparsity", "pruning", "algorithm")
        if result.get(key) is not None
    ]
    return f"<p>{escape(', '.join([str(result['format']), *asked]))}.</p>"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    body = "\n".join(
        _cells(row, row["layer"], str(row["rank"]), "x".join(map(str, row["shape"])))
        for row in rows
    )
    return (
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        f"<tfoot>{_cells(totals(rows), 'total', '', '')}</tfoot>\n</table>"
    )


def totals(rows: Sequence[Row]) -> Row:
    """The measures of all rows together."""
    keys = ("raw_bytes", "stored_bytes", "entropy_bytes", "tiles", "bypass_tiles")
    total: Row = {key: sum(row[key] for row in rows) for key in keys}
    raw = total["raw_bytes"] or 1
    zeros = sum(row["sparsity"] * row["raw_bytes"] for row in rows)
    return {**total, "ratio": total["stored_bytes"] / raw, "sparsity": zeros / raw}


def _cells(row: Row, *names: str) -> str:
    share = row["entropy_bytes"] / (row["raw_bytes"] or 1)
    values = (
        f"{100 * row['sparsity']:.1f} %",
        f"{row['raw_bytes']:,}",
        f"{row['stored_bytes']:,}",
        f"{row['ratio']:.3f}",
        f"{row['entropy_bytes']:,} ({share:.3f})",
        f"{row['bypass_tiles']}/{row['tiles']}",
    )
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (*names, *values)) + "</tr>"


def _uncompressed(result: dict[str, Any]) -> str:
    items = "".join(
        f"<li>{escape(str(name))}: {escape(str(reason))}</li>"
        for name, reason in result.get("uncompressed", {}).items()
    )
    return f"<h2>Left uncompressed</h2>\n<ul>{items}</ul>\n" if items else ""


def _measures() -> str:
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in _MEASURES)
    return f"<dl>{items}</dl>"
