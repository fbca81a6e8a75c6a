"""Two checkpoints on the same tokens: the paired standard error, and what is refused before it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from typer.testing import CliRunner

import ms_quant
from ms_quant.cli.main import app
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation import comparison
from ms_quant.evaluation.comparable import require_one_tokenizer
from ms_quant.evaluation.comparison import Comparison, paired_difference
from ms_quant.evaluation.perplexity import Measurement, Perplexity, measure

TOKENS = np.arange(4 * 12, dtype=np.int32).reshape(4, 12)


def slow_difference(losses: np.ndarray, against: np.ndarray) -> tuple[float, float]:
    """The definition in loops: one mean difference a window, and the error of their mean."""
    means = []
    for ours, theirs in zip(losses.tolist(), against.tolist(), strict=True):
        means.append(sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(ours))
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance) / math.sqrt(len(means))


def measurement(losses: np.ndarray) -> Measurement:
    windows, predicted = losses.shape
    loss = float(losses.mean())
    tokens = np.zeros((windows, predicted + 1), np.int32)
    return Measurement(Perplexity(math.exp(loss), loss, losses.size, 0.0), tokens, losses)


@st.composite
def pairs(draw: st.DrawFn, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two models whose windows are easy and hard alike."""
    windows, tokens = draw(st.integers(least, 20)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    common = rng.exponential(3, (windows, tokens)) + rng.normal(3, 1, (windows, 1))
    moved = common + rng.normal(0, draw(st.sampled_from([1e-3, 0.1, 2])), common.shape)
    return common.astype(np.float32), moved.astype(np.float32)


@given(pairs())
def test_difference_and_error_are_those_of_the_definition(two: tuple[np.ndarray, np.ndarray]):
    found, expected = paired_difference(*two), slow_difference(*two)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(pairs(), st.randoms(use_true_random=False))
def test_the_order_of_windows_does_not_matter(two: tuple[np.ndarray, np.ndarray], rng: Any):
    order = list(range(len(two[0])))
    rng.shuffle(order)
    assert paired_difference(two[0][order], two[1][order]) == paired_difference(*two)
    swapped = paired_difference(two[1], two[0])
    assert swapped == (-paired_difference(*two)[0], paired_difference(*two)[1])


@given(pairs(least=1))
def test_a_model_does_not_differ_from_itself(two: tuple[np.ndarray, np.ndarray]):
    found = Comparison.of(measurement(two[0]), measurement(two[0]))
    assert (found.loss_difference, found.perplexity_increase) == (0, 0)
    if found.windows == 1:
        assert found.told_apart is None
    else:
        assert (found.loss_difference_error, found.perplexity_increase_error) == (0, 0)
        assert found.told_apart is False
        assert found.verdict == f"no difference on {found.windows} windows"


def test_the_error_covers_the_truth_as_often_as_it_says():
    """Tokens of a window share a difference: an error from single tokens would be five times less.

    Of 2,000 texts of 40 windows 95 % are within 2.02 errors (Student's t); 1 % is left for chance.
    """
    rng = np.random.default_rng(0)
    inside, naive = 0, []
    for _ in range(2000):
        differences = 0.01 + rng.normal(0, 0.05, (40, 1)) + rng.normal(0, 0.05, (40, 25))
        found, error = paired_difference(differences, np.zeros_like(differences))
        inside += abs(found - 0.01) <= 2.02 * error
        naive.append(differences.std() / math.sqrt(differences.size) / error)
    assert inside / 2000 == pytest.approx(0.95, abs=0.01)
    assert np.mean(naive) < 0.3


def test_the_increase_and_its_error_by_the_delta_method():
    """The spread of exp(d) over many draws of d is the error that is said of one."""
    rng = np.random.default_rng(1)
    base = rng.exponential(3, (200, 8))
    moved = base + 0.2 + rng.normal(0, 0.3, (200, 8))
    found = Comparison.of(measurement(moved), measurement(base))
    assert found.perplexity_increase == pytest.approx(
        found.model.perplexity / found.against.perplexity - 1
    )
    drawn = np.exp(rng.normal(found.loss_difference, found.loss_difference_error, 200_000))
    assert found.perplexity_increase_error == pytest.approx(drawn.std(), rel=0.02)


def test_what_one_window_and_few_windows_are_worth():
    losses = np.array([[1.0, 2], [3, 4], [5, 6]], np.float32)
    one = Comparison.of(measurement(losses[:1] + 1), measurement(losses[:1]))
    assert one.loss_difference == 1
    assert (one.loss_difference_error, one.perplexity_increase_error) == (None, None)
    assert (one.told_apart, one.verdict) == (
        None,
        "one window has no standard error, expected at least 2",
    )
    few = Comparison.of(measurement(losses + np.array([[1.0], [1.1], [1.2]])), measurement(losses))
    assert few.told_apart
    assert few.verdict == (
        "more than two standard errors on 3 windows, which are few: their standard error is rough"
    )
    many = np.tile(losses, (4, 1))
    noise = np.resize([0.5, -0.4], (12, 1))
    found = Comparison.of(measurement(many + noise), measurement(many))
    assert found.verdict == "not told apart from noise on 12 windows"
    json.dumps(found.as_json(), allow_nan=False)


def test_a_ruined_model_has_finite_numbers():
    ruined = np.repeat(np.array([[1e38], [1e37], [2e37]], np.float32), 4, axis=1)
    difference, error = paired_difference(ruined, np.full_like(ruined, 3))
    record = Perplexity(1e304, difference, 12, 0.0)
    found = Comparison(record, record, 3, difference, error)
    json.dumps(found.as_json(), allow_nan=False)


@pytest.fixture
def models(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A quantized checkpoint, and the float model that it was made from."""
    model = tiny_model()
    ms_quant.quantize_checkpoint(model, tmp_path / "quantized", "W8A16")
    return tmp_path / "quantized", model


def test_compare_is_two_measurements(models: tuple[Path, Path], calib_text: Path):
    quantized, model = models
    steps: list[tuple[str, float]] = []
    found = ms_quant.compare(
        quantized,
        str(model),
        calib_text,
        lambda step, part: steps.append((step, part)),
        seq_len=16,
        windows=12,
    )
    for place, record in ((quantized, found.model), (model, found.against)):
        alone = ms_quant.perplexity(place, calib_text, seq_len=16, windows=12)
        assert (record.perplexity, record.loss) == (alone.perplexity, alone.loss)
    assert found.loss_difference == pytest.approx(found.model.loss - found.against.loss, abs=1e-6)
    assert found.loss_difference_error is not None and found.loss_difference_error > 0
    assert [step for step, part in steps if part == 1] == ["evaluating", "evaluating reference"]


def test_what_was_measured_before_is_not_measured_again(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantized, model = models
    reference = measure(ms_quant.open_model(model), TOKENS, keep=tmp_path)
    assert reference.losses.dtype == np.float32
    expected = ms_quant.compare(quantized, model, TOKENS)
    found = ms_quant.compare(ms_quant.open_model(quantized), reference, TOKENS)
    assert found.as_json() == expected.as_json()
    refuse_forwards(monkeypatch)
    with pytest.raises(MsQuantError, match=r"against: was measured on \[4, 12\] other tokens"):
        ms_quant.compare(quantized, reference, TOKENS + 1)


def refuse_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise AssertionError("a forward runs")

    monkeypatch.setattr(comparison, "measure", forward)


def swap_two_tokens(directory: Path) -> None:
    """A tokenizer of the same size, two of whose words have changed their ids."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["w"] = vocabulary["w"], vocabulary["q"]
    path.write_text(json.dumps(content))


def forget_a_merge(directory: Path) -> None:
    """A tokenizer of the same vocabulary that cuts words in another way."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    path.write_text(json.dumps(content))


def change_config(**keys: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


REFUSED = [
    (swap_two_tokens, r"other: has another vocabulary, its token \d+ is 'w', expected 'q' as in "),
    (
        forget_a_merge,
        r"other: its tokenizer makes other tokens of \S+calib.txt than that of \S+, "
        r"\d+ at token \d+ of window 0, expected \d+",
    ),
    (
        change_config(max_position_embeddings=8),
        r"against: was made for 8 positions \(max_position_embeddings\), the other model for 64: "
        "windows have 16 tokens, expected at most 8",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused_before_any_forward(
    change: Callable[[Path], None],
    message: str,
    models: tuple[Path, Path],
    calib_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    quantized, model = models
    shutil.copytree(model, tmp_path / "other")
    change(tmp_path / "other")
    refuse_forwards(monkeypatch)
    with pytest.raises(MsQuantError, match=message):
        ms_quant.compare(quantized, tmp_path / "other", calib_text, seq_len=16, windows=12)


def test_another_size_of_vocabulary_is_refused_of_opened_models_too(
    models: tuple[Path, Path], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    def cut(tensors: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:310]

    other = tiny_model("other", change=cut, vocab_size=310)
    refuse_forwards(monkeypatch)
    with pytest.raises(MsQuantError) as raised:
        ms_quant.compare(*map(ms_quant.open_model, (models[0], other)), TOKENS)
    assert str(raised.value) == (
        "against: has a vocabulary of 310 tokens, expected the 320 of the model: their losses are "
        "not of the same choices"
    )


def test_added_tokens_that_the_text_does_not_hold_are_no_other_vocabulary(
    models: tuple[Path, Path], calib_text: Path, tmp_path: Path
):
    quantized, model = models
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|call|>"])
    tokenizer.save(str(other / "tokenizer.json"))
    expected = ms_quant.compare(quantized, model, calib_text, seq_len=16, windows=3)
    found = ms_quant.compare(quantized, other, calib_text, seq_len=16, windows=3)
    assert found.as_json() == expected.as_json()
    (other / "tokenizer.json").unlink()  # then the sizes alone are compared
    tokens = eval_windows(calib_text, quantized, 16, 3)
    said = require_one_tokenizer(quantized, other, calib_text, tokens, 3)
    assert said == f"{other}: has no tokenizer to compare with that of the other model"
    found = ms_quant.compare(quantized, other, calib_text, seq_len=16, windows=3)
    assert found.as_json() == expected.as_json()


def evaluate(*arguments: object) -> str:
    """What ``ms-quant eval`` prints.

    Raises:
        MsQuantError: what the command says in one sentence.
    """
    found = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})
    if found.exception is not None:
        raise found.exception
    return found.stdout


def test_the_command_compares_each_way_to_compute(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
):
    """The reference is computed once, in float32: it does not tell phases apart."""
    model, mixed = tiny_model(), tmp_path / "mixed"
    ms_quant.quantize_checkpoint(
        model, mixed, "W8A8_MIX", calibration=calib_text, samples=2, seq_len=16, formats=["ascend"]
    )
    options = ["--text", calib_text, "--seq-len", 16, "--windows", 12, "--float16", "--json"]
    plain = json.loads(evaluate(mixed, *options))
    found = json.loads(evaluate(mixed, *options, "--against", model))
    assert {**found, "seconds": 0} == {**found, **plain, "seconds": 0}
    assert (found["against"], found["against_format"]) == (str(model), "float")
    assert found["windows"] == 12
    tokens = eval_windows(calib_text, model, 16, 12)
    opened = ms_quant.open_model(mixed)
    reference = measure(ms_quant.open_model(model), tokens)
    ways = {"": {}, "_decode": {"decode": True}, "_float16": {"float16": True}}
    for suffix, way in ways.items():
        compared = Comparison.of(measure(opened, tokens, **way), reference)
        for key, value in compared.as_json().items():
            assert found[f"{key}{suffix}"] == value
    assert found["loss_difference"] != found["loss_difference_decode"]


def test_the_command_says_what_a_difference_is_worth(models: tuple[Path, Path], calib_text: Path):
    quantized, model = models
    text = ["--text", calib_text, "--seq-len", 16, "--against", model]
    found = json.loads(evaluate(quantized, *text, "--windows", 40, "--json"))
    percent, error = (100 * found[f"perplexity_increase{end}"] for end in ("", "_error"))
    line = next(
        line
        for line in evaluate(quantized, *text, "--windows", 40).splitlines()
        if line.startswith(" perplexity increase")
    )
    shown = re.search(r"([+-][\d.]+) % ± ([\d.]+) %: (.*\S)", line)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(percent, abs=error / 10)
    assert float(shown[2]) == pytest.approx(error, rel=0.05)
    assert shown[3] == found["verdict"]
    single = evaluate(model, *text, "--windows", 1, "--float16")
    assert "+0.00 %: one window has no standard error, expected at least 2" in single
    assert "nan" not in single and "±" not in single


def test_what_the_command_refuses(
    models: tuple[Path, Path], tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
):
    quantized, _ = models
    (tmp_path / "empty").mkdir()
    classes = {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2}
    judge = tiny_model("judge", change=as_classifier, **classes)
    for against, message in (
        (quantized, "is the checkpoint itself, expected another, or --kv-cache or --float16 to"),
        (tmp_path / "link", "is the checkpoint itself"),
        (tmp_path / "nowhere", "nowhere: no such model directory"),
        (tmp_path / "empty", "empty: is empty, expected the directory of a Hugging Face"),
        (calib_text, "calib.txt"),
        (judge, "--against .*judge: the model gives out a classifier, expected one that predicts"),
    ):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(quantized)
        with pytest.raises(MsQuantError, match=message):
            evaluate(quantized, "--text", calib_text, "--seq-len", 16, "--against", against)


def test_an_overflow_of_the_other_names_it(
    models: tuple[Path, Path], tiny_model: Callable[..., Path], calib_text: Path
):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:] = 1e38

    other = tiny_model("other", dtype="float32", change=change)
    with pytest.raises(MsQuantError, match=r"^--against \S+other: model\.layers\.0: output: "):
        evaluate(models[0], "--text", calib_text, "--seq-len", 16, "--against", other)


def as_classifier(tensors: dict[str, np.ndarray]) -> None:
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:2]
