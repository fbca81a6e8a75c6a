"""The file of an analysis: read back as it was, and refused where it is no such file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ms_quant.analysis.records import (
    METRICS,
    GroupSensitivity,
    InputFacts,
    SchemeError,
    Sensitivity,
)
from ms_quant.analysis.summary import WIDTH, advice, summary
from ms_quant.errors import BadArgumentError, BadFileError, JobConflictError
from ms_quant.files.reader import Checkpoint, fingerprint

CALM = InputFacts(4.0, 2.0, 2.0, (), (), 0, 64, 5.0, 0.1, -0.5)
MASSIVE = InputFacts(3275.0, 2.0, 1.6, (1229, 1487), (0,), 4, 64, 900.0, 30.0, 4000.0)


def group(
    block: int, name: str, loss: float, facts: InputFacts | None = CALM, **more: SchemeError
) -> GroupSensitivity:
    error = SchemeError(2 * loss, loss, loss / 2, loss / 4, loss)
    path = f"model.layers.{block}.{name}_proj"
    return GroupSensitivity(block, name, name, (path,), 12, facts, {"W8A8": error, **more})


@pytest.fixture
def found() -> Sensitivity:
    decode = SchemeError(0.1, 0.1, 0.1, 0.1, 0.1, SchemeError(0.2, 0.2, 0.2, 0.2, 0.9))
    groups = [group(i, "down", 0.0001) for i in range(10)]
    groups[3] = group(3, "down", 0.5, MASSIVE, W8A8_MIX=decode)
    return Sensitivity(1, "model", {"source": None}, ("W8A8", "W8A8_MIX"), tuple(groups), 1.5)


def test_it_is_read_back_as_it_was(found: Sensitivity, tmp_path: Path) -> None:
    found.save(tmp_path / "a.json")
    again = Sensitivity.load(tmp_path / "a.json")
    assert again == found and again.groups == found.groups and again.request == found.request


def set_at(content: Any, keys: list[Any], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    if value is KeyError:
        del content[keys[-1]]
    else:
        content[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["version"], 2, "version is 2, expected 1"),
        (["version"], KeyError, "version is None, expected 1"),
        (["groups"], {}, "groups is {}"),
        (["schemes"], "W8A8", "schemes is 'W8A8'"),
        (["groups", 0, "block"], -1, "groups.0.block is -1"),
        (["groups", 0, "block"], True, "groups.0.block is True"),
        (["groups", 0, "schemes", "W8A8", "loss_increase"], "1", "loss_increase is '1'"),
        (["groups", 0, "schemes", "W8A8", "loss_increase"], -1.0, "loss_increase is -1.0"),
        (["groups", 0, "schemes", "W8A8", "block_mse"], KeyError, "block_mse is"),
        (["groups", 0, "schemes", "W4A4"], {}, "groups.0.schemes.W4A4"),
        (["groups", 0, "more"], 1, "groups.0.more is 1"),
        (["groups", 0, "input", "channels"], [1.5], "groups.0.input.channels.0 is 1.5"),
        (["groups", 1, "block"], 0, "model.layers.0.down is there twice"),
        (["schemes"], ["W8A8"], "model.layers.3.down has scheme 'W8A8_MIX'"),
    ],
)
def test_what_no_analysis_writes_is_refused(
    found: Sensitivity, tmp_path: Path, keys: list[Any], value: Any, said: str
) -> None:
    path = tmp_path / "a.json"
    found.save(path)
    content = json.loads(path.read_text())
    set_at(content, keys, value)
    path.write_text(json.dumps(content))
    with pytest.raises(BadFileError) as caught:
        Sensitivity.load(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": NaN}', '{"version": 1, "version": 1}']
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadFileError, match=r"a\.json"):
        Sensitivity.load(path)


def test_a_file_of_another_model_is_refused(
    found: Sensitivity, tiny_model: Callable[..., Path]
) -> None:
    one, other = Checkpoint(tiny_model()), Checkpoint(tiny_model("other", seed=1))
    found = replace(found, request={"source": fingerprint(one)})
    found.require_model(one)
    with pytest.raises(JobConflictError, match=r"of another model.*model\.safetensors differs"):
        found.require_model(other)
    with pytest.raises(JobConflictError, match="of another model"):
        replace(found, request={}).require_model(one)


def test_the_worst_comes_first_by_any_metric(found: Sensitivity) -> None:
    for metric in METRICS:
        assert found.ranked("W8A8", metric)[0].block == 3
    assert found.ranked("W8A8_MIX")[0].score("W8A8_MIX", "loss_increase") == 0.9  # of decode
    with pytest.raises(BadArgumentError, match="metric 'loss' is unknown, expected one of loss_"):
        found.ranked("W8A8", "loss")
    with pytest.raises(BadArgumentError, match="'W4A16' was not analysed, expected one of W8A8, "):
        found.ranked("W4A16")


def test_the_summary_says_what_hurts_and_what_to_do(found: Sensitivity) -> None:
    lines = summary(found, "kurtosis", top=3)
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "W8A8, the worst 3 of 10 groups:"
    assert lines[2].split() == [
        *("down", "of", "block", "3", "+64.9", "%", "1.0e+00", "2.5e-01", "x", "2,047", "4e+03")
    ]
    text = " ".join(" ".join(lines).split())
    assert "down of block 3: 3,275 at channels 1229, 1487, first token; median 1.6" in text
    assert "most of it in down of block 3; leave them float" in text
    assert "--exclude model.layers.3.down_proj" in text and "the others cost about +0.09 %" in text


def test_advice_where_nothing_or_everything_hurts(found: Sensitivity) -> None:
    calm = replace(found, groups=tuple(group(i, "down", 1e-5) for i in range(10)))
    assert advice(calm, "W8A8").endswith("nothing stands out, quantize them all.")
    all_bad = replace(found, groups=tuple(group(i, "down", 0.1) for i in range(10)))
    assert "spread over many groups" in advice(all_bad, "W8A8")
