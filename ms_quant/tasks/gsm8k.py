"""GSM8K: school mathematics with an answer in text. Prompts, and the two ways to read a number out
of what a model writes, are those of lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ms_quant.tasks.reading import first_file, json_rows, parquet_rows, require_directory
from ms_quant.tasks.records import Data, Exact, Question, Subject
from ms_quant.tasks.single import read_single

COLUMNS = "question", "answer"
INVALID = "[invalid]"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))


def strict(text: str) -> str:
    """The number after the first ``####``."""
    found = _STRICT.findall(text)
    return found[0].strip() if found else INVALID


def flexible(text: str) -> str:
    """The last number."""
    found = _NUMBER.findall(text)
    return next(part for part in found[-1] if part).strip() if found else INVALID


def plain(text: str) -> str:
    """A number as it is compared, of that or of a whole answer."""
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


READINGS: dict[str, Callable[[str], str]] = {
    "exact_match": strict,
    "exact_match_flexible": flexible,
}
EXACT = Exact(("Question:", "</s>", "<|im_end|>"), 256, READINGS, plain)


def _questions(path: Path) -> Iterator[Question]:
    parquet = path.suffix == ".parquet"
    rows = parquet_rows(path, COLUMNS) if parquet else json_rows(path, COLUMNS)
    for number, row in enumerate(rows):
        text = f"Question: {row.text('question')}\nAnswer:"
        yield Question(number, text, (), row.text("answer"))


def _patterns(split: str) -> tuple[str, ...]:
    return f"{split}.jsonl", f"main/{split}-*.parquet"


def read(data: Data) -> list[Subject]:
    """All of it.

    Raises:
        MsQuantError: a file is missing or malformed.
    """
    require_directory(data.directory, "GSM8K")
    file = first_file(data.directory, _patterns("test"), "questions of GSM8K")
    return read_single("gsm8k", data, file, _patterns("train"), _questions)
