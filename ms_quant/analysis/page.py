"""An HTML page about an analysis: one file that needs no network."""

from __future__ import annotations

import math
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ms_quant.analysis.records import Sensitivity, percent
from ms_quant.analysis.request import check_file
from ms_quant.analysis.summary import summary
from ms_quant.errors import BadArgumentError
from ms_quant.files.atomic import write_bytes

STYLE = "body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; }"
SMALLEST = 1e-4  # percent; colours are logarithmic
ROW_PIXELS = 18


def check_page(path: Path) -> None:
    """Refuses what would fail after the work.

    Raises:
        MsQuantError: plotly is not installed, or there is no directory for the file.
    """
    if find_spec("plotly") is None:
        raise BadArgumentError(
            "--plot needs plotly, which is missing: pip install 'ms-quant[report]'"
        )
    check_file(path)


def write_page(path: Path, found: Sensitivity, metric: str = "loss_increase") -> None:
    """Writes the page; it appears when it is whole.

    Args:
        path: the HTML file.
        found: the analysis.
        metric: what its tables are sorted by.

    Raises:
        MsQuantError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    title = escape(f"What hurts in {found.model}")
    charts = "".join(
        f"<h2>{escape(scheme)}</h2>\n{_figure(heat_map(found, scheme), f'scheme{k}')}\n"
        for k, scheme in enumerate(found.schemes)
    )
    lines = escape("\n".join(summary(found, metric)))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n"
        "<p>The estimated increase of perplexity when one group alone is quantized; the colours "
        f"are logarithmic.</p>\n{charts}<pre>{lines}</pre>\n</body>\n</html>\n"
    )
    write_bytes(path, page.encode())


def heat_map(found: Sensitivity, scheme: str) -> Any:
    """Blocks by groups: a plotly heat map of the estimated increase of perplexity."""
    from plotly import graph_objects

    groups = list(found.of(scheme))
    names = list(dict.fromkeys(group.name for group in groups))
    blocks = sorted({group.block for group in groups})
    cost = {(g.block, g.name): percent(g.score(scheme, "loss_increase")) for g in groups}
    values = [[cost.get((block, name)) for name in names] for block in blocks]
    heat = graph_objects.Heatmap(
        x=[escape(name) for name in names],
        y=[f"block {block}" for block in blocks],
        z=[[None if v is None else _log(v) for v in row] for row in values],
        customdata=values,
        hovertemplate="%{y}, %{x}: %{customdata:.3g} %<extra></extra>",
        colorscale="Viridis",
        colorbar={
            "title": "perplexity",
            "tickvals": list(range(-4, 4)),
            "ticktext": [f"+{10.0**k:g} %" for k in range(-4, 4)],
        },
    )
    figure = graph_objects.Figure(heat)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(
        height=180 + ROW_PIXELS * len(blocks), margin={"t": 20}, template="plotly_white"
    )
    return figure


def _log(value: float) -> float:
    return math.log10(max(value, SMALLEST))


def _figure(figure: Any, name: str) -> str:
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False}
    )
