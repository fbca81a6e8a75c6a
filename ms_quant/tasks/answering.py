"""What a model answers: the likeliest choice, or what stands in a text that it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer
from ms_quant.tasks.records import Answer, Exact, Question

if TYPE_CHECKING:
    from ms_quant.evaluation.generation import Generator


def chosen(subject: str, question: Question, scores: tuple[float, ...]) -> Answer:
    """The likeliest choice, as it is and for each of its characters; of equal ones the first.

    Args:
        subject: of the question.
        question: the question.
        scores: log-likelihood of each choice.
    """
    sizes = np.array([len(choice) for choice in question.choices])
    each = np.array(scores)
    found = {"acc": int(np.argmax(each)), "acc_norm": int(np.argmax(each / sizes))}
    right = {metric: which == question.answer for metric, which in found.items()}
    return Answer(subject, question.number, right, found, scores)


def read(subject: str, question: Question, text: str, exact: Exact) -> Answer:
    """What each way to read the answer finds in a text.

    Args:
        subject: of the question.
        question: the question.
        text: what the model went on with.
        exact: how it is read and compared.
    """
    found = {metric: reading(text) for metric, reading in exact.readings.items()}
    expected = exact.plain(question.answer_text)
    right = {metric: exact.plain(answer) == expected for metric, answer in found.items()}
    return Answer(subject, question.number, right, found, text=text)


class Writer:
    """Greedy text up to the first of some texts.

    Args:
        generator: the model, whole in memory.
        words: its tokenizer.
        room: tokens of a prompt at most; of a longer one the beginning is lost.
        exact: what ends a text.
    """

    def __init__(self, generator: Generator, words: ModelTokenizer, room: int, exact: Exact):
        self._generator, self._words, self._room, self._exact = generator, words, room, exact

    def __call__(self, ids: np.ndarray) -> str:
        """The text after a prompt."""
        made: list[int] = []
        text = ""
        for token in self._generator.generate(ids[-self._room :], self._exact.max_tokens):
            made.append(token)
            text = self._words.decode(made)
            if any(stop in text for stop in self._exact.stops):
                break
        for stop in self._exact.stops:
            text = text.split(stop)[0]
        return text
