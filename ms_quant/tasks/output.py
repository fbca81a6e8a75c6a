"""Every question's answer as a line of JSON, to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ms_quant.errors import BadArgumentError
from ms_quant.tasks.records import Answer
from ms_quant.tasks.result import TaskResult


def answer_lines(found: TaskResult) -> bytes:
    """A line for each question: what was asked, the right answer, what the model chose and its
    log-likelihood of each choice; the same of another model, where there is one."""
    lines = (json.dumps(one, ensure_ascii=False, allow_nan=False) for one in _records(found))
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def _records(found: TaskResult) -> Iterator[dict[str, Any]]:
    others = iter(found.pairing.against.answers) if found.pairing else None
    answers = iter(found.answers)
    for subject in found.subjects:
        for question in subject.questions:
            record = {
                "subject": subject.name,
                "number": question.number,
                "question": question.text,
                "choices": list(question.choices),
                "answer": question.answer,
                **_shown(next(answers)),
            }
            if others is not None:
                record["against"] = _shown(next(others))
            yield record


def _shown(answer: Answer) -> dict[str, Any]:
    made = {"scores": list(answer.scores)} if answer.scores else {"text": answer.text}
    return {"chosen": dict(answer.chosen), "right": dict(answer.right), **made}


def require_writable(path: Path) -> None:
    """Refuses a file that could not be written, before the long work.

    Raises:
        MsQuantError: it is a directory, or there is none for it.
    """
    if path.is_dir():
        raise BadArgumentError(f"--output {path}: is a directory, expected a file")
    if not path.parent.is_dir():
        raise BadArgumentError(
            f"--output {path}: {path.parent} is not a directory, expected one that is there"
        )
