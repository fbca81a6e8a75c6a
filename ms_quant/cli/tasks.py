"""``ms-quant eval --task``: how many questions of a task a checkpoint answers right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ms_quant.cli.console import emit, note, show_fields, step_progress
from ms_quant.cli.running import naming, opened, require_another, with_error

if TYPE_CHECKING:
    from ms_quant.tasks.result import Accuracy, TaskResult

ROWS = 20  # of subjects that are shown where there are no categories


@dataclass(frozen=True)
class Question:
    """What is asked, as the options say it.

    Attributes:
        task: name or file.
        data: directory of its files.
        shots: examples before each question.
        subjects: only these.
        limit: questions of each subject.
    """

    task: str
    data: Path | None
    shots: int | None
    subjects: tuple[str, ...] | None
    limit: int | None


def run(
    checkpoint: Path,
    asked: Question,
    kv_cache: str | None,
    against: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Asks and prints."""
    from ms_quant.files.atomic import write_bytes
    from ms_quant.formats.inspection import cache_name
    from ms_quant.tasks.output import answer_lines, require_writable
    from ms_quant.tasks.run import evaluate_task

    if against is not None and kv_cache is None:
        require_another(checkpoint, against)
    if output is not None:
        require_writable(output)
    model = opened(checkpoint)
    other_format = None
    if against is not None:
        with naming(f"--against {against}"):
            other_format = opened(against).format
    with step_progress() as progress:
        found = evaluate_task(
            checkpoint,
            asked.task,
            asked.data,
            progress,
            against=against,
            shots=asked.shots,
            subjects=asked.subjects,
            limit=asked.limit,
            kv_cache=kv_cache,
        )
    if found.cut:
        note(
            f"note: {found.cut} of {len(found.answers)} prompts lost their beginning: the model "
            f"was made for {model.config.max_position} positions (max_position_embeddings)"
        )
    _note_absent(found, asked)
    if output is not None:
        write_bytes(output, answer_lines(found))
    result = {
        "checkpoint": str(checkpoint),
        "format": model.format,
        "kv_cache": kv_cache or cache_name(model),
        **found.as_json(),
    }
    if against is not None:
        result |= {"against": str(against), "against_format": other_format}
    emit(result, as_json, partial(_show, found=found))


def _note_absent(found: TaskResult, asked: Question) -> None:
    from ms_quant.tasks.letters import BENCHMARKS

    benchmark = BENCHMARKS.get(found.task.name)
    if benchmark and asked.subjects is None and len(found.subjects) < len(benchmark.subjects):
        note(
            f"note: {len(found.subjects)} of the {len(benchmark.subjects)} subjects of "
            f"{benchmark.title} are there; what people quote is of all"
        )


def _show(result: Mapping[str, Any], found: TaskResult) -> None:
    """A table by category, then what is quoted and how the answers of another differ."""
    pairing = found.pairing
    shown = {
        "checkpoint": result["checkpoint"],
        "format": result["format"],
        "kv_cache": result["kv_cache"],
        "task": f"{found.task.name}, {found.shots} examples before each question",
    }
    if pairing:
        shown["against"] = result["against"]
    show_fields(shown)
    console = Console()
    console.print(_table(found))
    lines: dict[str, Any] = {}
    for metric in found.metrics:
        for mean, accuracy in found.total(metric).items():
            if mean == "questions" or len(found.subjects) > 1:
                quoted = metric == found.task.quoted and mean == found.quoted
                mark = " (quoted)" if quoted else ""
                lines[f"{metric} over {mean}"] = _percent(accuracy) + mark
    if pairing:
        divergence = with_error(pairing.kl_divergence, pairing.kl_divergence_error, "")
        lines |= {
            "difference": with_error(pairing.difference, pairing.error, "%"),
            "changed answers": f"{100 * pairing.changed:.2f} %: {pairing.lost} right to wrong, "
            f"{pairing.won} wrong to right",
            "McNemar's test": f"p = {pairing.p_value:.3g}",
            "KL divergence": f"{divergence.lstrip('+')} of the next token behind a prompt",
            "top-1 agreement": f"{100 * pairing.top1_agreement:.2f} %",
        }
    lines["seconds"] = found.seconds
    show_fields(lines)


def _table(found: TaskResult) -> Table:
    """A row for each category, or for each of a few subjects, and one for all."""
    metric, pairing = found.task.quoted, found.pairing
    table = Table(box=None)
    table.add_column("", overflow="fold")
    for title in ("subjects", "questions", metric, *(["against"] if pairing else [])):
        table.add_column(title, justify="right")

    def add(name: str, category: str | None, subjects: int) -> None:
        parts = [one.total(metric, category)[found.quoted] for one in results]
        shown = [f"{subjects}", f"{parts[0].questions}", *map(_percent, parts)]
        table.add_row(name, *shown)

    results = [found, *([pairing.against] if pairing else [])]
    for category in found.categories:
        add(category, category, sum(s.category == category for s in found.subjects))
    if not found.categories and 1 < len(found.subjects) <= ROWS:
        for subject in found.subjects:
            each = [one.of_subject(subject.name, metric) for one in results]
            table.add_row(subject.name, "1", f"{each[0].questions}", *map(_percent, each))
    add("all", None, len(found.subjects))
    return table


def _percent(accuracy: Accuracy) -> str:
    value = f"{100 * accuracy.value:.2f} %"
    return value if accuracy.error is None else f"{value} ± {100 * accuracy.error:.2f} %"
