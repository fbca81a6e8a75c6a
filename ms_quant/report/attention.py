"""What became of the attention of a network, and what each of its heads costs or keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ms_quant.report.charts import heat
from ms_quant.report.parts import Cell, paragraph, section, table
from ms_quant.report.recorded import entry, number

MOST_ROWS, MOST_LAYERS, MOST_HEADS = 2000, 200, 128
MAPS = {
    "errors": "Relative error of the output by layer and head, in the mean over calls",
    "densities": "Share of the pairs of tokens that are computed, by layer and head",
}
HOW = (
    "A head keeps pairs that are near each other in a frame (spatial), at one place over time "
    "(temporal), or both (textural); dense heads keep all."
)


def is_heat_map(value: Any) -> bool:
    """Whether it is what a ``heat_map()`` gives."""
    return isinstance(entry(value).get("layers"), list) and any(
        isinstance(entry(value).get(key), list) for key in (*MAPS, "kinds")
    )


def attention_section(
    attention: Sequence[Mapping[str, Any]], maps: Sequence[Mapping[str, Any]], cache: str
) -> Markup:
    """How keys and values are cached, and what became of the attention of a network."""
    parts = [paragraph(f"Keys and values are cached as `{cache}`.")] if cache else []
    if attention:
        rows = [
            [
                Cell(str(row.get("path", ""))),
                Cell(str(row.get("attention", ""))),
                Cell(str(row.get("reason", ""))),
                Cell(", ".join(f"{count} {how}" for how, count in entry(row, "calls").items())),
            ]
            for row in attention[:MOST_ROWS]
        ]
        heads = ("attention", "computed by", "why float", "calls")
        parts.append(table(heads, rows, name="attention", text_columns=4))
    for one in maps:
        parts += _maps(one)
    return section("Attention", *parts)


def _maps(found: Mapping[str, Any]) -> list[Markup]:
    layers = [str(layer) for layer in found["layers"]][:MOST_LAYERS]
    mode = found.get("mode")
    parts = [Markup("<h3>{}</h3>").format(mode)] if isinstance(mode, str) and mode else []
    for key, title in MAPS.items():
        rows = [[number(value) for value in row] for row in _rows(found, key)]
        if any(value is not None for row in rows for value in row):
            parts.append(_map(title, layers, rows))
    kinds = [[str(kind) for kind in row] for row in _rows(found, "kinds")]
    if any(kind for row in kinds for kind in row):
        cells = [
            [Cell(layer), *(Cell(", ".join(_ranges(row, kind))) for kind in _names(kinds))]
            for layer, row in zip(layers, kinds, strict=False)
        ]
        parts.append(paragraph(HOW))
        heads = ("layer", *(f"{kind} heads" for kind in _names(kinds)))
        parts.append(table(heads, cells, text_columns=len(heads)))
    return parts


def _rows(found: Mapping[str, Any], key: str) -> list[list[Any]]:
    rows = found.get(key)
    listed = rows[:MOST_LAYERS] if isinstance(rows, list) else []
    return [row[:MOST_HEADS] if isinstance(row, list) else [] for row in listed]


def _map(title: str, layers: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Markup:
    count = max(map(len, rows))
    columns = [f"head {head}" for head in range(count)]
    full = [[*row, *[None] * (count - len(row))] for row in rows]
    return heat(title, columns, list(zip(layers, full, strict=False)), relative=True)


def _names(kinds: Sequence[Sequence[str]]) -> list[str]:
    return sorted({kind for row in kinds for kind in row if kind})


def _ranges(row: Sequence[str], kind: str) -> list[str]:
    """Heads of a kind, those next to each other as one: "0-3", "7"."""
    found: list[str] = []
    for head, _ in enumerate(row):
        if row[head] == kind and (head == 0 or row[head - 1] != kind):
            last = head
            while last + 1 < len(row) and row[last + 1] == kind:
                last += 1
            found.append(f"{head}-{last}" if last > head else str(head))
    return found
