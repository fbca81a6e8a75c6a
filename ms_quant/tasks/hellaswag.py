"""HellaSwag: which of four endings goes on. Prompts are those of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ms_quant.tasks.reading import Row, first_file, json_rows, parquet_rows, require_directory
from ms_quant.tasks.records import Data, Question, Subject
from ms_quant.tasks.single import read_single

COLUMNS = "activity_label", "ctx_a", "ctx_b", "endings", "label"
QUESTIONS = "hellaswag_val.jsonl", "data/validation-*.parquet", "validation-*.parquet"
EXAMPLES = "hellaswag_train.jsonl", "data/train-*.parquet", "train-*.parquet"


def cleaned(text: str) -> str:
    """A text without what WikiHow left in it."""
    return _without_brackets(text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _without_brackets(text: str) -> str:
    """A text without what matches ``\\[.*?\\]``, in linear time whatever it is."""
    parts, at = [], 0
    while (opened := text.find("[", at)) >= 0 and (closed := text.find("]", opened)) >= 0:
        newline = text.find("\n", opened, closed)
        parts.append(text[at : opened if newline < 0 else newline])
        at = closed + 1 if newline < 0 else newline
    return "".join([*parts, text[at:]])


def _question(number: int, row: Row) -> Question:
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    endings = tuple(map(cleaned, row.texts("endings")))
    text = cleaned(f"{row.text('activity_label')}: {context}")
    return Question(number, text, endings, row.index("label", len(endings)))


def _questions(path: Path) -> Iterator[Question]:
    parquet = path.suffix == ".parquet"
    rows = parquet_rows(path, COLUMNS) if parquet else json_rows(path, COLUMNS)
    for number, row in enumerate(rows):
        yield _question(number, row)


def read(data: Data) -> list[Subject]:
    """All of it.

    Raises:
        MsQuantError: a file is missing or malformed.
    """
    require_directory(data.directory, "HellaSwag")
    file = first_file(data.directory, QUESTIONS, "questions of HellaSwag")
    return read_single("hellaswag", data, file, EXAMPLES, _questions)
