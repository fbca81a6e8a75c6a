"""Static linears from tensors that must agree, and tensors in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import perplexity, token_losses
from ms_quant.formats.opening import JobModel, open_model, static_linear
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job

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


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"family": "qwen2"}, {"algorithm": "smoothquant"}),
        ({"family": "llama", "biases": True, "tied": True}, {"exclude": ("*.0.*.down_proj",)}),
        ({"family": "qwen3"}, {"dtype": "float16"}),
    ],
)
def test_a_job_serves_as_the_checkpoint_that_is_written_from_it(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    model: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """bfloat16 weights of this size are float16 numbers, too, but for some tiny ones."""
    source = tiny_model(**model)
    request = QuantizeOptions(
        source, tmp_path / "out", calib=calib_text, samples=4, seq_len=16, keep_job=True, **options
    )
    checked = prepare(request)
    run_job(request, checked=checked)
    tokens = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)
    job, written = (
        JobModel(checked.plan, checked.job(), checked.tensors),
        open_model(tmp_path / "out"),
    )
    ours, theirs = token_losses(job, tokens), token_losses(written, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert perplexity(job, tokens).loss == pytest.approx(perplexity(written, tokens).loss)
    assert np.abs(ours - token_losses(open_model(source), tokens)).max() > 1e-3
    assert job.format == "W8A8"
    for path in checked.plan.quantized():
        mine, other = job.linear(path), written.linear(path)
        assert mine is not None and other is not None
        np.testing.assert_array_equal(mine.weight, other.weight)
        assert (mine.bias is None) == (other.bias is None)
    for path in ("model.norm", *checked.plan.float_linears()):
        assert job.linear(path) is None


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("W8A8_DYNAMIC", "bfloat16"), ("W8A8_MIX", "float16"), ("W4A8_MXFP", "bfloat16")],
)
def test_folded_linears_of_a_job_are_those_that_are_written(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    scheme: str,
    dtype: str,
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    source = tiny_model(family="llama", biases=True, layers=1, dtype=dtype, **shape)
    chosen = {"algorithm": "smoothquant", "calib": calib_text, "samples": 2, "seq_len": 16}
    request = QuantizeOptions(source, tmp_path / "out", scheme, keep_job=True, **chosen)
    checked = prepare(request)
    run_job(request, checked=checked)
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    written = open_model(tmp_path / "out")
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    for path in checked.plan.quantized():
        mine, other = job.linear(path), written.linear(path)
        assert mine is not None and other is not None
        for decode in (False, True):
            np.testing.assert_array_equal(mine.forward(x, decode), other.forward(x, decode))
