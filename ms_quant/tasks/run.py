"""A task from its files to a result, of one checkpoint or of two."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from ms_quant.data.tokenizer import ModelTokenizer, load_tokenizer
from ms_quant.errors import BadArgumentError, BadFileError, MsQuantError
from ms_quant.evaluation.arguments import AnyPath, opened, tokenizer_directory
from ms_quant.evaluation.comparable import require_one_tokenizer, require_same_text
from ms_quant.evaluation.head import require_head
from ms_quant.formats.opening import ServedModel
from ms_quant.formats.source_kind import model_directory
from ms_quant.progress import StepProgress, silent
from ms_quant.tasks.paired import Pairing
from ms_quant.tasks.records import Data, Subject
from ms_quant.tasks.result import TaskResult
from ms_quant.tasks.table import task_of
from ms_quant.tasks.work import Asked, Found, choose, write


def evaluate_task(
    model: ServedModel | AnyPath,
    task: AnyPath,
    data: AnyPath | None = None,
    progress: StepProgress | None = None,
    *,
    against: ServedModel | AnyPath | None = None,
    shots: int | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    kv_cache: str | None = None,
    tokenizer: AnyPath | None = None,
) -> TaskResult:
    """How many questions of a task a float or quantized checkpoint answers right.

    Choices are scored block by block in bounded memory; answers in text need the whole model.

    Args:
        model: what :func:`ms_quant.open_model` opened, or the directory.
        task: ``"ceval"``, ``"cmmlu"``, ``"mmlu"``, ``"gsm8k"``, ``"hellaswag"``, ``"arc"``,
            ``"arc_easy"``, or a file of JSON lines.
        data: directory of the files of the task as they were published.
        progress: told how far each step is.
        against: another checkpoint of the vocabulary, such as the float model: the result's
            ``pairing`` says how the answers of the two differ. It is computed with the cache that
            its files say.
        shots: examples before each question; None is what people use for the task.
        subjects: only these subjects; None is all.
        limit: only the first questions of each subject; None is all.
        kv_cache: how keys and values are cached, ``"float"``, ``"C8"`` or ``"C8_DYNAMIC"``. None
            is as the checkpoint says.
        tokenizer: directory of the tokenizer files; None is that of the model.

    Returns:
        TaskResult.

    Raises:
        MsQuantError: a file is missing or malformed, the vocabularies are not the same, or the
            activations of a model overflow.

    Examples:
        >>> import json, pathlib
        >>> import ms_quant
        >>> question = {"prompt": "the quick brown", "choices": ["fox", "wizard"], "answer": 0}
        >>> _ = pathlib.Path("animals.jsonl").write_text(json.dumps(question))
        >>> found = ms_quant.evaluate_task("Qwen3-8B", "animals.jsonl")
        >>> found.accuracy in (0.0, 1.0)
        True
    """
    started, told = time.monotonic(), progress or silent
    served, other = opened(model), None if against is None else opened(against)
    require_head(served)
    found, place = task_of(str(task), None if data is None else Path(data))
    count = found.shots if shots is None else shots
    names = None if subjects is None else tuple(subjects)
    parts = found.read(Data(place, names, count, limit))
    _require_questions(parts, place)
    directory = tokenizer_directory(model, tokenizer)
    words = load_tokenizer(directory)
    asked = Asked.of(found, parts, count, words, served.config.max_position)
    if other is not None:
        require_same_text(served, other, asked.most)
        if isinstance(against, str | PathLike):
            _require_same_prompts(asked, directory, model_directory(Path(against)), count)
    with tempfile.TemporaryDirectory(prefix="ms-quant-tasks-") as root:
        states = Path(root)
        work = _work_of(asked, words, keep=other is not None)
        answered = work(served, states / "model", kv_cache, partial(told, "answering"))
        result = _result(asked, count, answered, started)
        if other is None:
            return result
        again = time.monotonic()
        with _naming("against"):
            told_other = partial(told, "answering reference")
            theirs = work(other, states / "against", None, told_other)
        agree = answered.agrees(served, theirs, other)
        reference = _result(asked, count, theirs, again)
        paired = Pairing.of(result, reference, agree.divergences, agree.same)
    return replace(result, pairing=paired, seconds=round(time.monotonic() - started, 1))


@contextmanager
def _naming(which: str) -> Iterator[None]:
    """Says of which of two checkpoints an error is."""
    try:
        yield
    except MsQuantError as error:
        raise type(error)(f"{which}: {error}") from None


Work = Callable[[ServedModel, Path, str | None, Callable[[float], None]], Found]


def _work_of(asked: Asked, words: ModelTokenizer, keep: bool) -> Work:
    """What has a model answer."""

    def work(
        model: ServedModel, states: Path, kv_cache: str | None, told: Callable[[float], None]
    ) -> Found:
        if asked.task.exact:
            return write(model, asked, words, states if keep else None, kv_cache, told)
        return choose(model, asked, states, kv_cache, told)

    return work


def _result(asked: Asked, shots: int, found: Found, started: float) -> TaskResult:
    seconds = round(time.monotonic() - started, 1)
    return TaskResult(asked.task, shots, tuple(asked.subjects), found.answers, asked.cut, seconds)


def _require_questions(subjects: Sequence[Subject], place: Path) -> None:
    empty = [subject for subject in subjects if not subject.questions]
    if empty or not subjects:
        source = empty[0].source if empty else place
        raise BadFileError(f"{source}: has no questions, expected one at least")


def _require_same_prompts(asked: Asked, directory: Path, against: Path, shots: int) -> None:
    """Refuses a model whose tokenizer makes other tokens of the prompts."""
    ids = asked.requests[0][0].context[None]
    if require_one_tokenizer(directory, against, None, ids, None):
        return
    words = load_tokenizer(against)
    others = Asked.of(asked.task, asked.subjects, shots, words, asked.longest)
    for subject, ours, theirs in zip(asked.subjects, asked.requests, others.requests, strict=True):
        for question, one, another in zip(subject.questions, ours, theirs, strict=True):
            same = map(
                np.array_equal,
                (one.context, *one.continuations),
                (another.context, *another.continuations),
            )
            if not all(same):
                raise BadArgumentError(
                    f"{against}: its tokenizer makes other tokens of question "
                    f"{question.number} of {subject.name} than that of {directory}, expected the "
                    "same"
                )
