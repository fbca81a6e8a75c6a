"""Histograms of the weights of a few linears: the codes, and the float weights beside them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.grid import AffineGrid
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.report.charts import Counts
from ms_quant.report.records import Facts, FloatWeights, Group

CHOSEN, MOST, BINS = 12, 128, 64
VALUES = 1 << 22  # of a weight that are counted, in rows spread over all

Histograms = list[tuple[str, str, list[Counts]]]


def histograms(
    facts: Facts, patterns: Sequence[str], against: FloatWeights | None = None
) -> Histograms:
    """Name of each linear, a note, and what was counted of it.

    Args:
        facts: the checkpoint.
        patterns: globs of the linears; none chooses some of each kind, the worst first.
        against: the float model, whose weights are counted, too.

    Raises:
        MsQuantError: no quantized linear is named so, too many are, or a weight cannot be read.
    """
    if facts.stored is None:
        return []
    found: Histograms = []
    for path, group in chosen(facts, patterns):
        stored = facts.stored(path)
        if stored is None:
            continue
        parts = [codes_of(stored)]
        if against is not None:
            weight = against.weight(path)
            parts.append(spread_counts("float weights", "value of the float weight", weight))
        size = stored.weight.size if isinstance(stored, QuantizedLinear) else stored.size
        found.append((path, f"{group.scheme}, {size:,} weights", parts))
    return found


def chosen(facts: Facts, patterns: Sequence[str]) -> list[tuple[str, Group]]:
    """The linears that are shown.

    Raises:
        MsQuantError: no quantized linear is named so, or too many are.
    """
    quantized = [group for group in facts.groups if group.quantized]
    if not patterns:
        ranked = sorted(quantized, key=lambda one: -1.0 if one.error is None else -one.error)
        kinds: dict[str, Group] = {}
        for group in ranked:
            kinds.setdefault(group.kind, group)
        order = [*kinds.values(), *(group for group in ranked if kinds[group.kind] is not group)]
        return [(group.first, group) for group in order[:CHOSEN]]
    by_path = {path: group for group in quantized for path in _linears(facts, group)}
    found = {path for path in by_path for one in patterns if fnmatchcase(path, one)}
    if not found:
        some = ", ".join(list(by_path)[:2]) or "none: nothing is quantized"
        raise BadArgumentError(
            f"--linear {patterns[0]!r:.80} names no quantized linear, expected such as {some}"
        )
    if len(found) > MOST:
        raise BadArgumentError(
            f"--linear names {len(found):,} linears, expected at most {MOST}: the page would be "
            "too large for a phone"
        )
    return [(path, group) for path, group in by_path.items() if path in found]


def _linears(facts: Facts, group: Group) -> Sequence[str]:
    if group.path in facts.linears:
        return facts.linears[group.path]
    paths = (path for path in facts.linears if fnmatchcase(path, group.path))
    return [linear for path in paths for linear in facts.linears[path]]


def codes_of(stored: QuantizedLinear | np.ndarray) -> Counts:
    """Counts of the codes of a weight; of floats in a few bits, of what they stand for."""
    if isinstance(stored, QuantizedLinear):
        if isinstance(stored.grid, AffineGrid):
            return code_counts("codes", stored.weight)
        values = stored.grid.values(stored.weight)
        return spread_counts("quantized weights", "value that a code stands for", values)
    if stored.dtype.kind in "iu":
        return code_counts("codes", stored)
    return spread_counts("codes", "value of the code, without its scale", stored)


def code_counts(title: str, codes: np.ndarray) -> Counts:
    """Counts of integers, in bins of one width."""
    return code_counts_of(title, *np.unique(_some(codes), return_counts=True))


def code_counts_of(title: str, values: np.ndarray, counts: np.ndarray) -> Counts:
    """The same of values whose counts are known, in order."""
    used = np.flatnonzero(counts)
    values, counts = values[used[0] : used[-1] + 1], counts[used[0] : used[-1] + 1]
    low, high = int(values[0]), int(values[-1])
    step = -(-(high - low + 1) // BINS)
    low -= low % step  # so that 0 begins a bin
    bins = np.bincount((values.astype(int) - low) // step, weights=counts)
    return Counts(title, "code of the weight", low, step, bins.astype(int).tolist(), 1)


def spread_counts(title: str, unit: str, values: np.ndarray) -> Counts:
    """Counts of floats between the smallest and the largest."""
    wide = _some(values).astype(np.float32).reshape(-1)
    largest = float(np.abs(wide).max(initial=0)) or 1.0
    counts, edges = np.histogram(wide, BINS, (-largest, largest))
    return Counts(title, unit, float(edges[0]), float(edges[1] - edges[0]), counts.tolist())


def _some(weight: np.ndarray) -> np.ndarray:
    step = -(-weight.size // VALUES) or 1
    return weight[::step] if weight.ndim > 1 else weight
