"""What a page is made of besides charts: sections, sentences, cards, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from ms_quant.report.strange import readable

Content = str | Markup
SHORT = 28  # characters of code that is not broken


@dataclass(frozen=True)
class Sentence:
    """A sentence of the summary.

    Attributes:
        text: the sentence.
        kind: ``"good"``, ``"bad"``, ``"todo"`` or "".
    """

    text: str
    kind: str = ""


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what it shows.
        value: what it is sorted by; of text None, and ``""`` where a number is missing.
    """

    text: str
    value: float | str | None = None


def joined(parts: Iterable[Markup]) -> Markup:
    """Parts, one a line."""
    return Markup("\n").join(parts)


def section(title: str, *parts: Markup) -> Markup:
    """A heading and what is under it; "" where there is nothing."""
    found = [part for part in parts if part]
    if not found:
        return Markup("")
    return Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(title, joined(found))


def paragraph(text: str, dim: bool = False) -> Markup:
    """A paragraph; words between back quotes are code."""
    return Markup("<p{}>{}</p>").format(Markup(' class="dim"') if dim else "", _with_code(text))


def sentences(found: Sequence[Sentence]) -> Markup:
    """A list of sentences, each with its mark."""
    items = joined(
        Markup('<li class="{}">{}</li>').format(one.kind, _with_code(one.text)) for one in found
    )
    return Markup('<ul class="said">\n{}\n</ul>').format(items) if found else Markup("")


def _with_code(text: str) -> Markup:
    parts = readable_long(text).split("`")
    return Markup("").join(
        Markup("<code{}>{}</code>").format(
            Markup(" class=short") if len(part) < SHORT else "", part
        )
        if k % 2
        else Markup.escape(part)
        for k, part in enumerate(parts)
    )


def readable_long(text: str) -> str:
    """A sentence of ours: its parts are cut, it is not."""
    return "".join(readable(text[k : k + 200]) for k in range(0, len(text), 200))


def cards(found: Sequence[tuple[str, str]]) -> Markup:
    """The few numbers that count: each a value and what it is."""
    return Markup('<div class="cards">\n{}\n</div>').format(
        joined(
            Markup('<div class="card"><b>{}</b><span>{}</span></div>').format(
                readable(value), readable(name)
            )
            for name, value in found
        )
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    name: str = "",
    text_columns: int = 1,
    bad: Sequence[bool] = (),
) -> Markup:
    """A table that scrolls inside itself where it is wider than the window.

    Args:
        columns: their heads.
        rows: their cells.
        name: of a table that can be sorted and filtered, one of its own.
        text_columns: how many columns from the left hold text that may be broken.
        bad: which rows are marked.
    """
    kinds = [Markup(' class="text"') if k < text_columns else "" for k in range(len(columns))]
    heads = Markup("").join(
        Markup("<th scope=col{}>{}</th>").format(kind, column)
        for kind, column in zip(kinds, columns, strict=True)
    )
    marks = list(bad) or [False] * len(rows)
    body = joined(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="bad"') if mark else "", Markup("").join(map(_cell, row, kinds))
        )
        for row, mark in zip(rows, marks, strict=True)
    )
    long = bool(name) and len(rows) > 15
    found = Markup(
        '<div class="{}" tabindex="0"><table{}>\n<thead><tr>{}</tr></thead>\n'
        "<tbody>\n{}\n</tbody>\n</table></div>"
    ).format(
        "scroll tall" if long else "scroll",
        Markup(' id="{}" class="sorts"').format(name) if name else "",
        heads,
        body,
    )
    return _controls(name, len(rows)) + found if long else found


def _cell(cell: Cell, kind: Content) -> Markup:
    if cell.value is None:
        # Paths are broken after their dots.
        text = Markup(".<wbr>").join(readable(cell.text).split("."))
        return Markup("<td{}>{}</td>").format(kind, text)
    value = f"{cell.value:.8g}" if isinstance(cell.value, float | int) else cell.value
    return Markup('<td{} data-v="{}">{}</td>').format(kind, value, readable(cell.text))


def _controls(name: str, rows: int) -> Markup:
    return Markup(
        '<div class="controls"><label for="{0}-filter">Filter</label>'
        '<input id="{0}-filter" type="search" placeholder="block, group, scheme">'
        '<span id="{0}-count">{1} rows</span></div>\n'
    ).format(name, rows)


def folded(title: str, content: Markup) -> Markup:
    """What is shown when its title is clicked."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, content)
