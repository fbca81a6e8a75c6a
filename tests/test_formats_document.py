"""docs/formats.md says what the table of schemes says."""

from __future__ import annotations

from pathlib import Path

from ms_quant.schemes.support import SUPPORT

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"


def table() -> list[str]:
    lines = ["| scheme | format | served by | kernels |", "|---|---|---|---|"]
    for scheme, rows in SUPPORT.items():
        for held in rows:
            experts = [f"experts: {runtime}" for runtime in held.experts_served_by]
            served = [*held.served_by, *experts, *held.not_served_by]
            if held.only:
                served.append(f"only with {held.wanted}")
            cells = [scheme, held.format, "; ".join(served), held.kernels]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_document_has_the_table() -> None:
    assert "\n".join(table()) in DOCUMENT.read_text()
