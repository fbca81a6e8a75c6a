"""Latent attention in int8: calibrated, written, proved, evaluated, refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sealed import seal_again
from served_deepseek import MODEL, source
from slow_deepseek import Float, VllmAscend, read_tensors

from ms_quant.analysis.run import analyze
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import JobModel, open_model
from ms_quant.job.output_directory import RECORD
from ms_quant.models.config import load_config
from ms_quant.pipeline.planning import plan_of_recipe
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.quantization.work import BlockWork
from ms_quant.recipe import Recipe, load_recipe
from ms_quant.serve.check import serve_check
from ms_quant.verify.checkpoint import verify_checkpoint

DESCRIPTION = "quant_model_description.json"
WINDOWS, LENGTH, OUTSIDE = 3, 384, 10_000
CALIBRATION = np.random.default_rng(5).integers(0, 2048, (WINDOWS, LENGTH)).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, 2048, (2, 24)).astype(np.int32)
KINDS = "C8", "C8_ABSMAX"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("latent") / "float")


def seen(model: Path) -> dict[str, Any]:
    calib = model.with_name("tokens.npz")
    np.savez(calib, tokens=CALIBRATION)
    return {"calib": calib, "samples": WINDOWS, "seq_len": LENGTH}


def options(model: Path, output: Path, scheme: str = "W8A8", **more: Any) -> QuantizeOptions:
    return QuantizeOptions(model, output, scheme, **{"kv_cache": "C8", **seen(model), **more})


@pytest.fixture(scope="module")
def made(model: Path) -> Callable[[str], Any]:
    """Finished jobs by the kind of their cache."""
    found: dict[str, Any] = {}

    def one(kind: str) -> Any:
        if kind not in found:
            request = options(model, model.with_name(kind), kv_cache=kind, keep_job=True)
            found[kind] = prepare(request)
            run_job(request, checked=found[kind])
        return found[kind]

    return one


def shortest_stretch(values: np.ndarray) -> float:
    """How far the recall window of all values of a head in a window of tokens reaches."""
    ordered = np.sort(values, axis=None)
    size = ordered.size - ordered.size // OUTSIDE
    stretches = [
        (ordered[start + size - 1] - ordered[start], start)
        for start in range(ordered.size - size + 1)
    ]
    start = min(stretches)[1]
    return max(abs(ordered[start]), abs(ordered[start + size - 1]))


def reach(values: np.ndarray, kind: str) -> float:
    return float(np.abs(values).max()) if kind == "C8_ABSMAX" else shortest_stretch(values)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_of_what_the_float_model_reads(made, model, kind):
    written, slow = read_tensors(made(kind).options.output), Float(model)
    for window in CALIBRATION:
        slow.losses(window)
    for path, seen in slow.seen.items():
        for head in range(4):
            found = written[f"{path}fa_q.scale"][head, 0]
            expected = max(reach(queries[head], kind) for queries, _ in seen) / 127
            assert found == pytest.approx(expected, rel=1e-4)
        expected = max(reach(latents, kind) for _, latents in seen) / 127
        assert written[f"{path}fa_k.scale"][0, 0] == pytest.approx(expected, rel=1e-4)
        largest = max(np.abs(latents).max() for _, latents in seen) / 127
        assert written[f"{path}fa_v.scale"][0, 0] == pytest.approx(largest, rel=1e-4)
    assert len(slow.seen) == 2


def test_both_definitions_differ(made):
    recall, absmax = (read_tensors(made(kind).options.output) for kind in KINDS)
    name = "model.layers.1.self_attn.fa_q.scale"
    assert (recall[name] <= absmax[name]).all() and (recall[name] < absmax[name]).any()
    name = "model.layers.1.self_attn.fa_v.scale"
    np.testing.assert_array_equal(recall[name], absmax[name])


def test_bytes_and_entries(made):
    output = made("C8").options.output
    stored, found = read_tensors(output), json.loads((output / DESCRIPTION).read_text())
    table = {
        "fa_q.scale": (np.float32, (4, 1)),
        "fa_q.offset": (np.int8, (4, 1)),
        "fa_k.scale": (np.float32, (1, 1)),
        "fa_k.offset": (np.int8, (1, 1)),
        "fa_v.scale": (np.float32, (1, 1)),
        "fa_v.offset": (np.int8, (1, 1)),
    }
    expected = {"fa_quant_type": "FAKQuant"}
    for layer in (0, 1):  # 2 drafts, with a cache in float
        path = f"model.layers.{layer}.self_attn."
        expected[f"{path}quant_type"] = "INT8"
        for suffix, (dtype, shape) in table.items():
            tensor = stored[path + suffix]
            assert (tensor.dtype, tensor.shape) == (dtype, shape)
            expected[path + suffix] = "FAQuant"
        assert not any(stored[f"{path}fa_{name}.offset"].any() for name in "qkv")
    said = {k: v for k, v in found.items() if "fa_" in k or k.endswith(".quant_type")}
    assert said == expected
    assert not {"kv_cache_type", "kv_quant_type"} & found.keys()
    names = {name for name in stored if ".fa_" in name}
    assert names == {key for key in expected if ".fa_" in key}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_what_was_made_and_what_the_runtime_computes(made, model, kind):
    checked = made(kind)
    output, written = checked.options.output, open_model(checked.options.output)
    assert verify_checkpoint(output, model).problems == ()
    assert inspect_checkpoint(output)["kv_cache"] == "C8"
    assert json.loads((output / RECORD).read_text())["record"]["kv_cache"] == kind
    losses = token_losses(written, TOKENS)
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    np.testing.assert_array_equal(losses, token_losses(job, TOKENS))
    np.testing.assert_array_equal(losses, token_losses(written, TOKENS, kv_cache="C8"))
    exact = token_losses(written, TOKENS, kv_cache="float")
    assert not np.array_equal(losses, exact)
    assert losses.mean() == pytest.approx(exact.mean(), rel=0.02)
    runtime = VllmAscend(output)
    for tokens, ours in zip(TOKENS, losses, strict=True):
        np.testing.assert_allclose(runtime.losses(tokens), ours, atol=2e-3)


def test_the_cache_changes_no_linear(made, model, tmp_path):
    found = read_tensors(made("C8").options.output)
    plain = options(model, tmp_path / "plain", kv_cache="float", formats=("ascend",))
    run_job(plain)
    expected = read_tensors(plain.output)
    assert set(found) - set(expected) == {name for name in found if ".fa_" in name}
    for name, tensor in expected.items():
        assert tensor.tobytes() == found[name].tobytes(), name


def test_experts_one_by_one_give_what_the_whole_block_does(made, model, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockWork, "by_experts", lambda self, index: False)
    whole = options(model, tmp_path / "whole")
    run_job(whole)
    one, other = (read_tensors(path) for path in (made("C8").options.output, whole.output))
    for name in (name for name in one if ".fa_" in name):
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"formats": ("golden-stick",)},
            "kv cache C8: a golden-stick checkpoint cannot hold it, expected --format ascend",
        ),
        (
            {"scheme": "attention=FLOAT,W8A8_DYNAMIC", "formats": ("ascend",)},
            r"model.layers.0.self_attn.q_a_proj: is FLOAT, expected W8A8 of all that is before "
            "latent attention, or W8A8_DYNAMIC of all: with an int8 cache vllm-ascend reads",
        ),
        (
            {"scheme": "W8A8_DYNAMIC", "exclude": ("*.q_b_proj",), "formats": ("ascend",)},
            r"model.layers.0.self_attn.q_b_proj: is FLOAT, expected W8A8 of all",
        ),
    ],
)
def test_refusals(model, tmp_path, more, message):
    with pytest.raises(MsQuantError, match=message):
        prepare(options(model, tmp_path / "out", **more))


def test_models_that_no_runtime_has_it_for_are_refused(tmp_path, tiny_model):
    plain = source(tmp_path / "plain", q_lora_rank=None)
    with pytest.raises(MsQuantError, match="q_lora_rank is null, expected a rank: with an int8"):
        prepare(options(plain, tmp_path / "out", "W8A8_DYNAMIC", formats=("ascend",)))
    dense = tiny_model(layers=1)
    with pytest.raises(MsQuantError, match=r"C8_ABSMAX is of latent attention, which .* has none"):
        prepare(options(dense, tmp_path / "out", "W8A16", kv_cache="C8_ABSMAX"))


@pytest.mark.parametrize(
    "more", [{"algorithm": "quarot+smoothquant"}, {"dtype": "float16"}], ids=["rotated", "float16"]
)
def test_scales_are_of_the_model_that_was_written(model, tmp_path, more):
    """A rotation turns latent vectors and their scales alike, smoothing changes neither."""
    chosen = options(model, tmp_path / "out", keep_job=True, **more)
    checked = prepare(chosen)
    run_job(chosen, checked=checked)
    assert verify_checkpoint(chosen.output, model).problems == ()
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    losses = token_losses(open_model(chosen.output), TOKENS)
    np.testing.assert_array_equal(losses, token_losses(job, TOKENS))
    exact = token_losses(open_model(chosen.output), TOKENS, kv_cache="float")
    assert 0 < np.abs(losses - exact).mean() < 0.15  # of about 8
    if "dtype" not in more:
        runtime = VllmAscend(chosen.output)
        for tokens, ours in zip(TOKENS, losses, strict=True):
            np.testing.assert_allclose(runtime.losses(tokens), ours, atol=5e-3)


def test_analysis_says_what_each_layer_costs(model):
    found = analyze(model, seen(model)["calib"], list(KINDS), samples=WINDOWS, seq_len=LENGTH)
    groups = [group for group in found.groups if group.kind == "kv_cache"]
    assert [group.block for group in groups] == [0, 1]
    for group in groups:
        assert group.linears[0] == f"model.layers.{group.block}.self_attn.fa_q"
        errors = [group.schemes[kind].block_error for kind in KINDS]
        assert all(0 < error < 0.01 for error in errors) and errors[0] != errors[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kv_cache", "float", "kv_cache is 'float', expected 'C8'"),
        ("float_caches", [1], r"float_caches is \[1\], expected None"),
    ],
)
def test_a_record_that_says_otherwise(made, tmp_path, key, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(made("C8").options.output, copy)
    record = json.loads((copy / RECORD).read_text())
    record["record"][key] = value
    (copy / RECORD).write_text(json.dumps(record))
    seal_again(copy)
    assert re.search(message, " ".join(verify_checkpoint(copy).problems))


def recipe(*exclude: str, **more: Any) -> Recipe:
    return load_recipe(
        {
            "apiversion": "ms_quant_v1",
            "rules": [{"scheme": "W8A8_DYNAMIC"}],
            "kv_cache": "C8",
            "kv_cache_exclude": list(exclude),
            **more,
        }
    )


def test_a_recipe_leaves_the_cache_of_layers_in_float(made, model, tmp_path):
    excluded = recipe("*.0.self_attn")
    chosen = QuantizeOptions(model, tmp_path / "out", recipe=excluded, **seen(model))
    run_job(chosen)
    stored, whole = read_tensors(chosen.output), read_tensors(made("C8").options.output)
    found = {name for name in stored if ".fa_" in name}
    assert found == {name for name in whole if "layers.1.self_attn.fa_" in name}
    for name in found:
        assert stored[name].tobytes() == whole[name].tobytes()
    assert verify_checkpoint(chosen.output, model).problems == ()
    record = json.loads((chosen.output / RECORD).read_text())["record"]
    assert (record["kv_cache"], record["float_caches"]) == ("C8", [0])
    cached = open_model(chosen.output)
    assert cached.cache_scales(0) is None and cached.cache_scales(1)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("*.7.self_attn", r"pattern '\*.7.self_attn' matches no attention, expected one such as"),
        ("*", "every cache stays float, expected no kv_cache"),
    ],
)
def test_excluded_layers_that_are_refused(model, exclude, message):
    config = load_config(model)
    with pytest.raises(MsQuantError, match=message):
        plan_of_recipe(config, recipe(exclude), np.dtype(np.float16))


def test_a_recipe_for_attention_is_refused_without_latent_attention(tiny_model):
    attention = {"type": "fa3_quant", "exclude": ["model.layers.0.*"]}
    linear = {
        "type": "linear_quant",
        "qconfig": {
            "act": {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"},
            "weight": {
                "scope": "per_channel",
                "dtype": "int8",
                "symmetric": True,
                "method": "minmax",
            },
        },
    }
    document = {"apiversion": "modelslim_v1", "spec": {"process": [linear, attention]}}
    dense, dtype = load_config(tiny_model(layers=1)), np.dtype(np.float16)
    with pytest.raises(MsQuantError, match="fa3_quant is for latent attention here; possible is"):
        plan_of_recipe(dense, load_recipe(document), dtype)
    with pytest.raises(MsQuantError, match="kv_cache_exclude: runtimes have one kind of cache"):
        plan_of_recipe(dense, recipe("*.0.self_attn"), dtype)


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def changed(output: Path, copy: Path, change: Change) -> Path:
    """A checkpoint as others might have made it: without a record."""
    shutil.copytree(output, copy)
    (copy / RECORD).unlink()
    (file,) = copy.glob("*.safetensors")
    tensors, said = load_file(file), json.loads((copy / DESCRIPTION).read_text())
    change(tensors, said)
    save_file(tensors, file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (copy / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    (copy / DESCRIPTION).write_text(json.dumps(said))
    return copy


def without(layer: int) -> Change:
    """The cache of a layer stays float, as recipes by others leave some."""

    def change(tensors: dict[str, np.ndarray], said: dict[str, Any]) -> None:
        path = f"model.layers.{layer}.self_attn."
        for name in [name for name in tensors if name.startswith(f"{path}fa_")]:
            del tensors[name], said[name]
        del said[f"{path}quant_type"]

    return change


def test_checkpoints_of_others_are_read_whatever_layers_they_leave_out(made, tmp_path):
    copy = changed(made("C8").options.output, tmp_path / "copy", without(0))
    found, whole = open_model(copy), open_model(made("C8").options.output)
    assert found.cache_scales(0) is None
    for path, scale in whole.cache_scales(1).items():
        np.testing.assert_array_equal(found.cache_scales(1)[path], scale)
    assert inspect_checkpoint(copy)["kv_cache"] == "C8"
    losses = token_losses(found, TOKENS)
    for tokens, ours in zip(TOKENS, losses, strict=True):
        np.testing.assert_allclose(VllmAscend(copy).losses(tokens), ours, atol=2e-3)
    assert verify_checkpoint(copy).problems == ()


def older(tensors: dict[str, np.ndarray], said: dict[str, Any]) -> None:
    """As msModelSlim's older versions write it."""
    said["fa_quant_type"] = "FAQuant"
    for layer in (0, 1):
        del said[f"model.layers.{layer}.self_attn.quant_type"]
    for name in [name for name in tensors if ".fa_" in name]:
        tensors[name] = tensors[name].astype(np.float16)


def test_older_files_are_read(made, tmp_path):
    copy = changed(made("C8").options.output, tmp_path / "copy", older)
    found = verify_checkpoint(copy)
    assert found.problems == () and any("FAQuant" in note for note in found.notes)


def sets(name: str, value: Any, inside: int | None = None) -> Change:
    def change(tensors: dict[str, np.ndarray], said: dict[str, Any]) -> None:
        if inside is None:
            said[name] = value
        else:
            tensors[name][inside] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sets("model.layers.1.self_attn.fa_q.scale", 0, 2), "fa_q.scale: 1 of 4 scales are not"),
        (sets("model.layers.0.self_attn.fa_k.offset", 3, 0), "fa_k.offset: 1 of 1 offsets are not"),
        (sets("fa_quant_type", "FP8"), "fa_quant_type is 'FP8', expected 'FAKQuant' or 'FAQuant'"),
        (sets("model.layers.0.self_attn.quant_type", "FP8_DYNAMIC"), "attention is read that is"),
        (sets("kv_cache_type", "C8"), "kv_cache_type is 'C8', expected fa_quant_type of latent"),
    ],
)
def test_broken_files(made, tmp_path, change, message):
    copy = changed(made("C8").options.output, tmp_path / "copy", change)
    assert message in " ".join(verify_checkpoint(copy).problems)


def test_serve_check(made, model, tmp_path):
    found = serve_check(made("C8").options.output, "vllm-ascend", tp=2)
    assert found["problems"] == []
    assert any("latent vectors are cached in int8 only on inst" in note for note in found["notes"])
    rows = {(row["kind"], row["weight"]): row["method"] for row in found["loaded"]}
    assert rows["fa_q", "float32 2 x 1"] == rows["fa_k", "float32 1 x 1"] == "FAQuant"
    rules = options(model, tmp_path / "float-q_b", "W8A8_DYNAMIC", exclude=("*.q_b_proj",))
    run_job(rules)  # in no format that was asked for: ms-quant alone reads it
    (problem,) = serve_check(rules.output, "vllm-ascend")["problems"]
    assert "self_attn.q_b_proj: is FLOAT, expected W8A8 of all that is before" in problem


def test_the_model_is_what_it_is_tested_for():
    """Recall windows leave something out: each head has more values than one in 10,000."""
    assert LENGTH * MODEL["kv_lora_rank"] >= OUTSIDE
