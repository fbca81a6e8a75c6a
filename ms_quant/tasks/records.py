"""What a task is made of, and what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Sampler = Literal["first", "random", "random others"]
"""How examples are drawn: the first ones, or others for each question by a seed. "random others"
draws one more than it needs, as lm-evaluation-harness does where a question may be among them."""

DELIMITER = " "  # between a question and its answer
BETWEEN = "\n\n"  # examples


@dataclass(frozen=True)
class Question:
    """One question of a data set.

    Attributes:
        number: where it stands in its file, from 0.
        text: what stands before the answer.
        choices: the answers to choose from; none where the answer is text.
        answer: which choice is right, or the text.
    """

    number: int
    text: str
    choices: tuple[str, ...]
    answer: int | str

    @property
    def answer_text(self) -> str:
        """The right answer as an example shows it."""
        return self.answer if isinstance(self.answer, str) else self.choices[self.answer]


@dataclass(frozen=True)
class Subject:
    """A part of a task with examples of its own.

    Attributes:
        name: its name.
        category: what its benchmark counts it to; "" where there are no categories.
        description: what every prompt begins with.
        questions: all of them.
        examples: what few-shot examples are drawn from.
        source: the file of the questions, for errors.
        examples_source: the file of the examples, there or not.
    """

    name: str
    category: str
    description: str
    questions: Sequence[Question]
    examples: Sequence[Question]
    source: str
    examples_source: str


@dataclass(frozen=True)
class Exact:
    """How an answer in text is made and compared.

    Attributes:
        stops: texts that end it.
        max_tokens: at most so many are made.
        readings: what reads the answer out of a text, by metric.
        plain: how what was read, and the right answer, are compared.
    """

    stops: tuple[str, ...]
    max_tokens: int
    readings: Mapping[str, Callable[[str], str]]
    plain: Callable[[str], str]


@dataclass(frozen=True)
class Data:
    """Which part of a data set is read.

    Attributes:
        directory: where it is; a file of a task of one's own.
        subjects: names of the subjects; None is all.
        shots: examples before each question; those in the files may be fewer.
        limit: questions of each subject; None is all.
    """

    directory: Path
    subjects: tuple[str, ...] | None
    shots: int
    limit: int | None


@dataclass(frozen=True)
class Task:
    """A benchmark: its files, its prompts and what is quoted of it.

    Attributes:
        name: what ``--task`` calls it.
        harness: the task of lm-evaluation-harness whose prompts these are; "" is none.
        shots: examples before each question where nobody says how many.
        sampler: how they are drawn.
        quoted: the metric that people quote.
        macro: whether the mean over subjects is quoted, not that over questions.
        read: the subjects of a data set.
        exact: how text is made and compared, of a task without choices.
    """

    name: str
    harness: str
    shots: int
    sampler: Sampler
    quoted: str
    macro: bool
    read: Callable[[Data], list[Subject]]
    exact: Exact | None = None


@dataclass(frozen=True)
class Answer:
    """What a model answers to a question.

    Attributes:
        subject: the subject of the question.
        number: where the question stands in its file.
        right: whether the answer is, by metric.
        chosen: the answer by metric: which choice, or what was read out of the text.
        scores: log-likelihood of each choice, natural logarithm; none of a text.
        text: the text that the model went on with; "" where it chose.
    """

    subject: str
    number: int
    right: Mapping[str, bool]
    chosen: Mapping[str, int | str]
    scores: tuple[float, ...] = ()
    text: str = ""
