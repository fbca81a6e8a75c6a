"""Checkpoints with keys and values in int8: calibrated, written, proved, evaluated, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_decoder import SlowDecoder

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import JobModel, open_model
from ms_quant.models.config import load_config
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

CACHED = ("self_attn.k_proj", "self_attn.v_proj")

pytestmark = pytest.mark.slow
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 4, "seq_len": 16}
TOKENS = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)
C8 = {"kv_cache": "C8"}


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    def run(scheme: str, family: str = "qwen3", choices: Any = C8, **options: Any) -> Any:
        source = tiny_model(family=family, layers=2, **SHAPE)
        request = QuantizeOptions(
            source,
            tmp_path / "out",
            scheme,
            **choices,
            keep_job=True,
            **{"calib": calib_text, **CALIBRATED, **options},
        )
        checked = prepare(request)
        run_job(request, checked=checked)
        return checked

    return run


def first_keys_and_values(source: Path, tokens: np.ndarray, tensors: dict) -> list[np.ndarray]:
    """What the first block caches, (tokens, kv heads * head_dim), float64, by definition."""
    model = SlowDecoder(load_config(source), tensors)
    found = [model.queries_keys_values(0, model.embed(ids))[1:] for ids in tokens]
    return [
        np.concatenate([x.transpose(1, 0, 2).reshape(x.shape[1], -1) for x in cached])
        for cached in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_scales_cover_what_is_cached_and_no_more(make, load_tensors, family):
    checked = make("W8A16", family)
    written = load_tensors(checked.options.output)
    source = load_tensors(checked.options.model)
    cached = first_keys_and_values(checked.options.model, checked.tokens, source)
    for path, values in zip(CACHED, cached, strict=True):
        scale = written[f"model.layers.0.{path}.kv_cache_scale"]
        offset = written[f"model.layers.0.{path}.kv_cache_offset"]
        assert scale.dtype == offset.dtype == np.float32
        assert scale.shape == offset.shape == (32,) and not offset.any()
        exact = np.abs(values).max(axis=0) / 127
        assert (scale >= exact * (1 - 1e-5)).all()
        assert (scale <= exact * (1 + 2**-7 + 1e-5)).all()  # rounded up to bfloat16


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W8A16", {}),
        ("W8A16", {"exclude": ("*.k_proj",)}),
        ("W8A8_MIX", {"algorithm": "smoothquant"}),
        ("W8A8", {"algorithm": "smoothquant"}),
        ("W4A4_DYNAMIC", {"algorithm": "quarot+gptq", "dtype": "float16"}),
    ],
)
def test_what_was_written_is_what_was_made(make, scheme, options):
    checked = make(scheme, **options)
    output = checked.options.output
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    written = open_model(output)
    assert verify_checkpoint(output, checked.options.model).problems == ()
    description = json.loads((output / "quant_model_description.json").read_text())
    assert description["kv_cache_type"] == description["kv_quant_type"] == "C8"
    named = [key for key, value in description.items() if "." in key and value == "C8"]
    assert len(named) == 2 * 2 * 2
    assert inspect_checkpoint(output)["kv_cache"] == "C8"
    expected = token_losses(job, TOKENS)
    np.testing.assert_array_equal(token_losses(written, TOKENS), expected)
    np.testing.assert_array_equal(token_losses(written, TOKENS, kv_cache="C8"), expected)
    exact = token_losses(written, TOKENS, kv_cache="float")
    dynamic = token_losses(written, TOKENS, kv_cache="C8_DYNAMIC")
    for found in (expected, dynamic):
        assert not np.array_equal(found, exact)
        assert found.mean() == pytest.approx(exact.mean(), rel=0.1)  # random weights
    prompt = TOKENS[0, :5]
    assert list(Generator(written).generate(prompt, 4)) == list(Generator(job).generate(prompt, 4))


def test_the_cache_changes_no_linear(make, tmp_path, load_tensors):
    """It is decided beside the weights: the other tensors are those without it."""
    checked = make("W8A16")
    plain = QuantizeOptions(checked.options.model, tmp_path / "plain", "W8A16")
    run_job(plain)
    found, expected = load_tensors(checked.options.output), load_tensors(plain.output)
    more = {name for name in found if "kv_cache" in name}
    assert set(found) - more == set(expected) and len(more) == 8
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
    ("choices", "scheme", "message"),
    [
        (
            {"kv_cache": "C8", "formats": ("golden-stick",)},
            "W8A8",
            "kv cache C8: a golden-stick checkpoint cannot hold it, expected --format ascend",
        ),
        ({"kv_cache": "C8_DYNAMIC"}, "W8A16", "C8_DYNAMIC scales tokens at run time and needs"),
        ({"kv_cache": "C4"}, "W8A16", "'C4' is unknown, expected one of float, C8, C8"),
    ],
)
def test_refusals(make, tmp_path, choices, scheme, message):
    with pytest.raises(MsQuantError, match=message):
        make(scheme, choices=choices)
    assert not (tmp_path / "out").exists()


def test_it_needs_calibration_data(make):
    with pytest.raises(MsQuantError, match="kv cache C8 needs calibration data, expected --calib"):
        make("W8A16", calib=None)


def test_kinds_that_a_checkpoint_cannot_serve(tiny_model):
    model = open_model(tiny_model(layers=1, **SHAPE))
    with pytest.raises(MsQuantError, match="kv cache C8: the checkpoint has no scales for it, exp"):
        token_losses(model, TOKENS, kv_cache="C8")
    with pytest.raises(MsQuantError, match="kv cache 'C4' is unknown, expected one of float, C8,"):
        Generator(model, "C4")
