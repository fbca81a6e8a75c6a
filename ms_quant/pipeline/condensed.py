"""Many paths of linears as a few lines that people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from ms_quant.models.names import linear_id, parse_linear

MOST = 12
"""So many paths are listed as they are."""


def condensed(paths: Sequence[str]) -> list[str]:
    """Paths of linears, those of one name in several layers and experts in one line.

    Examples:
        >>> gates = [f"model.layers.{i}.mlp.gate" for i in range(3, 61)]
        >>> condensed([*gates, "model.layers.61.eh_proj"])
        ['mlp.gate of layers 3-60', 'eh_proj of layer 61']
    """
    if len(paths) <= MOST:
        return list(paths)
    layers: dict[str, dict[int, None]] = {}
    for path in paths:
        linear = parse_linear(path)
        layers.setdefault(member_of(linear.inner), {})[linear.block] = None
    together: dict[tuple[int, ...], list[str]] = {}
    for member, blocks in layers.items():
        together.setdefault(tuple(blocks), []).append(member)
    return [f"{' and '.join(names)} of {_layers(blocks)}" for blocks, names in together.items()]


def member_of(inner: str) -> str:
    """What linears at a path in a block are called together, an expert by no number."""
    linear = linear_id(0, inner)
    module, _, name = linear.member.rpartition(".")
    return inner if linear.expert is None else f"{module}.*.{name}"


def _layers(blocks: Iterable[int]) -> str:
    """``layers 0-2 and 61``."""
    runs = []
    for _, run in groupby(enumerate(sorted(blocks)), lambda pair: pair[1] - pair[0]):
        first, *others = (block for _, block in run)
        runs.append(f"{first}-{others[-1]}" if others else str(first))
    word = "layer" if len(runs) == 1 and "-" not in runs[0] else "layers"
    return f"{word} {', '.join(runs[:-1])}{' and ' if runs[1:] else ''}{runs[-1]}"
