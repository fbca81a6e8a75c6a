"""Errors: one sentence, the cause by the class, and what was found and expected."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import ms_quant
from ms_quant.errors import (
    BadArgumentError,
    BadFileError,
    DiskError,
    JobConflictError,
    MsQuantError,
    UnsupportedError,
)
from ms_quant.files.atomic import disk_errors
from ms_quant.files.lock import locked

ROOT = Path(__file__).parent.parent
CAUSES = (BadArgumentError, BadFileError, UnsupportedError, JobConflictError, DiskError)


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_a_public_error(cause: type[MsQuantError]) -> None:
    assert issubclass(cause, MsQuantError) and issubclass(cause, ValueError)
    assert getattr(ms_quant, cause.__name__) is cause


@pytest.mark.parametrize(
    ("message", "found", "expected"),
    [
        ("a: is 3, expected 4", "a: is 3", "4"),
        ("a: has no b; expected one, or none", "a: has no b", "one, or none"),
        ("model: expected a directory", "model:", "a directory"),
        ("--a and --b exclude each other", "--a and --b exclude each other", ""),
        ("a: is\n'expectedly', expected b", "a: is\n'expectedly'", "b"),
    ],
)
def test_it_carries_what_was_found_and_expected(message, found, expected) -> None:
    error = BadFileError(message)
    assert (str(error), error.found, error.expected) == (message, found, expected)
    again = pickle.loads(pickle.dumps(error))  # worker processes send them back
    assert (type(again), again.args, again.found) == (BadFileError, error.args, found)


def test_no_error_is_raised_without_its_cause() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("ms_quant", "sparse_compress")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MsQuantError"
    ]
    assert not bare


def quantized(model: Path, output: Path, **more) -> None:
    ms_quant.quantize_checkpoint(model, output, "W8A8_DYNAMIC", **more)


def test_the_cause_tells_whose_turn_it_is(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, output = tiny_model(), tmp_path / "out"
    with pytest.raises(BadArgumentError) as argument:
        quantized(model, output, algorithm="gtpq")
    assert argument.value.found == "algorithm 'gtpq' is unknown"
    assert "gptq" in argument.value.expected
    with pytest.raises(UnsupportedError, match="no golden-stick checkpoint can hold it"):
        ms_quant.quantize_checkpoint(model, output, "W4A16", formats=("golden-stick",))
    quantized(model, output)
    with pytest.raises(JobConflictError, match="out: exists and it was made with dtype"):
        quantized(model, output, dtype="float16")
    (model / "config.json").write_text("{")
    with pytest.raises(BadFileError, match=r"config\.json: not valid JSON"):
        quantized(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_and_a_busy_job(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="x: "), disk_errors(tmp_path / "x", "the file"):
        raise OSError(28, "No space left on device")
    with locked(tmp_path / "lock"), pytest.raises(JobConflictError), locked(tmp_path / "lock"):
        pytest.fail("two processes at once")
