"""Answers of two checkpoints in pairs: McNemar's test, changed answers, and accuracies."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import ms_quant
from ms_quant.tasks.gsm8k import flexible, plain, strict
from ms_quant.tasks.paired import mcnemar
from ms_quant.tasks.result import Accuracy

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "stdlib-qwen3-6m"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (20, 41)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    """Twice the tail of Binomial(lost + won, 1/2), at most 1."""
    count = lost + won
    ways = sum(math.comb(count, k) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == float(min(Fraction(1), Fraction(2 * ways, 2**count)))


def test_mcnemar_of_thousands() -> None:
    """The normal approximation, with its correction for continuity."""
    expected = math.erfc((100 - 1) / math.sqrt(13100) / math.sqrt(2))
    assert mcnemar(6600, 6500) == pytest.approx(expected, rel=1e-3)


def test_errors_of_means() -> None:
    """Of subjects: independent errors; of questions: the spread within subjects, pooled."""
    right = [[True, False, True, True], [False, False, True]]
    parts = [Accuracy.of(one) for one in right]
    for part, answers in zip(parts, right, strict=True):
        spread = np.std(answers, ddof=1) / math.sqrt(len(answers))
        assert part.error == pytest.approx(float(spread))
    mean = Accuracy.of_parts(parts)
    assert mean.value == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert mean.error == pytest.approx(math.hypot(*(part.error or 0 for part in parts)) / 2)
    pooled = Accuracy.of_questions(parts)
    squares = sum(np.var(one, ddof=1) * (len(one) - 1) for one in right)
    assert pooled.value == pytest.approx(4 / 7)
    assert pooled.error == pytest.approx(math.sqrt(squares / (7 - 2) / 7))


def test_one_question_has_no_error() -> None:
    one = Accuracy.of([True])
    assert one.error is None
    assert Accuracy.of_questions([one, one]).error is None
    assert Accuracy.of_parts([one, Accuracy.of([True, False])]).error is None


def test_numbers_are_read_out_of_texts_as_the_harness_reads_them() -> None:
    golden = HERE.parents[1] / "tests" / "golden" / "tasks.json"
    first, *rows = json.loads(golden.read_text())["readings"]
    for row in rows:
        for name, reading in (("strict-match", strict), ("flexible-extract", flexible)):
            found = reading(row["text"])
            assert found == row[name]["read"], row["text"]
            right = [plain(found) == plain(answer) for answer in first["answers"]]
            assert right == row[name]["right"], row["text"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "W4A16"
    ms_quant.quantize_checkpoint(MODEL, out, "W4A16")
    return out


def test_answers_that_change_are_counted(quantized: Path) -> None:
    data = HERE / "data" / "mmlu"
    model, other = (ms_quant.evaluate_task(path, "mmlu", data) for path in (quantized, MODEL))
    pairing = ms_quant.evaluate_task(quantized, "mmlu", data, against=MODEL).pairing
    assert pairing is not None
    assert pairing.against.answers == other.answers
    pairs = list(zip(model.answers, other.answers, strict=True))
    assert pairing.changed * 7 == sum(a.chosen["acc"] != b.chosen["acc"] for a, b in pairs)
    assert pairing.lost == sum(b.right["acc"] and not a.right["acc"] for a, b in pairs)
    assert pairing.won == sum(a.right["acc"] and not b.right["acc"] for a, b in pairs)
    assert pairing.difference == pytest.approx(model.accuracy - other.accuracy)
    assert 0 < pairing.kl_divergence < 1
    assert 0 < pairing.top1_agreement <= 1


def test_a_model_is_equal_to_itself() -> None:
    data = HERE / "data" / "hellaswag"
    result = ms_quant.evaluate_task(
        MODEL, "hellaswag", data, against=ms_quant.open_model(MODEL), tokenizer=MODEL
    )
    pairing = result.pairing
    assert pairing is not None
    assert (pairing.changed, pairing.lost, pairing.won, pairing.p_value) == (0, 0, 0, 1)
    assert (pairing.kl_divergence, pairing.top1_agreement) == (0, 1)
