"""The msmodelslim target where it differs: nothing fused, padded or split, the bias folded in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  so that the safetensors library knows bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.numerics.linear import folded_bias
from sparse_compress.cli import app
from sparse_compress.codec import decompress_matrix
from sparse_compress.layouts import find_target
from sparse_compress.pipeline.run import run
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.verify.checkpoint import verify

WEIGHTS = "quant_model_weight_w8a8sc.safetensors"
DESCRIPTION = "quant_model_description_w8a8sc.json"
LAYER = "model.layers.0"
Make = Callable[..., Any]


@pytest.fixture
def msmodelslim(make: Make) -> Make:
    def one(model: dict[str, Any] | None = None, **options: Any) -> Any:
        return make(model, tp=1, target="msmodelslim", **options)

    return one


def opened(directory: Path) -> SparseModel:
    model = open_w8a8sc(directory)
    assert isinstance(model, SparseModel)
    return model


@pytest.mark.parametrize("model", [{"family": "qwen2"}, {"family": "llama", "biases": True}])
def test_a_bias_is_folded_into_quant_bias(msmodelslim: Make, model: dict[str, Any]) -> None:
    made = msmodelslim(model)
    tensors, source = load_file(made.output / WEIGHTS), load_file(made.source / "model.safetensors")
    name = f"{LAYER}.self_attn.q_proj"
    coded = (tensors[f"{name}.{suffix}"] for suffix in ("weight", "index", "info"))
    weight = decompress_matrix(*coded).astype(np.int64)
    deq = tensors[f"{name}.deq_scale"].astype(np.int32).view(np.float32).astype(np.float64)
    units = np.rint(source[f"{name}.bias"].astype(np.float64) / deq)
    offset = int(tensors[f"{name}.input_offset"][0])
    expected = units - offset * weight.sum(axis=1)
    assert units.any()
    np.testing.assert_array_equal(tensors[f"{name}.quant_bias"], expected)
    assert f"{name}.bias" not in tensors
    assert verify(made.output, made.source).problems == ()


def test_a_folded_bias_is_what_evaluation_adds(msmodelslim: Make, make: Make) -> None:
    """Half a step of the integer sum is the most that folding changes."""
    model = {"family": "qwen2"}
    ours, theirs = opened(msmodelslim(model).output), opened(make(model, tp=1).output)
    name = f"{LAYER}.self_attn.k_proj"
    one, other = ours.linear(name), theirs.linear(name)
    assert one is not None and other is not None
    np.testing.assert_array_equal(one.weight, other.weight)
    # float16 rounds the other bias by at most 2 ** -11 of it.
    most = 0.5 * other.deq_scale * (1 + 1e-6) + np.abs(other.bias) * 2.0**-11
    assert (np.abs(one.bias - other.bias) <= most).all() and one.bias.any()


def test_a_wrong_folded_bias_is_found_with_the_source(msmodelslim: Make, damage: Make) -> None:
    made = msmodelslim({"family": "qwen2"})
    copy = damage(made)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.self_attn.v_proj.quant_bias"][3] += 1

    copy.edit(WEIGHTS, change)
    copy.reseal()
    assert verify(copy.directory).problems == ()
    sentence = f"{LAYER}.self_attn.v_proj.quant_bias: 1 of 128 values do not hold the source's bias"
    assert verify(copy.directory, made.source).problems == (sentence,)


def test_a_bias_that_int32_cannot_hold_is_refused(msmodelslim: Make) -> None:
    linear = opened(msmodelslim().output).linear(f"{LAYER}.mlp.down_proj")
    assert linear is not None
    bias = np.zeros(320, np.float32)
    bias[7] = 3e38
    with pytest.raises(MsQuantError, match=r"x\.quant_bias: 1 of 320 values do not fit int32"):
        folded_bias(replace(linear, bias=bias), "x")


def test_the_vocabulary_is_not_padded(msmodelslim: Make) -> None:
    made = msmodelslim()
    tensors = load_file(made.output / WEIGHTS)
    assert tensors["model.embed_tokens.weight"].shape == (310, 320)
    assert verify(made.output, made.source).problems == ()


def test_a_tied_head_is_stored_twice_and_stays_tied(msmodelslim: Make, damage: Make) -> None:
    made = msmodelslim({"tied": True})
    tensors = load_file(made.output / WEIGHTS)
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert verify(made.output, made.source).problems == ()
    windows = np.random.default_rng(1).integers(0, 300, (1, 8), np.int32)
    assert perplexity(opened(made.output), windows).perplexity > 0
    copy = damage(made)
    copy.edit(WEIGHTS, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 7))
    copy.reseal()
    sentence = "lm_head.weight: differs from model.embed_tokens.weight, to which it is tied"
    assert verify(copy.directory).problems == (sentence,)


def test_a_linear_stays_uncompressed_on_its_own(msmodelslim: Make) -> None:
    """One key/value head of 64 channels is too narrow for the hardware; the query is not."""
    made = msmodelslim({"num_key_value_heads": 1})
    reasons = made.summary["uncompressed"]
    narrow = [f"{LAYER}.self_attn.{name}" for name in ("k_proj", "v_proj")]
    assert list(reasons) == narrow and "n = 64 output channels" in reasons[narrow[0]]
    tensors = load_file(made.output / WEIGHTS)
    assert tensors[f"{narrow[0]}.weight"].dtype == np.float16
    assert f"{LAYER}.self_attn.q_proj.index" in tensors
    assert verify(made.output, made.source).problems == ()


def test_an_excluded_linear_takes_its_group_with_it(msmodelslim: Make) -> None:
    made = msmodelslim(exclude=("*.k_proj",))
    names = {name.rpartition(".")[2] for name in made.summary["uncompressed"]}
    assert names == {"q_proj", "k_proj", "v_proj"}
    assert verify(made.output, made.source).problems == ()


def test_an_offset_is_a_whole_number_of_int8(msmodelslim: Make, damage: Make) -> None:
    copy = damage(msmodelslim())
    name = f"{LAYER}.mlp.down_proj.input_offset"
    copy.edit(WEIGHTS, lambda tensors: tensors[name].__setitem__(0, 3.5))
    copy.reseal()
    assert (
        f"{name}: 1280 of 1280 values are not those of an int8" in verify(copy.directory).problems
    )


def test_several_ranks_are_refused(msmodelslim: Make, tmp_path: Path) -> None:
    options = replace(msmodelslim().options, tp=2, output=tmp_path / "out")
    with pytest.raises(MsQuantError, match=r"not split over ranks, tp is 2, expected 1 \(--tp 1\)"):
        run(options)
    assert list(tmp_path.glob("out*")) == []


def test_targets_with_one_description_name_are_told_apart(make: Make, msmodelslim: Make) -> None:
    outputs = {"msmodelslim": msmodelslim().output, "vllm-mindspore": make(tp=1).output}
    for name, output in outputs.items():
        assert (output / DESCRIPTION).is_file()
        target = find_target(output)
        assert target is not None and target.name == name


def test_no_runtime_is_promised(msmodelslim: Make) -> None:
    sentence = "no runtime is documented to load the directory of msModelSlim as it is"
    assert msmodelslim().summary["not_served_by"] == [sentence]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_number_of_workers_changes_no_byte(
    msmodelslim: Make, tmp_path: Path, file_contents: Make, workers: str
) -> None:
    made = msmodelslim()
    options = replace(made.options, output=tmp_path / "again", workers=int(workers))
    run(options)
    assert file_contents(options.output) == file_contents(made.output)
    for command in ("verify", "info"):
        arguments = [command, str(made.output), "--json", "--workers", workers]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0 and json.loads(done.stdout)


def test_no_workers_at_all_are_refused(msmodelslim: Make) -> None:
    done = CliRunner().invoke(app, ["info", str(msmodelslim().output), "--workers", "0"])
    assert done.exit_code == 2
