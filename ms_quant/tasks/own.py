"""A task of one's own: a file of JSON lines with a prompt, maybe choices, and an answer each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ms_quant.errors import BadFileError
from ms_quant.tasks.letters import chosen
from ms_quant.tasks.reading import Row, first_file, json_rows
from ms_quant.tasks.records import Data, Exact, Question, Subject

KEYS = "prompt", "choices", "answer", "subject"
EXACT = Exact(("\n",), 256, {"exact_match": str.strip}, str.strip)


def _question(number: int, row: Row, with_choices: bool) -> tuple[str, Question]:
    subject = row.text("subject") if "subject" in row.values else ""
    text = row.text("prompt")
    if not with_choices:
        if "choices" in row.values:
            raise BadFileError(f"{row.where}: has choices, expected none as in line 1")
        return subject, Question(number, text, (), row.text("answer"))
    choices, answer = row.texts("choices"), row.values.get("answer")
    if isinstance(answer, str) and answer in choices:
        return subject, Question(number, text, choices, choices.index(answer))
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadFileError(
            f"{row.where}: answer is {answer!r:.80}, expected one of the choices or its number, 0 "
            f"to {len(choices) - 1}"
        )
    return subject, Question(number, text, choices, answer)


def with_choices(path: Path) -> bool:
    """Whether the questions of a file have choices: its first one says so.

    Raises:
        MsQuantError: there is none.
    """
    for row in json_rows(path, KEYS):
        return "choices" in row.values
    raise BadFileError(f"{path}: is empty, expected objects with {', '.join(KEYS)}")


def _questions(path: Path, choose: bool) -> Iterator[tuple[str, Question]]:
    for number, row in enumerate(json_rows(path, KEYS)):
        yield _question(number, row, choose)


def read(data: Data) -> list[Subject]:
    """The subjects of a file, in the order of their first questions. Examples are those of
    ``NAME.dev.jsonl`` beside it, of the same subject.

    Raises:
        MsQuantError: a file is missing or malformed, or a subject is unknown.
    """
    path, choose = data.directory, with_choices(data.directory)
    shown = path.with_name(f"{path.stem}.dev{path.suffix}")
    groups: dict[str, list[Question]] = {}
    for subject, question in _questions(path, choose):
        groups.setdefault(subject or path.stem, []).append(question)
    examples: dict[str, list[Question]] = {}
    if data.shots:
        file = first_file(path.parent, (shown.name,), f"examples for --shots {data.shots}")
        for subject, question in _questions(file, choose):
            examples.setdefault(subject or path.stem, []).append(question)
    return [
        Subject(
            name, "", "", groups[name][: data.limit], examples.get(name, []), str(path), str(shown)
        )
        for name in chosen(data.subjects, list(groups), path)
    ]
