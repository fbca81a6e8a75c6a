"""float16: what does not fit is refused by name, what is lost is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from sparse_compress.layouts.fp16 import Underflow, survey, to_float16, underflow

SMALLEST_SUBNORMAL = 2.0**-24
SMALLEST_NORMAL = 2.0**-14


@pytest.mark.parametrize(
    ("value", "lost"),
    [
        (0.0, Underflow()),
        (SMALLEST_NORMAL, Underflow()),
        (-SMALLEST_NORMAL, Underflow()),
        (SMALLEST_NORMAL * (1 - 2.0**-12), Underflow()),  # rounds up to the normal number
        (SMALLEST_NORMAL / 2, Underflow(subnormal=1)),
        (-SMALLEST_SUBNORMAL, Underflow(subnormal=1)),
        (SMALLEST_SUBNORMAL / 2, Underflow(to_zero=1)),  # tie to even
        (SMALLEST_SUBNORMAL * 0.51, Underflow(subnormal=1)),
        (1e-30, Underflow(to_zero=1)),
    ],
)
def test_underflow_is_counted(value: float, lost: Underflow) -> None:
    array = np.array([value, 1.0], np.float32)
    assert underflow(array, to_float16(array, "x")) == lost


def test_the_largest_values_fit() -> None:
    array = np.array([65504, -65504, 65519.9], np.float32)
    np.testing.assert_array_equal(to_float16(array, "x"), [65504, -65504, 65504])


@pytest.mark.parametrize("value", [65520.0, -1e30, float("inf"), float("nan")])
def test_what_does_not_fit_is_refused_by_name(value: float) -> None:
    with pytest.raises(MsQuantError, match=r"'big\.weight': 1 of 2 values do not fit float16"):
        to_float16(np.array([value, 1], np.float32), "big.weight")


def test_survey_names_the_tensors_that_lose(
    tmp_path: Path, save_tensors: Callable[..., None]
) -> None:
    tensors = {
        "a": np.array([1, 1e-10, 1e-6], np.float32),
        "b": np.array([1, 2], np.float32),
        "c": np.array([1e9], np.float32),
    }
    save_tensors(tmp_path / "model.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path)
    assert survey(checkpoint, ["a", "b"]) == {"a": {"to_zero": 1, "subnormal": 1}}
    with pytest.raises(MsQuantError, match="'c': 1 of 1 values"):
        survey(checkpoint, ["a", "b", "c"])
