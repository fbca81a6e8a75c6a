"""The sentences at the top of a page: what is right, what is wrong, and what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from shlex import quote
from statistics import median

from ms_quant.errors import MsQuantError
from ms_quant.pipeline.expert_report import expert_lines
from ms_quant.pipeline.siblings import ENOUGH, FAR, LARGE, percent
from ms_quant.pipeline.warnings import SHOWN, TOO_MUCH
from ms_quant.report.activations import activation_sentences
from ms_quant.report.charts import size
from ms_quant.report.parts import Sentence
from ms_quant.report.recorded import entry
from ms_quant.report.records import Facts, FloatWeights, Group
from ms_quant.report.results import Results, result_sentences
from ms_quant.statistics.activation_range import float16_facts


def summary(facts: Facts, results: Results, against: FloatWeights | None) -> list[Sentence]:
    """Everything that should be known, the worst first."""
    found = [*_state(facts), *_sizes(facts, against), *_errors(facts), *_siblings(facts)]
    found += [*activation_sentences(facts), *_recorded(facts)]
    if facts.further is not None:
        found += facts.further.sentences
    if against is not None and against.same is False:
        found.append(Sentence(
            f"{against.place} has the sizes of the model that this was made from, and other files: "
            "float weights here may not be those that were quantized.", "bad",
        ))  # fmt: skip
    if facts.finished is None:
        found += result_sentences(results, quote(str(facts.place)))
    order = {"bad": 0, "": 1, "good": 2, "todo": 3}
    return sorted(found, key=lambda one: order[one.kind])


def _state(facts: Facts) -> Iterator[Sentence]:
    quantized = sum(group.count for group in facts.groups if group.quantized)
    total = sum(group.count for group in facts.groups)
    if facts.finished is not None:
        of = "" if facts.blocks is None else f" of {facts.blocks}"
        yield Sentence(f"The job runs: {facts.finished}{of} blocks are finished.")
        return
    schemes = dict.fromkeys(group.scheme for group in facts.groups if group.quantized)
    if not quantized:
        yield Sentence("Nothing is quantized: this is a float model.")
        return
    yield Sentence(f"{quantized:,} of {total:,} groups of linears are {', '.join(schemes)}.")


def _sizes(facts: Facts, against: FloatWeights | None) -> Iterator[Sentence]:
    source = against.bytes if against is not None else facts.source_bytes
    if facts.output_bytes and source:
        share = facts.output_bytes / source
        yield Sentence(
            f"The tensors take {size(facts.output_bytes)}, {100 * share:.0f} % of the "
            f"{size(source)} of the float model.", "good" if share < 1 else "bad",
        )  # fmt: skip


def _errors(facts: Facts) -> Iterator[Sentence]:
    measured = [group for group in facts.groups if group.error is not None]
    if not measured:
        if facts.finished is None and any(group.quantized for group in facts.groups):
            yield Sentence(_why_unmeasured(facts), "todo")
        return
    wrong = sorted(
        (g for g in measured if (g.error or 0) > TOO_MUCH), key=lambda g: -(g.error or 0)
    )
    if not wrong:
        worst = max(measured, key=lambda group: group.error or 0)
        yield Sentence(
            f"No group's outputs are off by more than {percent(TOO_MUCH)}; the worst is "
            f"{worst.worst} with {percent(worst.error or 0)}.", "good",
        )  # fmt: skip
        return
    named = ", ".join(f"{g.worst} ({percent(g.error or 0)})" for g in wrong[:SHOWN])
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    excluded = " ".join(f"--exclude {quote(group.first)}" for group in wrong[:SHOWN])
    yield Sentence(
        f"{len(wrong)} of {len(measured)} measured groups are off by more than "
        f"{percent(TOO_MUCH)}: {named}{more}. Expect a bad result: take another algorithm "
        f"(`--algorithm best`), a budget (`--max-ppl-increase 1%`), or leave them float "
        f"(`{excluded}`).", "bad",
    )  # fmt: skip


def _why_unmeasured(facts: Facts) -> str:
    record = entry(facts.record, "record")
    start = "How far the outputs of each group are off is not recorded: "
    if not record:
        return f"{start}others made this checkpoint. `ms-quant eval` measures what it costs."
    if not record.get("calibration"):
        return (
            f"{start}it was quantized from its weights alone. Quantize with `--calib text.jsonl` "
            "to have it measured, or run `ms-quant eval`."
        )
    return (
        f"{start}an earlier version of ms-quant made this checkpoint. Quantize again to have it "
        "measured, or run `ms-quant eval`."
    )


def _siblings(facts: Facts) -> Iterator[Sentence]:
    """Groups far worse than others of their kind."""
    kinds: dict[str, list[Group]] = defaultdict(list)
    for group in facts.groups:
        if group.error is not None:
            kinds[group.kind].append(group)
    for kind, groups in kinds.items():
        usual = median(group.error or 0 for group in groups)
        worst = max(groups, key=lambda group: group.error or 0)
        error = worst.error or 0
        if len(groups) > ENOUGH and error > max(FAR * usual, LARGE):
            yield Sentence(
                f"{worst.worst} is far worse than other {kind}: off by {percent(error)}, and "
                f"{percent(usual)} is the median of {len(groups)} blocks. Leave it float "
                f"(`--exclude {quote(worst.first)}`) or give it a finer scheme in a recipe.", "bad",
            )  # fmt: skip


def _recorded(facts: Facts) -> Iterator[Sentence]:
    """What the record says of experts and of float16."""
    where = f"{facts.place}/ms_quant.json"
    try:
        for line in expert_lines(facts.record, where):
            yield Sentence(f"{line[0].upper()}{line[1:]}.", "bad" if "no token" in line else "")
        if entry(facts.record, "record").get("dtype") == "float16":
            for line in float16_facts(facts.record, where).get("float16_warnings", ()):
                yield Sentence(f"{line}.", "bad")
    except MsQuantError as error:
        yield Sentence(f"{error}.", "bad")
