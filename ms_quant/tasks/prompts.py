"""Prompts with examples, drawn as lm-evaluation-harness draws them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from ms_quant.errors import BadArgumentError, BadFileError
from ms_quant.tasks.records import BETWEEN, DELIMITER, Question, Sampler, Subject

SEED = 1234
"""lm-evaluation-harness's own. A task has one generator; question after question draws from it."""


def contexts(subject: Subject, shots: int, sampler: Sampler) -> Iterator[str]:
    """What stands before the answer of each question of a subject.

    Args:
        subject: the subject.
        shots: examples before each question.
        sampler: how they are drawn.

    Raises:
        MsQuantError: there are too few examples.
    """
    random, more = Random(SEED), int(sampler == "random others" and shots > 0)
    _require_examples(subject, shots, shots + more)
    for question in subject.questions:
        examples = subject.examples[:shots]
        if shots and sampler != "first":
            examples = random.sample(list(subject.examples), shots + more)[:shots]
        yield subject.description + "".join(map(_shown, examples)) + question.text


def _shown(example: Question) -> str:
    return f"{example.text}{DELIMITER}{example.answer_text}{BETWEEN}"


def _require_examples(subject: Subject, shots: int, needed: int) -> None:
    if len(subject.examples) >= needed or not shots:
        return
    source = subject.examples_source
    if not Path(source).is_file():
        raise BadFileError(
            f"{source}: is not there, expected {needed} examples of {subject.name} for --shots "
            f"{shots}; --shots 0 needs none"
        )
    raise BadArgumentError(
        f"{source}: has {len(subject.examples)} examples of {subject.name}, expected {needed} for "
        f"--shots {shots}"
    )
