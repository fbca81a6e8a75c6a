"""Prompts, tokens and answers are those of lm-evaluation-harness on the same files and model.

``tools/make_golden_tasks.py`` wrote what is expected, by the harness's own task files and its
transformers backend in float32; the versions stand in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.formats.opening import open_model
from ms_quant.tasks.prompts import contexts
from ms_quant.tasks.records import DELIMITER, Data
from ms_quant.tasks.run import evaluate_task
from ms_quant.tasks.table import task_of
from ms_quant.tasks.work import Asked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ROOT / "models" / "stdlib-qwen3-6m"
CASES: list[dict[str, Any]] = json.loads((ROOT / "tests/golden/tasks.json").read_text())["cases"]
HARNESS = {"exact_match": "exact_match,strict-match"}
HARNESS |= {"exact_match_flexible": "exact_match,flexible-extract"}
SCORED = [case for case in CASES if case["task"] != "gsm8k"]
AMPLITUDE = 2e-4
"""Of a log-likelihood, which is a sum of up to 20 terms: both sum 384 products in float32 in their
own order, three blocks deep."""


def arguments(case: dict[str, Any]) -> tuple[str, Path | None]:
    path = HERE / "data" / case["data"]
    return (case["task"], path) if case["task"] else (str(path), None)


def names(case: dict[str, Any]) -> str:
    return f"{case['data']}-{case['shots']}"


def expected_of(case: dict[str, Any], subject: str) -> dict[str, Any]:
    """What the harness made of a subject, which it knows by another name where there is but one."""
    only = next(iter(case["subjects"].values()))
    found: dict[str, Any] = case["subjects"].get(subject, only)
    return found


@pytest.mark.parametrize("case", CASES, ids=names)
def test_prompts_and_tokens_are_those_of_the_harness(case: dict[str, Any]) -> None:
    task, place = task_of(*arguments(case))
    subjects = task.read(Data(place, None, case["shots"], None))
    assert len(subjects) == len(case["subjects"])
    asked = Asked.of(task, subjects, case["shots"], load_tokenizer(MODEL), 1024)
    for subject, requests in zip(subjects, asked.requests, strict=True):
        expected = expected_of(case, subject.name)["questions"]
        assert len(expected) == len(requests)
        made = list(contexts(subject, case["shots"], task.sampler))
        for context, question, request, wanted in zip(
            made, subject.questions, requests, expected, strict=True
        ):
            assert context == wanted["context"]
            assert request.context.tolist() == wanted["context_ids"]
            shown = [DELIMITER + choice for choice in question.choices]
            assert shown == wanted.get("continuations", [])
            ids = [one.tolist() for one in request.continuations]
            assert ids == wanted.get("continuation_ids", [])


@pytest.mark.parametrize("case", SCORED, ids=names)
def test_answers_are_those_of_the_harness(case: dict[str, Any]) -> None:
    """To the last answer: the likelihoods of no two choices are as close as rounding."""
    found = evaluate_task(open_model(MODEL), *arguments(case), shots=case["shots"], tokenizer=MODEL)
    answers = iter(found.answers)
    for subject in found.subjects:
        wanted = expected_of(case, subject.name)
        for expected, answer in zip(wanted["questions"], answers, strict=False):
            assert {key: answer.right[key] for key in expected["right"]} == expected["right"]
            if "text" in expected:
                assert answer.text == expected["text"]
            else:
                assert answer.scores == pytest.approx(expected["likelihoods"], abs=AMPLITUDE)
        for metric in found.metrics:
            accuracy = found.of_subject(subject.name, metric)
            assert accuracy.value == pytest.approx(wanted["results"][f"{metric},none"])
            assert accuracy.error == pytest.approx(wanted["results"][f"{metric}_stderr,none"])
    assert len(found.answers) == sum(len(s["questions"]) for s in case["subjects"].values())


def test_what_is_written_is_what_the_harness_has_written() -> None:
    """The first of three questions: 256 tokens take a second or two."""
    case = next(case for case in CASES if case["task"] == "gsm8k" and case["shots"] == 2)
    (found,) = evaluate_task(MODEL, *arguments(case), shots=2, limit=1).answers
    expected = case["subjects"]["gsm8k"]["questions"][0]
    assert found.text == expected["text"]
    assert {HARNESS[name]: right for name, right in found.right.items()} == expected["right"]


def test_what_is_computed_together_is_close_to_nothing_that_could_turn_an_answer() -> None:
    gaps = [
        np.diff(np.sort(question["likelihoods"]))[-1]
        for case in CASES
        for subject in case["subjects"].values()
        for question in subject["questions"]
        if "likelihoods" in question
    ]
    assert min(gaps) > 2 * AMPLITUDE
