"""One model at work on the questions of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.errors import BadArgumentError
from ms_quant.evaluation.divergence import Agreement, agreement
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.head import head_name
from ms_quant.formats.opening import ServedModel
from ms_quant.progress import PartProgress, silent
from ms_quant.tasks.answering import Writer, chosen, read
from ms_quant.tasks.encoding import PromptEncoder, Request
from ms_quant.tasks.prompts import contexts
from ms_quant.tasks.records import DELIMITER, Answer, Question, Subject, Task
from ms_quant.tasks.scoring import score
from ms_quant.tasks.states import StateFile
from ms_quant.tasks.trees import Group, Rows, grouped


@dataclass(frozen=True)
class Asked:
    """The prompts of a task, as token ids.

    Attributes:
        task: the task.
        subjects: its subjects.
        requests: of each question, subject by subject.
        longest: positions that the model was made for.
    """

    task: Task
    subjects: Sequence[Subject]
    requests: Sequence[Sequence[Request]]
    longest: int

    @classmethod
    def of(
        cls,
        task: Task,
        subjects: Sequence[Subject],
        shots: int,
        words: ModelTokenizer,
        longest: int,
    ) -> Asked:
        """Those of a task.

        Args:
            task: the task.
            subjects: its subjects.
            shots: examples before each question.
            words: the tokenizer.
            longest: positions that the model was made for.

        Raises:
            MsQuantError: there are too few examples, or an answer has no tokens.
        """
        encoder, found = PromptEncoder(words), []
        for subject in subjects:
            prompts = contexts(subject, shots, task.sampler)
            found.append(
                [
                    _request(encoder, task, context, question)
                    for context, question in zip(prompts, subject.questions, strict=True)
                ]
            )
        return cls(task, subjects, found, longest)

    @cached_property
    def questions(self) -> list[tuple[str, Question]]:
        """Every question with the name of its subject, in order."""
        return [(subject.name, one) for subject in self.subjects for one in subject.questions]

    @cached_property
    def rows(self) -> list[list[Rows]]:
        """What is computed of each request."""
        return [[Rows.of(one, self.room) for one in some] for some in self.requests]

    @property
    def room(self) -> int:
        """How many tokens a sequence may have, a prompt where an answer is to come.

        Raises:
            MsQuantError: there is no room for a prompt before an answer.
        """
        answer = self.task.exact.max_tokens if self.task.exact else 0
        if self.longest <= answer:
            raise BadArgumentError(
                f"the model was made for {self.longest} positions (max_position_embeddings), "
                f"expected more than the {answer} of an answer to {self.task.name}"
            )
        return self.longest - answer

    @property
    def cut(self) -> int:
        """How many prompts lost their beginning."""
        return sum(one.cut for some in self.rows for one in some)

    @property
    def most(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for some in self.rows for one in some for ids in one.tokens)

    @property
    def groups(self) -> list[Group]:
        """The requests by subject. Only examples that are the same are worth looking for."""
        found, first = [], 0
        for some in self.rows:
            found.append(grouped(some, first))
            first += len(some)
        return found


def _request(encoder: PromptEncoder, task: Task, context: str, question: Question) -> Request:
    if task.exact:
        return Request(encoder.encode(context), ())
    return encoder.request(context, [DELIMITER + choice for choice in question.choices])


@dataclass(frozen=True, eq=False)
class Found:
    """What a model answers.

    Attributes:
        answers: to each question.
        ends: the last hidden state behind each prompt; None where nobody asked.
    """

    answers: tuple[Answer, ...]
    ends: StateFile | None

    def agrees(self, model: ServedModel, against: Found, other: ServedModel) -> Agreement:
        """How the next token behind each prompt agrees with that of another."""
        assert self.ends is not None
        assert against.ends is not None
        heads = (one.chunks(head_name(one)) for one in (model, other))
        return agreement(next(heads), self.ends, next(heads), against.ends)


def choose(
    model: ServedModel,
    asked: Asked,
    directory: Path,
    kv_cache: str | None = None,
    progress: PartProgress = silent,
) -> Found:
    """The likeliest choices.

    Args:
        model: the checkpoint.
        asked: the prompts.
        directory: for files of hidden states.
        kv_cache: how keys and values are cached; None is as the checkpoint says.
        progress: told how far it is.
    """
    directory.mkdir()
    scores = score(model, asked.groups, directory, progress, kv_cache=kv_cache)
    answers = tuple(
        chosen(
            subject,
            question,
            tuple(scores.likelihoods[number, k] for k in range(len(question.choices))),
        )
        for number, (subject, question) in enumerate(asked.questions)
    )
    for answer in answers:
        if not np.isfinite(answer.scores).all():
            raise BadArgumentError(
                f"{answer.subject}, question {answer.number}: a likelihood is not finite, the "
                "activations of this model overflow float32, expected a finite one"
            )
    return Found(answers, scores.ends)


def write(
    model: ServedModel,
    asked: Asked,
    words: ModelTokenizer,
    directory: Path | None = None,
    kv_cache: str | None = None,
    progress: PartProgress = silent,
) -> Found:
    """Answers in text, by the whole model in memory.

    Args:
        model: the checkpoint.
        asked: the prompts.
        words: the tokenizer.
        directory: for files of hidden states, where the next token is to be compared.
        kv_cache: how keys and values are cached; None is as the checkpoint says.
        progress: told how far it is.
    """
    exact = asked.task.exact
    assert exact is not None
    ends = None
    if directory is not None:
        directory.mkdir()
        ends = score(model, asked.groups, directory, kv_cache=kv_cache).ends
    stops = [] if words.eos_id is None else [words.eos_id]
    writer = Writer(Generator(model, kv_cache, stops), words, asked.room, exact)
    answers, requests = [], list(chain.from_iterable(asked.requests))
    for number, (subject, question) in enumerate(asked.questions):
        text = writer(requests[number].context)
        answers.append(read(subject, question, text, exact))
        progress((number + 1) / len(requests))
    return Found(tuple(answers), ends)
