"""What a report says of compressed weights: ratio against entropy, codes, bypassed tiles."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ms_quant.models.names import in_block, short_name
from ms_quant.report.charts import Counts, Line, bars, chosen_histogram, lines
from ms_quant.report.checkpoint import checkpoint_facts
from ms_quant.report.page import render, write_page
from ms_quant.report.parts import Cell, Sentence, folded, paragraph, section, sentences, table
from ms_quant.report.records import Further
from ms_quant.report.report import report_page
from ms_quant.report.results import Results
from ms_quant.report.weights import code_counts_of

Row = dict[str, Any]
Histograms = Sequence[NDArray[np.int64]]
MOST_ROWS, MOST_HISTOGRAMS = 3000, 600
COLUMNS = (
    *("layer", "rank", "shape", "zeros", "raw bytes", "stored bytes", "ratio"),
    *("entropy bound", "bypassed tiles"),
)
MEASURES = (
    ("raw", "the int8 weight, a byte a value, without padding."),
    ("stored", "the UNZIP tiles of the weight and their index, as the files hold them."),
    ("ratio", "stored / raw."),
    (
        "entropy bound",
        "the fewest bytes in which a code could hold the weight if it knew how often each value "
        "occurs and nothing else (order-0 entropy). UNZIP stays above it: its codes are 3, 6, 9 or "
        "12 bits long and do not cross 64-bit words.",
    ),
    ("zeros", "the share of values that are 0: pruned, or rounded to 0."),
    (
        "bypassed tiles",
        "tiles (128 rows by 256 columns) that coding would not make smaller; they are stored raw.",
    ),
)


def entropy_bytes(counts: NDArray[np.int64]) -> int:
    """The bytes that no code goes below that only knows these counts (order-0 entropy)."""
    share = counts[counts > 0] / counts.sum()
    return math.ceil(-float(counts[counts > 0] @ np.log2(share)) / 8)


def write_info_page(
    path: Path,
    directory: Path,
    result: dict[str, Any],
    histograms: Histograms,
    groups: dict[str, str] | None,
) -> None:
    """Writes the page about a checkpoint whose rows are known.

    Args:
        path: the HTML file; it appears when it is complete.
        directory: the checkpoint.
        result: what :func:`sparse_compress.pipeline.info.info` returns.
        histograms: 256 counts for each row of it, by byte value: -1 counts at 255.
        groups: path of a compressed linear to that of its group; None of a directory of
            msModelSlim, of which nothing else is shown.

    Raises:
        MsQuantError: the file cannot be written.
    """
    text = ""
    if groups is not None:
        facts = checkpoint_facts(directory, further(result, histograms, groups))
        text = report_page(facts, Results())
    write_page(path, text or page(result, histograms))


def page(result: dict[str, Any], histograms: Histograms) -> str:
    """A page of the compressed weights alone."""
    head = paragraph(_facts(result), dim=True), sentences(_sentences(result))
    title = f"UNZIP compression of {result['output']}"
    return render(title, [*head, *parts(result, histograms)])


def further(result: dict[str, Any], histograms: Histograms, groups: dict[str, str]) -> Further:
    """What the page of a whole checkpoint says of its compressed weights."""
    sizes: dict[str, int] = defaultdict(int)
    for row in result["rows"]:
        sizes[groups[row["layer"]]] += row["stored_bytes"]
    return Further(
        dict.fromkeys(sizes, "W8A8SC"), sizes, _sentences(result), parts(result, histograms)
    )


def parts(result: dict[str, Any], histograms: Histograms) -> list[Markup]:
    """The sections about compressed weights."""
    rows: Sequence[Row] = result["rows"]
    found = [_uncompressed(result)]
    measures = [[Cell(name), Cell(text)] for name, text in MEASURES]
    if rows:
        found = [
            section(
                "Compression",
                _totals_chart(rows),
                _ratio_charts(rows),
                Markup("<h3>Every compressed linear</h3>"),
                _table(rows),
                folded("What the columns mean", table(("measure", "meaning"), measures,
                                                      text_columns=2)),
            ),
            section("Codes", paragraph(_CODES), _codes(rows, histograms)),
            *found,
        ]  # fmt: skip
    return [one for one in found if one]


_CODES = "How often each int8 value occurs in a compressed linear of a rank."


def _sentences(result: dict[str, Any]) -> list[Sentence]:
    rows = result["rows"]
    if not rows:
        return [Sentence("No linear is compressed.", "bad")]
    total = totals(rows)
    bound = total["entropy_bytes"] / (total["raw_bytes"] or 1)
    found = [
        Sentence(
            f"{len(rows)} compressed linears take {100 * total['ratio']:.1f} % of their int8 "
            f"bytes; the entropy bound is {100 * bound:.1f} %.",
            "good" if total["ratio"] < 1 else "bad",
        )
    ]
    worst = max(rows, key=lambda row: row["ratio"])
    if worst["ratio"] > 0.95:
        found.append(
            Sentence(
                f"{worst['layer']} of rank {worst['rank']} hardly shrinks "
                f"({worst['ratio']:.3f}): more `--sparsity`, or a higher price of rate-distortion "
                "rounding, makes it smaller.",
                "bad",
            )
        )
    return found


def _totals_chart(rows: Sequence[Row]) -> Markup:
    """Raw, stored and entropy bound of all linears of a kind."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[_kind(row)].append(row)
    keys = ("raw_bytes", "stored_bytes", "entropy_bytes")
    sums = [
        (kind, [sum(row[key] for row in found) for key in keys]) for kind, found in kinds.items()
    ]
    names = ("raw", "stored", "entropy bound")
    return bars("Bytes of all linears of a kind, over all ranks", sums[:24], names)


def _ratio_charts(rows: Sequence[Row]) -> Markup:
    """Ratio and entropy bound over blocks, of each kind."""
    kinds: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        place = in_block(row["layer"])
        if place is not None:
            kinds[_kind(row)][place[0]].append(row)
    panels = Markup("")
    for kind, blocks in list(kinds.items())[:24]:
        both = [
            Line(name, {k: share(found, key) for k, found in blocks.items()}, color)
            for name, key, color in (("stored", "stored_bytes", "one"),
                                     ("entropy bound", "entropy_bytes", "two"))
        ]  # fmt: skip
        panels += lines(f"Ratio of {kind}", both, "block", "share of the raw bytes", linear=True,
                        percent=True)  # fmt: skip
    return Markup('<div class="panels">{}</div>').format(panels)


def share(rows: Sequence[Row], key: str) -> float:
    """A measure of some rows over their raw bytes."""
    return sum(row[key] for row in rows) / (sum(row["raw_bytes"] for row in rows) or 1)


def _kind(row: Row) -> str:
    place = in_block(row["layer"])
    return place[1] if place is not None else row["layer"]


def _codes(rows: Sequence[Row], histograms: Histograms) -> Markup:
    both = sorted(zip(rows, histograms, strict=True), key=lambda one: -one[0]["ratio"])
    found: list[tuple[str, str, list[Counts]]] = [
        (
            label(row),
            f"{100 * row['sparsity']:.1f} % zeros, ratio {row['ratio']:.3f}, entropy bound "
            f"{share([row], 'entropy_bytes'):.3f}",
            [code_counts_of("codes", np.arange(-128, 128), np.roll(counts, 128))],
        )
        for row, counts in both[:MOST_HISTOGRAMS]
    ]
    return chosen_histogram("codes", "Linear, those that shrink least first", found)


def label(row: Row) -> str:
    """What a choice calls a row."""
    return f"{short_name(row['layer'])}, rank {row['rank']}"


def _table(rows: Sequence[Row]) -> Markup:
    ranked = sorted(rows, key=lambda row: -row["ratio"])[:MOST_ROWS]
    body = [
        _cells(row, Cell(row["layer"]), Cell(str(row["rank"]), row["rank"]),
               Cell("x".join(map(str, row["shape"]))))
        for row in ranked
    ]  # fmt: skip
    total = _cells(totals(rows), Cell("total"), Cell("", ""), Cell(""))
    return table(COLUMNS, [total]) + table(COLUMNS, body, name="layers")


def totals(rows: Sequence[Row]) -> Row:
    """The measures of all rows together."""
    keys = ("raw_bytes", "stored_bytes", "entropy_bytes", "tiles", "bypass_tiles")
    total: Row = {key: sum(row[key] for row in rows) for key in keys}
    raw = total["raw_bytes"] or 1
    zeros = sum(row["sparsity"] * row["raw_bytes"] for row in rows)
    return {**total, "ratio": total["stored_bytes"] / raw, "sparsity": zeros / raw}


def _cells(row: Row, *names: Cell) -> list[Cell]:
    bound = share([row], "entropy_bytes")
    bypassed = row["bypass_tiles"] / (row["tiles"] or 1)
    return [
        *names,
        Cell(f"{100 * row['sparsity']:.1f} %", row["sparsity"]),
        Cell(f"{row['raw_bytes']:,}", row["raw_bytes"]),
        Cell(f"{row['stored_bytes']:,}", row["stored_bytes"]),
        Cell(f"{row['ratio']:.3f}", row["ratio"]),
        Cell(f"{row['entropy_bytes']:,} ({bound:.3f})", bound),
        Cell(f"{row['bypass_tiles']}/{row['tiles']}", bypassed),
    ]


def _facts(result: dict[str, Any]) -> str:
    asked = [
        f"{key} {result[key]}"
        for key in ("sparsity", "pruning", "algorithm")
        if result.get(key) is not None
    ]
    return ", ".join([str(result["format"]), *asked])


def _uncompressed(result: dict[str, Any]) -> Markup:
    rows = [
        [Cell(str(name)), Cell(str(why))] for name, why in result.get("uncompressed", {}).items()
    ]
    if not rows:
        return Markup("")
    heads = ("linear", "why")
    return section("Left uncompressed", table(heads, rows[:MOST_ROWS], name="left", text_columns=2))
