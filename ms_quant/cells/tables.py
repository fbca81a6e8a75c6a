"""Plain text tables of what a network's linears are."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, the first row a header."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text.rstrip() for text in texts)


def joined(paths: Sequence[str]) -> str:
    """Paths of one group, what all begin with written once: ``blocks.0.attn.{q, k, v}``."""
    if len(paths) == 1:
        return paths[0]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return ", ".join(paths)
    parent = parents.pop()
    names = ", ".join(path.rpartition(".")[2] for path in paths)
    return f"{parent}.{{{names}}}" if parent else f"{{{names}}}"
