"""Sections about what calibration saw: ranges of inputs, outlier channels, tokens of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from shlex import quote

from markupsafe import Markup

from ms_quant.quantization.input_facts import OUTLIER
from ms_quant.report.charts import Line, heat, lines
from ms_quant.report.parts import Cell, Sentence, paragraph, section, table
from ms_quant.report.recorded import entry, expert_tokens, number, pair
from ms_quant.report.records import Facts, Group

CHANNELS = 200  # rows of the table of outlier channels
EXPERTS = 32  # columns of the map of tokens by expert
_RANGES = (
    "The largest magnitude of a group's input over its channels, block by block. Smoothing moves "
    "what few channels have into the weights: the lower the line after it, the finer one scale is. "
    "Where there is no second line, nothing was smoothed, or a rotation hides the channels."
)


def activation_section(facts: Facts) -> Markup:
    """Inputs before and after smoothing, and the channels that stand out."""
    kinds: dict[str, list[Group]] = defaultdict(list)
    for group in facts.groups:
        if pair(group.input.get("before")) and group.block is not None:
            kinds[group.kind].append(group)
    if not kinds:
        return Markup("")
    panels = Markup("").join(_panel(kind, groups) for kind, groups in kinds.items())
    return section(
        "Activations before and after smoothing",
        paragraph(_RANGES),
        Markup('<div class="panels">{}</div>').format(panels),
        _channels(facts),
    )


def _panel(kind: str, groups: list[Group]) -> Markup:
    found = []
    for key, color in (("before", "three"), ("after", "one")):
        values = {
            group.block: ends[0]
            for group in groups
            if group.block is not None and (ends := pair(group.input.get(key)))
        }
        if values:
            found.append(Line(f"{key} smoothing", values, color))
    return lines(f"Input of {kind}", found, "block", "largest magnitude, logarithmic")


def _channels(facts: Facts) -> Markup:
    rows = []
    for group in facts.groups:
        ends, channels = pair(group.input.get("before")), group.input.get("channels")
        for one in channels if ends and isinstance(channels, list) else ():
            if isinstance(one, list) and len(one) == 3 and number(one[1]) is not None:
                before, after = float(one[1]), number(one[2])
                times = before / ends[1] if ends and ends[1] else 0.0
                rows.append((times, group.path, one[0], before, after))
    rows.sort(key=lambda row: -row[0])
    title = Markup("<h3>Outlier channels</h3>")
    if not rows:
        return title + paragraph(f"No channel is above {OUTLIER:.0f} times the median one.")
    cells = [
        [
            Cell(path),
            Cell(str(channel), number(channel) if number(channel) is not None else ""),
            Cell(f"{before:,.4g}", before),
            Cell(
                "not smoothed" if after is None else f"{after:,.4g}", "" if after is None else after
            ),
            Cell(f"{times:,.0f} x", times),
        ]
        for times, path, channel, before, after in rows[:CHANNELS]
    ]
    more = f" The table has the {CHANNELS} largest." if len(rows) > CHANNELS else ""
    said = f"Channels above {OUTLIER:.0f} times the median channel of their input.{more}"
    heads = ("input of", "channel", "before", "after smoothing", "times the median")
    return title + paragraph(said) + table(heads, cells, name="channels")


def activation_sentences(facts: Facts) -> Iterator[Sentence]:
    """Inputs that one scale for all tokens cannot hold."""
    found = []
    for group in facts.groups:
        ends = pair(group.input.get("after")) or pair(group.input.get("before"))
        if group.scheme in ("W8A8", "W8A8SC") and ends and ends[0] > 5 * OUTLIER * ends[1] > 0:
            found.append((ends[0] / ends[1], group))
    if found:
        times, worst = max(found, key=lambda one: one[0])
        yield Sentence(
            f"{len(found)} inputs keep channels far above the others after smoothing, most of all "
            f"{worst.path} ({times:,.0f} times the median channel), which one static scale holds "
            f"coarsely: take W8A8_DYNAMIC for them, or leave them float "
            f"(`--exclude {quote(worst.first)}`).",
            "bad" if (worst.error or 0) > 0.1 else "",
        )


def expert_section(facts: Facts) -> Markup:
    """How many calibration tokens came to the experts."""
    found: tuple[dict[int, float], ...] = ({}, {}, {})
    for key, value in entry(facts.record, "routing").items():
        index = key.removeprefix("block ")
        counts = [number(entry(value).get(name)) for name in ("least", "mean", "most")]
        if index.isdecimal() and None not in counts:
            for place, count in zip(found, counts, strict=True):
                place[int(index)] = float(count or 0)
    least, mean, most = found
    if not mean:
        return Markup("")
    drawn = [Line("most", most, "two"), Line("mean", mean, "one"), Line("least", least, "three")]
    return section(
        "Tokens of experts",
        paragraph(
            "How many calibration tokens the router sent to each expert. An expert that saw few is "
            "calibrated on other tokens, too; more `--samples` mend that."
        ),
        lines("Tokens of an expert", drawn, "block", "calibration tokens, logarithmic"),
        _map(expert_tokens(facts.record)),
    )


def _map(tokens: dict[int, list[int]]) -> Markup:
    """Share of a block's tokens by expert; of many experts, by stretches of them."""
    if not tokens:
        return Markup("")
    count = max(map(len, tokens.values()))
    step = -(-count // EXPERTS)
    heads = [
        str(first) if step == 1 else f"{first}-{min(first + step, count) - 1}"
        for first in range(0, count, step)
    ]
    rows = []
    for block, counts in tokens.items():
        total = sum(counts) or 1
        shares = [sum(counts[k : k + step]) / total or None for k in range(0, count, step)]
        rows.append((f"block {block}", shares))
    return heat(
        "Share of the routed tokens by expert; an empty cell saw none", heads, rows, relative=True
    )
