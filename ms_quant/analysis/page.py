"""An HTML page about an analysis: what hurts, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from markupsafe import Markup

from ms_quant.analysis.inputs import describe_input
from ms_quant.analysis.records import GroupSensitivity, Sensitivity, percent
from ms_quant.analysis.request import check_file
from ms_quant.analysis.summary import NEGLIGIBLE, advice, title
from ms_quant.report import page
from ms_quant.report.charts import heat
from ms_quant.report.parts import Cell, Sentence, cards, paragraph, section, sentences, table

MOST_ROWS, MOST_BLOCKS = 3000, 256
_HEADS = ("group", "kind", "perplexity", "error at its output", "error at its block",
          "largest input", "weights")  # fmt: skip
_MAP = "Estimated increase of perplexity by block and group; the colour is logarithmic"


def check_page(path: Path) -> None:
    """Refuses what would fail after the work.

    Raises:
        MsQuantError: no page can be made there.
    """
    page.check_page(path)
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
    parts = [
        paragraph(
            "What each group of linears costs when it alone is quantized: the estimated increase "
            "of perplexity.",
            dim=True,
        ),
        sentences([_advice(found, scheme) for scheme in found.schemes]),
        cards([(scheme, _cost(found.loss_increase(scheme))) for scheme in found.schemes]),
        _kinds(found),
        *(_scheme(found, scheme, metric, k) for k, scheme in enumerate(found.schemes)),
        _massive(found),
    ]
    page.write_page(path, page.render(f"What hurts in {found.model}", parts))


def _advice(found: Sensitivity, scheme: str) -> Sentence:
    cheap = percent(found.loss_increase(scheme)) < NEGLIGIBLE
    return Sentence(advice(found, scheme), "good" if cheap else "bad")


def _cost(loss: float) -> str:
    return f"{percent(loss):+.2g} %"


def _kinds(found: Sensitivity) -> Markup:
    """What all groups of a kind cost together, a column for each scheme."""
    kinds: dict[str, list[GroupSensitivity]] = defaultdict(list)
    for group in found.groups:
        kinds[group.kind].append(group)
    rows = []
    for kind, groups in [*kinds.items(), ("all", list(found.groups))]:
        row = [Cell(kind), Cell(str(len(groups)), len(groups))]
        for scheme in found.schemes:
            chosen = [group for group in groups if scheme in group.schemes]
            loss = found.loss_increase(scheme, chosen)
            row.append(Cell(_cost(loss), loss) if chosen else Cell("", ""))
        rows.append(row)
    return section("All groups of a kind together", table(("kind", "groups", *found.schemes), rows))


def _scheme(found: Sensitivity, scheme: str, metric: str, number: int) -> Markup:
    ranked = found.ranked(scheme, metric)
    more = f" The {MOST_ROWS} first of {len(ranked)}." if len(ranked) > MOST_ROWS else ""
    rows = [_row(group, scheme) for group in ranked[:MOST_ROWS]]
    return section(
        scheme,
        _map(list(found.of(scheme)), scheme),
        paragraph(
            f"Every group, the worst first by {metric}.{more} The head of a column sorts by it."
        ),
        table(_HEADS, rows, name=f"scheme{number}", text_columns=2),
    )


def _row(group: GroupSensitivity, scheme: str) -> list[Cell]:
    error, largest = group.schemes[scheme], group.input.absmax if group.input else None
    loss = error.worst("loss_increase")
    output, block = error.worst("output_error"), error.worst("block_error")
    return [
        Cell(title(group)),
        Cell(group.kind),
        Cell(_cost(loss), loss),
        Cell(f"{output:.1e}", output),
        Cell(f"{block:.1e}", block),
        Cell("", "") if largest is None else Cell(f"{largest:,.4g}", largest),
        Cell(f"{group.weights:,}", group.weights) if group.weights else Cell("", ""),
    ]


def _map(groups: list[GroupSensitivity], scheme: str) -> Markup:
    """Blocks by groups; of very many blocks, the worst of neighbours together."""
    names = list(dict.fromkeys(group.name for group in groups))
    blocks = sorted({group.block for group in groups})
    cost = {(g.block, g.name): percent(g.score(scheme, "loss_increase")) / 100 for g in groups}
    step, rows = -(-len(blocks) // MOST_BLOCKS), []
    for start in range(0, len(blocks), step or 1):
        part = blocks[start : start + step]
        shown = f"block {part[0]}" if len(part) == 1 else f"blocks {part[0]} to {part[-1]}"
        rows.append(
            (
                shown,
                [max((cost[b, n] for b in part if (b, n) in cost), default=None) for n in names],
            )
        )
    return heat(_MAP, names, rows)


def _massive(found: Sensitivity) -> Markup:
    rows = [
        [Cell(title(group)), Cell(describe_input(group.input))]
        for group in found.groups
        if group.input and group.input.massive
    ]
    if not rows:
        return Markup("")
    return section(
        "Massive inputs",
        paragraph("One scale for all tokens cannot hold them well."),
        table(("input of", "what stands out"), rows[:MOST_ROWS], name="massive", text_columns=2),
    )
