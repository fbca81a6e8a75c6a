"""Algorithms through the whole pipeline: quantized, written, proved and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity, token_losses
from ms_quant.files.atomic import write_json
from ms_quant.files.reader import Checkpoint
from ms_quant.files.sealed import seal
from ms_quant.formats.opening import JobModel, open_model
from ms_quant.job.output_directory import RECORD
from ms_quant.models.config import load_config
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.pipeline.options import split_options
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blocking_mindspore")]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 4, "seq_len": 16}
TOKENS = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    def run(scheme: str, algorithm: str, model: dict | None = None, **options: Any) -> Any:
        source = tiny_model(**{"family": "qwen3", "layers": 2, **SHAPE, **(model or {})})
        format, target = options.pop("format", ""), options.pop("smoothing_target", "")
        formats = (format,) if format else ()
        request = QuantizeOptions(
            source,
            tmp_path / "out",
            scheme,
            algorithm,
            **split_options(options),
            smoothing_target=target,
            formats=formats,
            keep_job=True,
        )
        if prepare_needs(request):
            request = replace(request, calib=calib_text, **CALIBRATED)
        checked = prepare(request)
        run_job(request, checked=checked)
        return checked

    return run


def prepare_needs(request: QuantizeOptions) -> bool:
    """Whether a request is refused without calibration data."""
    try:
        prepare(request)
    except MsQuantError as error:
        assert "needs calibration data" in str(error)
        return True
    return False


@pytest.mark.parametrize(
    ("scheme", "algorithm", "options"),
    [
        ("W8A8", "osl+gptq", {}),
        ("W8A8", "histogram", {}),
        ("W8A8", "percentile+clip", {"share": 0.999}),
        ("W8A8", "osl", {"smoothing_target": "norm"}),
        ("W8A8_MIX", "flexsmooth", {}),
        ("W8A8", "smoothquant+gptq", {"format": "ascend"}),
        ("W8A8_DYNAMIC", "awq", {"format": "ascend"}),
        ("W8A8", "smoothquant+gptq", {"format": "compressed-tensors"}),
        ("W8A8_DYNAMIC", "clip", {"format": "compressed-tensors"}),
        ("W8A16", "minmax", {"group_size": 32, "symmetric": False}),
        ("W8A8_DYNAMIC", "smoothquant+gptq", {"alpha": 0.4}),
        ("W8A8_MIX", "osl", {}),
        ("W8A16", "awq", {"exponents": 4}),
        ("W4A16", "awq+gptq", {"group_size": 32, "exponents": 3}),
        ("W4A16", "gptq", {"group_size": 64, "symmetric": False}),
        ("W4A16", "gptq", {"group_size": 64, "act_order": True, "static_groups": True}),
        ("W4A8_DYNAMIC", "ssz+gptq", {}),
        ("W4A8_DYNAMIC", "smoothquant+clip", {"group_size": 32}),
        ("W4A4_DYNAMIC", "quarot+smoothquant+gptq", {}),
        ("W4A4_MXFP4", "quarot+gptq", {"rule": "mxfp4_cann0"}),
        ("W4A4_MXFP4_DUALSCALE", "smoothquant", {"smoothing_target": "norm"}),
        ("W4A4_MXFP4_DUALSCALE", "smoothquant", {}),
        ("W8A8", "smoothquant+gptq", {"format": "mindie-sd"}),
        ("W8A8_PER_TENSOR", "osl", {}),
        ("W8A8_DYNAMIC", "awq", {"format": "mindie-sd"}),
        ("W4A4_MXFP4", "smoothquant", {"format": "mindie-sd"}),
        ("W4A16", "gptq", {"format": "mindie-sd", "group_size": 0}),
        ("W4A4_MXFP4_SVD", "smoothquant", {"rank": 4}),
        ("W16A16S", "quarot", {"sparsity": 0.5}),
        ("W8A8S", "smoothquant", {"sigma": 3.0}),
        ("W8A8S", "minmax", {"whole": True, "fraction": 0.05}),
        ("W8A8FP8_DYNAMIC", "smoothquant+gptq", {}),
        ("W4A4_FLATQUANT_DYNAMIC", "smoothquant+gptq", {"steps": 5}),
    ],
)
def test_what_was_written_is_what_was_made(make, scheme, algorithm, options):
    """Fake-quantized and stored are the same bits: every linear, and so every prediction."""
    checked = make(scheme, algorithm, {"family": "qwen2"}, **options)
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    written = open_model(checked.options.output)
    x = np.random.default_rng(1).standard_normal((7, 128), np.float32)
    for path in checked.plan.quantized():
        ours, theirs = job.linear(path), written.linear(path)
        assert ours is not None and theirs is not None
        part = x[:, : ours.weight.shape[1]]
        for decode in (False, True):
            np.testing.assert_array_equal(theirs.forward(part, decode), ours.forward(part, decode))
    found = verify_checkpoint(checked.options.output, checked.options.model)
    assert found.problems == ()
    for decode in (False, True) if written.phased else (False,):
        ours, theirs = (token_losses(m, TOKENS, decode=decode) for m in (job, written))
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_is_an_ordinary_one(make, tied):
    checked = make("W8A8_DYNAMIC", "quarot", {"tied": tied})
    directory, source = checked.options.output, checked.options.model
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in Checkpoint(directory).names
    assert load_config(directory).tied is False
    proof = verify_checkpoint(directory, source)
    assert proof.problems == () and proof.made_again == 14
    before = perplexity(open_model(source), TOKENS).loss
    after = perplexity(open_model(directory), TOKENS).loss
    assert abs(after - before) < 0.05
    record = json.loads((directory / RECORD).read_text())
    for wrong in (1, None, "0", -1):
        record["record"]["algorithm_options"]["quarot"]["seed"] = wrong
        write_json(directory / RECORD, seal({k: v for k, v in record.items() if k != "seal"}))
        assert verify_checkpoint(directory, source).problems, wrong


def test_another_seed_is_another_job(make):
    checked = make("W8A16", "quarot", None, seed=3)
    assert checked.record["algorithm_options"] == {"quarot": {"seed": 3, "block_size": 0}}


def test_both_phases_of_a_generation(make, monkeypatch):
    """The first token is predicted with dynamic inputs, all later ones with static ones."""
    checked = make("W8A8_MIX", "minmax")
    model, seen = open_model(checked.options.output), []
    assert model.phased
    call, step = QuantizedForward.__call__, QuantizedForward.step

    def spy(self: Any, rows: np.ndarray, decode: bool = False) -> np.ndarray:
        seen.append((len(rows), decode))
        return call(self, rows, decode)

    def spy_on_step(self: Any, rows: np.ndarray) -> np.ndarray:
        seen.append((len(rows), True))
        return step(self, rows)

    monkeypatch.setattr(QuantizedForward, "__call__", spy)
    monkeypatch.setattr(QuantizedForward, "step", spy_on_step)
    list(Generator(model).generate(np.array([5, 6, 7]), 3))
    linears = len(checked.plan.quantized())
    assert seen[:linears] == [(3, False)] * linears
    assert set(seen[linears:]) == {(1, True)}
    losses = [perplexity(model, TOKENS, decode=decode).loss for decode in (False, True)]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1


def test_smoothing_does_not_change_what_a_float_model_computes(make):
    """With 8 bits on both sides folding into norms, values and gates leaves the losses alone."""
    checked = make("W8A8_DYNAMIC", "smoothquant", {"family": "qwen2"}, alpha=0.9)
    job = checked.job()
    changed = [
        name
        for name in ("input_layernorm.weight", "self_attn.v_proj.bias")
        if job.changed_tensor(f"model.layers.0.{name}") is not None
    ]
    assert len(changed) == 2
    before = perplexity(open_model(checked.options.model), TOKENS).loss
    after = perplexity(open_model(checked.options.output), TOKENS).loss
    assert abs(after - before) < 0.05


@pytest.mark.parametrize(
    ("named", "settings", "message"),
    [
        ({}, ["group_size"], r"^--set 'group_size': expected NAME=VALUE, each name once$"),
        ({}, ["=1"], r"^--set '=1': expected NAME=VALUE"),
        ({"alpha": 0.5}, ["alpha=0.6"], r"^--set 'alpha=0\.6': expected NAME=VALUE, each"),
    ],
)
def test_malformed_settings_are_refused(named, settings, message):
    with pytest.raises(MsQuantError, match=message):
        split_options(named, settings)


def test_settings_go_where_they_belong():
    found = split_options(
        {"alpha": 0.4, "group_size": None}, ["group_size=64", "symmetric=False", "gptq.damping=0.1"]
    )
    assert found == {
        "scheme_options": {"group_size": 64, "symmetric": False},
        "algorithm_options": {"alpha": 0.4, "gptq.damping": "0.1"},
    }
