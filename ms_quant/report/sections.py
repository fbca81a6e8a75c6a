"""The sections of a report that every checkpoint has: groups, sizes, errors, how it was made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ms_quant.pipeline.siblings import percent
from ms_quant.pipeline.warnings import TOO_MUCH
from ms_quant.report.charts import bars, heat, size
from ms_quant.report.parts import Cell, paragraph, section, table
from ms_quant.report.recorded import chosen_text, entry, pair
from ms_quant.report.records import Facts, FloatWeights, Group
from ms_quant.report.results import Results

MOST_ROWS = 3000
MOST_BLOCKS = 256
MOST_KINDS = 24
_SHOWN = ("scheme", "algorithm", "format", "dtype", "kv_cache", "recipe", "calibration",
          "environment", "scheme_options", "algorithm_options", "exclude", "source_format",
          "target", "tp", "sparsity", "pruning", "run_dtype")  # fmt: skip


def overview(facts: Facts, results: Results, against: FloatWeights | None) -> list[tuple[str, str]]:
    """The numbers that people ask for first."""
    found = []
    if facts.finished is not None:
        of = "" if facts.blocks is None else f" of {facts.blocks}"
        found.append(("blocks finished", f"{facts.finished}{of}"))
    if facts.output_bytes is not None:
        found.append(("bytes of tensors", size(facts.output_bytes)))
    source = against.bytes if against is not None else facts.source_bytes
    if source:
        found.append(("float model", size(source)))
    bits = bits_per_weight([group for group in facts.groups if group.quantized])
    if bits:
        found.append(("bits a quantized weight, scales included", f"{bits:.2f}"))
    perplexity = next(iter(results.perplexity), None)
    if perplexity is not None:
        found.append(("perplexity", f"{perplexity['perplexity']:.4g}"))
    for one in results.tasks[:3]:
        found.append((f"accuracy, {one['task']}", f"{100 * one['accuracy']:.2f} %"))
    errors = [group.error for group in facts.groups if group.error is not None]
    if errors:
        found.append(("largest error of a group's outputs", percent(max(errors))))
    return found


def bits_per_weight(groups: list[Group]) -> float:
    """Stored bits of a weight, of groups whose bytes are known."""
    known = [group for group in groups if group.bytes is not None]
    weights = sum(group.weights for group in known)
    return 8 * sum(group.bytes or 0 for group in known) / weights if weights else 0.0


def kinds_section(facts: Facts, against: FloatWeights | None) -> Markup:
    """What became what: groups of a kind together."""
    together: dict[tuple[str, str, str], list[Group]] = defaultdict(list)
    for group in facts.groups:
        together[group.kind, group.scheme, group.algorithm].append(group)
    rows = []
    for (kind, scheme, algorithm), groups in list(together.items())[:MOST_ROWS]:
        errors = [group.error for group in groups if group.error is not None]
        stored = sum(group.bytes or 0 for group in groups)
        bits = bits_per_weight(groups)
        rows.append([
            Cell(kind),
            Cell(scheme),
            Cell(algorithm or ("-" if scheme == "FLOAT" else "not recorded")),
            *_count(sum(group.count for group in groups)),
            *_count(sum(group.weights for group in groups)),
            Cell(size(stored), stored) if stored else Cell("", ""),
            Cell(f"{bits:.2f}", bits) if bits else Cell("", ""),
            Cell(percent(max(errors)), max(errors)) if errors else Cell("not measured", ""),
        ])  # fmt: skip
    heads = ("group", "scheme", "algorithm", "groups", "weights", "stored", "bits a weight",
             "worst error")  # fmt: skip
    if not rows:
        return section("What became what", paragraph("No block is finished yet."))
    return section(
        "What became what",
        table(heads, rows, name="kinds", text_columns=3),
        _sizes(facts, against),
    )


def _count(count: int) -> list[Cell]:
    return [Cell(f"{count:,}", count) if count else Cell("", "")]


def _sizes(facts: Facts, against: FloatWeights | None) -> Markup:
    source = against.bytes if against is not None else facts.source_bytes
    if facts.output_bytes is None:
        return Markup("")
    kinds: dict[str, int] = defaultdict(int)
    for group in facts.groups:
        kinds[group.kind] += group.bytes or 0
    largest = sorted(kinds.items(), key=lambda one: -one[1])
    rest = sum(count for _, count in largest[MOST_KINDS:])
    rows: list[tuple[str, list[float]]] = [("float model", [source])] if source else []
    rows.append(("this checkpoint", [facts.output_bytes]))
    rows += [(name, [count]) for name, count in largest[:MOST_KINDS] if count]
    rows += [("other groups", [rest])] if rest else []
    rows.append(("embedding, head, norms and the rest", [facts.float_bytes]))
    return bars("Bytes stored: the whole, then its parts", rows, ["stored"])


def error_section(facts: Facts) -> Markup:
    """Errors of groups, blocks by kinds."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for group in facts.groups:
        if group.error is not None and group.block is not None:
            known = found[group.block].get(group.kind, 0.0)
            found[group.block][group.kind] = max(known, group.error)
    if not found:
        return Markup("")
    kinds = list(dict.fromkeys(kind for block in found.values() for kind in block))[:MOST_KINDS]
    blocks = sorted(found)
    step = -(-len(blocks) // MOST_BLOCKS)
    rows = []
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        name = f"block {part[0]}" if len(part) == 1 else f"blocks {part[0]} to {part[-1]}"
        worst = [max((found[b][k] for b in part if k in found[b]), default=None) for k in kinds]
        rows.append((name, worst))
    return section(
        "Error of each group",
        paragraph(
            "How far the outputs of a group are from the float ones: squared error over squared "
            "output, in the mean over calibration tokens. Groups beyond "
            f"{percent(TOO_MUCH)} cost noticeably."
        ),
        heat("Error by block and group; the colour is logarithmic", kinds, rows),
    )


def groups_section(facts: Facts) -> Markup:
    """A row for each group, the worst first; sorted and filtered in the page."""
    ranked = sorted(facts.groups, key=lambda g: 1.0 if g.error is None else -g.error)
    shown = ranked[:MOST_ROWS]
    measured = any(group.error is not None for group in shown)
    sized = any(group.weights for group in shown)
    rows = [_row(group, sized) for group in shown]
    heads = ["group", "scheme", "chosen", "error", "input", "smoothed"]
    heads += ["weights", "bits a weight"] if sized else []
    more = (
        f" The {MOST_ROWS:,} first of {len(ranked):,} are here." if len(ranked) > MOST_ROWS else ""
    )
    said = "The worst first." if measured else "In the order of the model."
    return section(
        "Every group",
        paragraph(
            f"{said} The head of a column sorts by it. Experts of a block are one row, with the "
            f"error of the worst.{more}"
        ),
        table(heads, rows, name="groups", text_columns=3,
              bad=[(group.error or 0) > TOO_MUCH for group in shown]),
    )  # fmt: skip


def _row(group: Group, sized: bool) -> list[Cell]:
    scheme = f"{group.scheme} {group.algorithm}".strip()
    before, after = pair(group.input.get("before")), pair(group.input.get("after"))
    bits = bits_per_weight([group])
    name = group.path if group.count == 1 else f"{group.path} ({group.count} groups)"
    cells = [
        Cell(name),
        Cell(scheme),
        Cell(chosen_text(group.chosen, group.algorithm)),
        Cell("not measured", "")
        if group.error is None
        else Cell(percent(group.error), group.error),
        Cell("", "") if before is None else Cell(f"{before[0]:,.4g}", before[0]),
        Cell("", "") if after is None else Cell(f"{after[0]:,.4g}", after[0]),
    ]
    if sized:
        cells += [*_count(group.weights), Cell(f"{bits:.2f}", bits) if bits else Cell("", "")]
    return cells


def record_section(facts: Facts) -> Markup:
    """What it was made with, as its record says."""
    record = entry(facts.record, "record")
    if not record:
        text = "Others made this checkpoint: it has no ms_quant.json, which would say how."
        return section("How it was made", paragraph(text))
    rows = [
        [Cell(key.replace("_", " ")), Cell(_flat(record[key]))] for key in _SHOWN if record.get(key)
    ]
    return section("How it was made", table(("what", "value"), rows, text_columns=2))


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(part)}" for key, part in list(value.items())[:20])
    if isinstance(value, list):
        return ", ".join(map(str, value[:20]))
    return str(value)
