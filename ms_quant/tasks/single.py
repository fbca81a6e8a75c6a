"""Data sets without subjects: one file of questions, and one of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ms_quant.errors import BadArgumentError
from ms_quant.tasks.reading import first_file
from ms_quant.tasks.records import Data, Question, Subject


def read_single(
    name: str,
    data: Data,
    questions: Path,
    examples: Sequence[str],
    read: Callable[[Path], Iterable[Question]],
    expected: str = "",
) -> list[Subject]:
    """The questions of a file as one subject.

    Args:
        name: of the task.
        data: what is asked for.
        questions: the file.
        examples: patterns of the file of examples, in the directory of the data.
        read: reads either file.
        expected: which examples are meant, for errors.

    Raises:
        MsQuantError: a file is missing or malformed, or subjects are asked for.
    """
    if data.subjects is not None:
        raise BadArgumentError(f"--subjects: {name} has no subjects, expected none")
    what = expected or f"examples for --shots {data.shots} of {name}"
    shown = first_file(data.directory, examples, what) if data.shots else questions
    return [
        Subject(
            name,
            "",
            "",
            list(read(questions))[: data.limit],
            list(read(shown)) if data.shots else [],
            str(questions),
            str(shown),
        )
    ]
