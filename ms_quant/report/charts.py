"""Charts of HTML and SVG: their text keeps its size at any width and follows light and dark.

Values are shown under the pointer or a finger, by the attribute ``data-t`` of their marks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ms_quant.report.parts import joined
from ms_quant.report.strange import readable

COLORS = ("one", "two", "three")
MOST_POINTS = 256


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        values: y by x; None where there is none.
        color: one of ``COLORS``.
    """

    name: str
    values: Mapping[int, float]
    color: str = COLORS[0]


def bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> Markup:
    """Horizontal bars of bytes, some for each row.

    Args:
        title: what is shown, with its unit.
        rows: name and values.
        names: of the values of each row.
    """
    most = max((value for _, values in rows for value in values), default=0) or 1
    body = joined(
        Markup('<span class="name">{}</span><span>{}</span>').format(
            readable(name),
            Markup("").join(
                Markup(
                    '<span class="bar {}" data-t="{}"><i style="width:{}%"></i>{}</span>'
                ).format(color, f"{name}, {kind}: {value:,.0f} bytes", _short(50 * value / most),
                         size(value))
                for kind, value, color in zip(names, values, COLORS, strict=False)
            ),
        )
        for name, values in rows
    )  # fmt: skip
    colors = legend(names) if len(names) > 1 else ""
    return Markup(
        "<figure class=chart><figcaption>{}</figcaption>{}<div class=bars>{}</div></figure>"
    ).format(title, colors, body)


def legend(names: Sequence[str], colors: Sequence[str] = COLORS) -> Markup:
    """What the colours are."""
    return Markup("<div class=legend>{}</div>").format(
        Markup("").join(
            Markup('<span><i class="{}"></i>{}</span>').format(color, name)
            for name, color in zip(names, colors, strict=False)
        )
    )


def lines(
    title: str,
    found: Sequence[Line],
    x: str,
    y: str,
    *,
    percent: bool = False,
    linear: bool = False,
) -> Markup:
    """Values over blocks on a logarithmic axis; on one from 0 with ``linear``."""
    points = [v for line in found for v in line.values.values() if v > 0]
    if not points:
        return Markup("")
    axis = _Linear(max(points)) if linear else _Logarithmic(min(points), max(points))
    places = sorted({k for line in found for k in line.values})
    first, last = places[0], max(places[-1], places[0] + 1)

    def at(k: int) -> float:
        return 100 * (k - first) / (last - first)

    ticks, up = axis.ticks, axis.up
    grid = Markup("").join(
        Markup('<line class=grid x1=0 x2=100 y1="{0}" y2="{0}"></line>').format(_short(100 - up(t)))
        for t in ticks
    )
    marks, dots = Markup(""), Markup("")
    for line in found:
        kept = _thinned(line.values)
        path = " ".join(f"{_short(at(k))},{_short(100 - up(v))}" for k, v in kept)
        marks += Markup('<polyline class="{}" points="{}"></polyline>').format(line.color, path)
        dot = f"{line.color} small" if len(kept) > 80 else line.color
        dots += Markup("").join(
            Markup('<span class="dot {}" style="left:{}%;bottom:{}%" data-t="{}"></span>').format(
                dot,
                _short(at(k)),
                _short(up(v)),
                f"{line.name}, {x} {k}: {_value(v, percent)}",
            )
            for k, v in kept
        )
    labels = Markup("").join(
        Markup('<span class=tick style="bottom:{}%">{}</span>').format(
            _short(up(t)), _value(t, percent)
        )
        for t in ticks
    )
    area = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio=none>{}{}</svg>{}').format(
        grid, marks, dots
    )
    names = legend([line.name for line in found], [line.color for line in found])
    return _plot(title, names, y, area, labels, (str(first), "", str(places[-1])), x)


class _Logarithmic:
    """An axis of powers of ten around some values."""

    def __init__(self, least: float, most: float):
        self.low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
        self.high = max(high, self.low + 1)
        step = max(1, (self.high - self.low) // 4)
        self.ticks = [10.0**k for k in range(self.low, self.high + 1, step)]

    def up(self, value: float) -> float:
        """How high a value is, 0 to 100."""
        low = self.low
        return 100 * (math.log10(max(value, 10.0**low)) - low) / (self.high - low)


class _Linear:
    """An axis from 0 to a round number."""

    def __init__(self, most: float):
        power = 10.0 ** math.floor(math.log10(most))
        self.high = next(power * k for k in (1, 2, 4, 6, 8, 10) if power * k >= most * 0.999)
        self.ticks = [self.high * k / 4 for k in range(5)]

    def up(self, value: float) -> float:
        """How high a value is, 0 to 100."""
        return 100 * value / self.high


def _plot(
    title: str,
    names: Markup,
    y: str,
    area: Markup,
    labels: Markup,
    ends: tuple[str, str, str],
    x: str,
) -> Markup:
    below = Markup("").join(
        Markup('<span class="tick {}" style="left:{}%">{}</span>').format(kind, place, text)
        for kind, place, text in zip(("first", "", "last"), (0, 50, 100), ends, strict=True)
    )
    return Markup(
        "<figure class=chart><figcaption>{}</figcaption>{}<div class=axis>{}</div>"
        "<div class=plot><div class=ys>{}</div><div class=area>{}</div><div class=xs>{}</div></div>"
        '<div class="axis x">{}</div></figure>'
    ).format(title, names, y, labels, area, below, x)


def heat(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    relative: bool = False,
) -> Markup:
    """A table of shares whose colour is logarithmic: 0.001 % is pale, 100 % is not; with
    ``relative`` it is their share of the largest."""
    most = max((v or 0.0 for _, values in rows for v in values), default=0.0)
    scale = most if relative else 0.0
    heads = Markup("").join(Markup("<th scope=col>{}</th>").format(readable(c)) for c in columns)
    body = joined(
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            readable(name),
            Markup("").join(
                _heat_cell(v, f"{name}, {c}", scale) for v, c in zip(values, columns, strict=True)
            ),
        )
        for name, values in rows
    )
    return Markup(
        '<figure class=chart><figcaption>{}</figcaption><div class="scroll{}" tabindex=0><table>'
        "<thead><tr><td></td>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div></figure>"
    ).format(title, " tall" if len(rows) > 20 else "", heads, body)


def _heat_cell(value: float | None, name: str, scale: float) -> Markup:
    if value is None:
        return Markup("<td></td>")
    depth = value / scale if scale else (math.log10(max(value, 1e-9)) + 5) / 5
    depth = min(1.0, max(0.0, depth))
    return Markup('<td class=heat style="--v:{}" data-t="{}">{}</td>').format(
        _short(depth), f"{readable(name)}: {_value(value, True)}", _value(value, True)
    )


@dataclass(frozen=True)
class Counts:
    """Counts of values in bins of one width.

    Attributes:
        title: what was counted.
        unit: of the values.
        start, step: where the first bin begins, and how wide each is.
        counts: how many values lie in each.
        inside: what lies between the last value of a bin and the next bin: 1 for integers.
    """

    title: str
    unit: str
    start: float
    step: float
    counts: Sequence[int]
    inside: int = 0

    def as_json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {**vars(self), "counts": list(self.counts)}


def chosen_histogram(
    name: str, label: str, found: Sequence[tuple[str, str, Sequence[Counts]]]
) -> Markup:
    """A choice of linears, and the histograms of the one that is chosen.

    Args:
        name: of the choice, one of its own on the page.
        label: what is chosen.
        found: name of each linear, a note, and what was counted of it.
    """
    data = [
        {
            "note": readable(note),
            "parts": [{**p.as_json(), "title": readable(p.title)} for p in parts],
        }
        for _, note, parts in found
    ]
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    safe = Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
    options = joined(Markup("<option>{}</option>").format(readable(one)) for one, _, _ in found)
    ticks = Markup(
        '<span class=tick style="bottom:0%"></span><span class=tick style="bottom:100%"></span>'
    )
    area = Markup('<svg class=one viewBox="0 0 100 100" preserveAspectRatio=none></svg>')
    drawn = str(_plot("", Markup(""), "share of all values", area, ticks, ("", "", ""), ""))
    panels = joined(
        Markup(drawn.replace("<figure", f'<figure id="{name}-{k}"', 1))
        for k in range(max(len(parts) for _, _, parts in found))
    )
    return Markup(
        '<div class="controls"><label for="{0}">{1}</label><select id="{0}" class="linears">{2}'
        '</select></div>\n<p class="dim" id="{0}-note"></p>\n<div class="panels" id="{0}-panels">'
        '{3}</div>\n<script type="application/json" id="{0}-data">{4}</script>'
    ).format(name, label, options, panels, safe)


def size(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _thinned(values: Mapping[int, float]) -> list[tuple[int, float]]:
    """At most so many points, the largest of each stretch."""
    found = sorted(values.items())
    step = -(-len(found) // MOST_POINTS) or 1
    parts = (found[k : k + step] for k in range(0, len(found), step))
    return [max(part, key=lambda one: one[1]) for part in parts]


def _value(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:,.0f} %" if value >= 1 else f"{100 * value:.2g} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
