"""Static linears from tensors that must agree, and tensors in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ms_quant.checkpoint.serving import open_model, static_linear
from ms_quant.errors import MsQuantError

WEIGHT = np.array([[1, 2], [3, -4]], np.int8)
ONES = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ([], "input_offset: is empty, expected one zero point an input"),
        ([1, 2], "input_offset: holds different values, expected one zero point"),
        ([3, 3], "quant_bias: 2 of 2 values differ from"),
    ],
)
def test_static_linear_refuses(offset: list[int], message: str) -> None:
    bias = np.array([-3, 1], np.int32)
    with pytest.raises(MsQuantError, match=f"^x.{message}"):
        static_linear("x", WEIGHT, ONES, bias, ONES, np.array(offset, np.int8), None)
    assert static_linear("x", WEIGHT, ONES, bias, ONES, np.ones(2, np.int8), None).bias is None


def test_pieces_of_a_float_model_are_its_tensor(tiny_model: Callable[..., Path]) -> None:
    model = open_model(tiny_model())
    name = "model.embed_tokens.weight"
    rows = [part for _, part in model.chunks(name)]
    np.testing.assert_array_equal(np.concatenate(rows), model.tensor(name))
