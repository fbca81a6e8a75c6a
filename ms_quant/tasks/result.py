"""How many answers are right: for each subject, for each category, in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ms_quant.tasks.records import Answer, Subject, Task

if TYPE_CHECKING:
    from ms_quant.tasks.paired import Pairing


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Attributes:
        value: the share, 0 to 1.
        error: its standard error; None where there are too few questions for one.
        questions: how many there are.
    """

    value: float
    error: float | None
    questions: int

    @classmethod
    def of(cls, right: Sequence[bool]) -> Accuracy:
        """Of the answers to some questions."""
        count = len(right)
        value = sum(right) / count
        error = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None
        return cls(value, error, count)

    @classmethod
    def of_questions(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """Of the questions of all parts: the error is that of the spread within the parts, as
        lm-evaluation-harness pools it."""
        count = sum(part.questions for part in parts)
        value = sum(part.value * part.questions for part in parts) / count
        known = [part for part in parts if part.error is not None]
        if len(known) < len(parts) or count == len(parts):
            return cls(value, None, count)
        spread = sum((p.questions - 1) * p.questions * (p.error or 0) ** 2 for p in known)
        return cls(value, math.sqrt(spread / (count - len(parts)) / count), count)

    @classmethod
    def of_parts(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """The mean over parts, however many questions each has."""
        errors = [part.error for part in parts if part.error is not None]
        error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
        value = math.fsum(part.value for part in parts) / len(parts)
        return cls(value, error, sum(part.questions for part in parts))

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {"value": self.value, "error": self.error, "questions": self.questions}


@dataclass(frozen=True)
class TaskResult:
    """What a model makes of a task.

    Attributes:
        task: the task.
        shots: examples before each question.
        subjects: what was asked.
        answers: what the model answered to each question, subject by subject.
        cut: to how many questions the prompt lost its beginning, as it is longer than the model
            was made for.
        seconds: what it took.
        pairing: how another model's answers differ, where there is another.
    """

    task: Task
    shots: int
    subjects: tuple[Subject, ...]
    answers: tuple[Answer, ...]
    cut: int
    seconds: float
    pairing: Pairing | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, that which people quote first."""
        found = [name for name in self.answers[0].right if name != self.task.quoted]
        letters = all(len(choice) == 1 for s in self.subjects for choice in s.questions[0].choices)
        # Of choices of one character both are the same.
        return self.task.quoted, *(name for name in found if name != "acc_norm" or not letters)

    @property
    def accuracy(self) -> float:
        """What people quote of it, 0 to 1."""
        return self.total(self.task.quoted)[self.quoted].value

    @property
    def quoted(self) -> str:
        """Which mean people quote: ``"subjects"`` or ``"questions"``."""
        return "subjects" if self.task.macro else "questions"

    def of_subject(self, name: str, metric: str) -> Accuracy:
        """Of the questions of one subject."""
        return Accuracy.of([a.right[metric] for a in self.answers if a.subject == name])

    def total(self, metric: str, category: str | None = None) -> dict[str, Accuracy]:
        """The mean over questions and that over subjects.

        Args:
            metric: the metric.
            category: of the subjects of this one; None is of all.
        """
        right: dict[str, list[bool]] = {}
        for answer in self.answers:
            right.setdefault(answer.subject, []).append(answer.right[metric])
        parts = [
            Accuracy.of(right[subject.name])
            for subject in self.subjects
            if category in (None, subject.category)
        ]
        return {"questions": Accuracy.of_questions(parts), "subjects": Accuracy.of_parts(parts)}

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of its subjects, in order; none where there are no categories."""
        return tuple(dict.fromkeys(s.category for s in self.subjects if s.category))

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        metric = self.task.quoted
        return {
            "task": self.task.name,
            "harness": self.task.harness,
            "shots": self.shots,
            "metric": metric,
            "quoted": self.quoted,
            "accuracy": self.accuracy,
            "totals": {name: _shown(self.total(name)) for name in self.metrics},
            "categories": {name: _shown(self.total(metric, name)) for name in self.categories},
            "subjects": {
                subject.name: self.of_subject(subject.name, metric).as_json()
                for subject in self.subjects
            },
            "cut": self.cut,
            "seconds": self.seconds,
            **(self.pairing.as_json() if self.pairing else {}),
        }


def _shown(means: Mapping[str, Accuracy]) -> dict[str, Any]:
    return {name: found.as_json() for name, found in means.items()}
