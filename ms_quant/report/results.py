"""What other commands measured, from the JSON that they printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.report.attention import is_heat_map
from ms_quant.report.parts import Cell, Sentence, joined, section, table
from ms_quant.report.recorded import entry, number

MAX_BYTES = 64 << 20
SUFFIXES = {"": "as it is served", "_decode": "in decode", "_float16": "in float16"}
NOT_MEASURED = (
    "Perplexity is not measured: run `ms-quant eval {} --text heldout.txt --against FLOAT --json > "
    "eval.json` and give `--results eval.json`, or give `--text heldout.txt` here."
)
NO_TASKS = (
    "Tasks are not measured: run `ms-quant eval {} --task ceval --data DIR --json > ceval.json` "
    "and give `--results ceval.json`."
)


@dataclass
class Results:
    """Attributes:
    perplexity: results of ``eval --text``.
    tasks: results of ``eval --task``.
    attention: rows of ``attention_summary``.
    maps: of its heads or of those of ``analyze_attention``.
    """

    perplexity: list[Mapping[str, Any]] = field(default_factory=list)
    tasks: list[Mapping[str, Any]] = field(default_factory=list)
    attention: list[Mapping[str, Any]] = field(default_factory=list)
    maps: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, result: Mapping[str, Any]) -> bool:
        """Takes a result; False where it is none of those."""
        known = False
        if number(result.get("perplexity")) is not None:
            self.perplexity.append(result)
            known = True
        tasks = result.get("tasks")
        listed = tasks if isinstance(tasks, list) else [result]
        of_tasks = [one for one in listed if isinstance(one, Mapping) and _is_task(one)]
        self.tasks += [{"checkpoint": result.get("checkpoint"), **one} for one in of_tasks]
        rows = result.get("attention")
        if isinstance(rows, list):
            self.attention += [entry(row) for row in rows]
            known = True
        for found in (result, result.get("heat_map")):
            if is_heat_map(found):
                self.maps.append(entry(found))
                known = True
        return known or bool(of_tasks)


def _is_task(result: Mapping[str, Any]) -> bool:
    return isinstance(result.get("task"), str) and number(result.get("accuracy")) is not None


def read_results(paths: Sequence[Path]) -> Results:
    """Reads files of results.

    Raises:
        MsQuantError: one is not there, is no JSON, or holds none of them.
    """
    results = Results()
    for path in paths:
        if not path.is_file():
            raise BadFileError(
                f"--results {path}: no such file, expected what ms-quant eval --json printed"
            )
        if not results.add(read_json(path, MAX_BYTES)):
            raise BadFileError(
                f"--results {path}: has neither a perplexity, nor a task with its accuracy, nor "
                "attention, expected what ms-quant eval --json printed"
            )
    return results


def result_sentences(results: Results, place: str) -> Iterator[Sentence]:
    """What the summary says of them."""
    for one in results.perplexity:
        increase, verdict = number(one.get("perplexity_increase")), one.get("verdict")
        if increase is not None:
            kind = "bad" if increase > 0.02 else "good"
            said = f", {verdict}" if isinstance(verdict, str) else ""
            yield Sentence(f"Perplexity {_change(one)} against the float model{said}.", kind)
    for one in results.tasks:
        lost = number(one.get("difference"))
        if lost is not None:
            p = number(one.get("p_value"))
            real = p is not None and p < 0.05
            sure = "" if p is None else f" (p = {p:.2g}, {'real' if real else 'within noise'})"
            kind = "bad" if real and lost < 0 else "good"
            yield Sentence(f"{one['task']}: accuracy {100 * lost:+.2f} points{sure}.", kind)
    if not results.perplexity:
        yield Sentence(NOT_MEASURED.format(place), "todo")
    if not results.tasks:
        yield Sentence(NO_TASKS.format(place), "todo")


def _change(one: Mapping[str, Any], suffix: str = "") -> str:
    increase = number(one.get(f"perplexity_increase{suffix}"))
    error = number(one.get(f"perplexity_increase_error{suffix}"))
    if increase is None:
        return "not compared"
    return f"{100 * increase:+.2f} %" + ("" if error is None else f" ± {100 * error:.2f} %")


def result_sections(results: Results) -> Markup:
    """Tables of what was measured."""
    return joined(
        part
        for part in (
            section("Perplexity", _perplexity(results.perplexity)),
            section("Tasks", _tasks(results.tasks), *starmap(_subjects, enumerate(results.tasks))),
        )
        if part
    )


def _perplexity(found: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            Cell(str(one.get("checkpoint", ""))),
            Cell(words),
            Cell(f"{number(one.get(f'perplexity{suffix}')):.4f}"),
            Cell(_number(one.get("against_perplexity"), "not compared")),
            Cell(_change(one, suffix)),
            Cell(_number(one.get("tokens"), "", ",.0f")),
        ]
        for one in found
        for suffix, words in SUFFIXES.items()
        if number(one.get(f"perplexity{suffix}")) is not None
    ]
    heads = ("checkpoint", "computed", "perplexity", "float model", "change", "tokens")
    return table(heads, rows, text_columns=2) if rows else Markup("")


def _tasks(found: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            Cell(str(one["task"])),
            Cell(str(one.get("checkpoint") or "")),
            Cell(f"{100 * float(one['accuracy']):.2f} %"),
            Cell(_number(one.get("against_accuracy"), "not compared", ".2%")),
            Cell(_number(one.get("changed_answers"), "", ".2%")),
            Cell(_number(one.get("p_value"), "", ".2g")),
            Cell(_number(one.get("shots"), "", ".0f")),
        ]
        for one in found
    ]
    heads = ("task", "checkpoint", "accuracy", "float model", "changed answers", "p value", "shots")
    return table(heads, rows, text_columns=2) if rows else Markup("")


def _subjects(number_of: int, one: Mapping[str, Any]) -> Markup:
    subjects = entry(one, "subjects")
    if len(subjects) < 2:
        return Markup("")
    rows = [
        [
            Cell(name),
            Cell(_number(value, "", ".1%"), value if value is not None else ""),
            Cell(_number(entry(facts).get("error"), "", ".1%")),
            Cell(_number(entry(facts).get("questions"), "", ",.0f")),
        ]
        for name, facts in subjects.items()
        for value in [number(entry(facts).get("value"))]
    ]
    name = f"subjects-{number_of}"
    heads = ("subject", "accuracy", "standard error", "questions")
    return Markup("<h3>{}</h3>").format(str(one["task"])) + table(heads, rows, name=name)


def _number(value: Any, missing: str, form: str = ".4f") -> str:
    found = number(value)
    text = missing if found is None else format(found, form)
    return text.replace("%", " %")
