"""What an analysis says, in lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from ms_quant.analysis.inputs import describe_input
from ms_quant.analysis.records import GroupSensitivity, Sensitivity, check_metric, percent

WIDTH = 80
NEGLIGIBLE = 0.5  # percent of perplexity that all groups of a scheme may cost together
MOST_OF = 0.8  # of what they cost
FEW = 0.2  # of the groups
MOST = 12  # groups that are named to be left float
SCALES = {  # what scales its inputs by fixed numbers, to what does so per token
    "W8A8": "W8A8_DYNAMIC",
    "W8A8_MIX": "W8A8_DYNAMIC",
}
COLUMNS = ("loss_increase", "output_error", "block_error")


def summary(found: Sensitivity, metric: str = "loss_increase", top: int = 10) -> list[str]:
    """A table for each scheme, worst first, the sums, massive inputs, and what to do.

    Args:
        found: the analysis.
        metric: what the tables are sorted by.
        top: how many groups of each scheme are listed.

    Raises:
        MsQuantError: there is no such metric.
    """
    check_metric(metric)
    lines: list[str] = []
    for scheme in found.schemes:
        lines += [*_table(found, scheme, metric, top), ""]
    lines += _by_kind(found)
    massive = [group for group in found.groups if group.input and group.input.massive]
    if massive:
        massive.sort(key=lambda group: -_contrast(group))
        lines += ["", "Massive inputs, which one scale for all tokens cannot hold well:"]
        for group in massive[:top]:
            assert group.input is not None
            lines += _wrapped(f"{title(group)}: {describe_input(group.input)}", "  ")
        if len(massive) > top:
            lines.append(f"  and {len(massive) - top} more groups")
    lines.append("")
    for scheme in found.schemes:
        lines += _wrapped(advice(found, scheme))
    return lines


def title(group: GroupSensitivity) -> str:
    """ "down of block 11"."""
    return f"{group.name} of block {group.block}"


def advice(found: Sensitivity, scheme: str) -> str:
    """One sentence: what to do about a scheme."""
    ranked = found.ranked(scheme)
    total = found.loss_increase(scheme)
    cost = f"{scheme}: all {len(ranked)} groups together cost about {_cost(total)}"
    if percent(total) < NEGLIGIBLE:
        return f"{cost} of perplexity; nothing stands out, quantize them all."
    worst = _fewest(found, scheme)
    if len(worst) > max(1, min(MOST, FEW * len(ranked))):
        better = "another algorithm (--algorithm best), a budget (--max-ppl-increase 1%)"
        return f"{cost} of perplexity, spread over many groups; take {better}, or a finer scheme."
    if scheme.startswith("C8"):
        return f"{cost} of perplexity, most of it in {_names(worst)}; keep the cache float."
    rest = _cost(total - found.loss_increase(scheme, worst))
    other = SCALES.get(scheme)
    instead = f", or choose {other} for them" if other else ""
    return (
        f"{cost} of perplexity, most of it in {_names(worst)}; leave them float "
        f"({_excluded(worst)}){instead}, then the others cost about {rest}; or say how much there "
        "may be, and ms-quant quantize --max-ppl-increase finds the groups."
    )


def _fewest(found: Sensitivity, scheme: str) -> list[GroupSensitivity]:
    """The fewest groups that make most of what a scheme costs."""
    enough = MOST_OF * found.loss_increase(scheme)
    worst: list[GroupSensitivity] = []
    for group in found.ranked(scheme):
        if found.loss_increase(scheme, worst) >= enough:
            break
        worst.append(group)
    return worst


def _names(groups: Sequence[GroupSensitivity]) -> str:
    """ "down of blocks 28, 11 and gate_up of block 29": each name once."""
    blocks: dict[str, list[str]] = {}
    for group in groups:
        blocks.setdefault(group.name, []).append(str(group.block))
    return " and ".join(
        f"{name} of block{'s' if len(found) > 1 else ''} {', '.join(found)}"
        for name, found in blocks.items()
    )


def _excluded(groups: Sequence[GroupSensitivity]) -> str:
    """The options that leave groups float; one linear of each is enough."""
    return " ".join(f"--exclude {group.linears[0]}" for group in groups)


def _cost(loss: float) -> str:
    value = percent(loss)
    return f"{value:+,.0f} %" if abs(value) >= 100 else f"{value:+.2g} %"


def _table(found: Sensitivity, scheme: str, metric: str, top: int) -> Iterator[str]:
    ranked = found.ranked(scheme, metric)
    shown = ranked[:top]
    listed = f"the worst {len(shown)} of {len(ranked)} groups" if len(ranked) > top else "by group"
    own = metric not in COLUMNS
    yield f"{scheme}, {listed}:"
    heads = ["perplexity", "at output", "at block", "input", *([metric] if own else [])]
    yield _row("  group", heads)
    for group in shown:
        error = group.schemes[scheme]
        cells = [
            f"{percent(error.worst('loss_increase')):+.3g} %",
            f"{error.worst('output_error'):.1e}",
            f"{error.worst('block_error'):.1e}",
            f"x {_contrast(group):,.0f}" if group.input else "",
        ]
        if own:
            cells.append(f"{group.score(scheme, metric):.3g}")
        yield _row(f"  {title(group)}", cells)


def _row(name: str, cells: Sequence[str]) -> str:
    return (f"{name:<24.24}" + "".join(f"{cell:>11}" for cell in cells)).rstrip()


def _by_kind(found: Sensitivity) -> Iterator[str]:
    """What all groups of a kind cost together, a column for each scheme."""
    yield "All groups of a kind together, estimated increase of perplexity:"
    kinds = list(dict.fromkeys(group.kind for group in found.groups))
    for start in range(0, len(found.schemes), 3):
        schemes = found.schemes[start : start + 3]
        yield f"  {'kind':<14}" + "".join(f"{scheme:>21.21}" for scheme in schemes)
        for kind in [*kinds, "all"]:
            cells = []
            for scheme in schemes:
                chosen = [group for group in found.of(scheme) if kind in (group.kind, "all")]
                total = percent(found.loss_increase(scheme, chosen))
                cells.append(f"{total:+.3g} %" if chosen else "")
            if any(cells):
                yield f"  {kind:<14.14}" + "".join(f"{cell:>21}" for cell in cells)


def _contrast(group: GroupSensitivity) -> float:
    """How far the largest value of an input is above the median token's largest."""
    facts = group.input
    return facts.absmax / facts.token_median if facts and facts.token_median else 1.0


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
