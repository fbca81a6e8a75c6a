"""ARC, easy and challenge: science questions with three to five choices. Prompts are those of
lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ms_quant.errors import BadFileError, short
from ms_quant.tasks.reading import Row, first_file, json_rows, parquet_rows, require_directory
from ms_quant.tasks.records import Data, Question, Subject
from ms_quant.tasks.single import read_single


def _published(row: Row) -> tuple[str, list[Row]]:
    """Question and choices of the files that its authors published."""
    asked = row.values["question"]
    choices = asked.get("choices")
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise BadFileError(
            f"{row.where}: question.choices is {short(choices)}, expected objects with text and "
            "label"
        )
    return Row(asked, row.where).text("stem"), [Row(one, row.where) for one in choices]


def _mirrored(row: Row) -> tuple[str, list[Row]]:
    """The same of the Parquet files of its mirror, or of its records as JSON."""
    choices = row.values.get("choices")
    if not isinstance(choices, dict):
        raise BadFileError(f"{row.where}: choices is {short(choices)}, expected text and label")
    both = Row(choices, row.where)
    texts, labels = both.texts("text"), both.texts("label")
    if len(texts) != len(labels):
        raise BadFileError(
            f"{row.where}: choices has {len(labels)} labels, expected {len(texts)}, one a text"
        )
    pairs = zip(texts, labels, strict=True)
    return row.text("question"), [Row({"text": t, "label": n}, row.where) for t, n in pairs]


def _question(number: int, row: Row) -> Question:
    published = isinstance(row.values.get("question"), dict)
    asked, choices = (_published if published else _mirrored)(row)
    labels = [choice.text("label") for choice in choices]
    texts = Row({"choices": [choice.text("text") for choice in choices]}, row.where)
    answer = row.text("answerKey")
    if answer not in labels:
        raise BadFileError(
            f"{row.where}: answerKey is {short(answer)}, expected one of {', '.join(labels)}"
        )
    text = f"Question: {asked}\nAnswer:"
    return Question(number, text, texts.texts("choices"), labels.index(answer))


def _questions(path: Path) -> Iterator[Question]:
    columns = "question", "choices", "answerKey"
    parquet = path.suffix == ".parquet"
    rows = parquet_rows(path, columns) if parquet else json_rows(path, columns)
    for number, row in enumerate(rows):
        yield _question(number, row)


def read(part: str, data: Data) -> list[Subject]:
    """All of ``"Challenge"`` or ``"Easy"``.

    Raises:
        MsQuantError: a file is missing or malformed.
    """
    name = f"ARC-{part}"
    require_directory(data.directory, name)
    places = "", f"{name}/", f"ARC-V1-Feb2018-2/{name}/"

    def patterns(split: str) -> list[str]:
        published = [f"{place}{name}-{split}.jsonl" for place in places]
        return [*published, f"{name}/{split.lower()}-*.parquet"]

    file = first_file(data.directory, patterns("Test"), f"questions of {name}")
    return read_single(name, data, file, patterns("Train"), _questions)
