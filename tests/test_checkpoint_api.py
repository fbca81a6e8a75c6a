"""Checkpoints from Python: real arguments, frozen results, docstrings whose examples run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from diffusion_models import save_pipeline
from typer.testing import CliRunner

import ms_quant
import sparse_compress
from ms_quant.cli.main import app
from ms_quant.errors import MsQuantError
from ms_quant.pipeline.defaults import DEFAULTS

FUNCTIONS = {
    name: getattr(ms_quant, name)
    for name in (
        *("quantize_checkpoint", "convert_checkpoint", "verify_checkpoint", "open_model"),
        *("perplexity", "compare", "generate", "load_recipe", "from_ptq_config"),
        "quantize_pipeline",
    )
}
FUNCTIONS["compress_checkpoint"] = sparse_compress.compress_checkpoint
WIDE = {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 12, "head_dim": 64}
RULE = {"scheme": "W8A16", "include": ["*"]}
RECIPE = {"apiversion": "ms_quant_v1", "rules": [RULE]}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_examples_of_a_docstring_run(name, tiny_model, calib_text, tmp_path, monkeypatch):
    shape = {"layers": 1, **WIDE} if name == "compress_checkpoint" else {}
    tiny_model("Qwen3-8B", **shape)
    save_pipeline(tmp_path / "Wan2.2-T2V-A14B-Diffusers", transformer="wan", transformer_2="wan")
    (tmp_path / "heldout.txt").write_text(calib_text.read_text())
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, "no example"
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_every_section_and_argument(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    for section in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert f"\n{section}\n" in text, section
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    missing = [p for p in inspect.signature(FUNCTIONS[name]).parameters if p not in arguments]
    assert not missing


def test_the_docstring_states_the_defaults():
    text = " ".join((inspect.getdoc(ms_quant.quantize_checkpoint) or "").split())
    for name, value in (("samples", DEFAULTS.samples), ("seq_len", DEFAULTS.seq_len)):
        found = text.partition(f" {name}: ")[2].partition(". ")[0]
        assert f"else {value} " in f"{found} ", name
    assert DEFAULTS.shard_bytes == 4 << 30 and "else 4 GiB" in text
    assert f"else {DEFAULTS.seed} dtype:" in text.replace(". dtype", " dtype")


def test_every_number_of_formats_gives_the_same_kind_of_result(tiny_model, tmp_path):
    model, told = str(tiny_model()), []
    one = ms_quant.quantize_checkpoint(
        model, str(tmp_path / "one"), "W8A8_DYNAMIC", progress=lambda *step: told.append(step)
    )
    two = ms_quant.quantize_checkpoint(
        model, str(tmp_path / "two"), "W8A8_DYNAMIC", formats=["ascend", "compressed-tensors"]
    )
    assert [output.path.name for output in one.outputs] == ["one"]
    assert [output.path.name for output in two.outputs] == ["ascend", "compressed-tensors"]
    assert ("reading the model", 1.0) in told and ("quantizing", 1.0) in told
    assert [row.group for row in one.outputs[0].report][:2] == [
        *("model.layers.0.qkv", "model.layers.0.o"),
    ]
    assert all(row.seconds is not None for output in two.outputs for row in output.report)
    again = ms_quant.quantize_checkpoint(model, tmp_path / "one", "W8A8_DYNAMIC")
    assert {row.seconds for row in again.outputs[0].report} == {None}  # its job is gone
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.outputs[0].scheme = "W8A16"  # type: ignore[misc]


def test_the_command_prints_what_the_function_returns(tiny_model, calib_text, tmp_path):
    model, output = tiny_model(dtype="float16"), tmp_path / "out"
    made = ms_quant.quantize_checkpoint(
        model, output, algorithm="osl", calibration=calib_text, samples=4, seq_len=16
    )
    arguments = ["quantize", model, "-o", output, "--algorithm", "osl", "--calib", calib_text]
    arguments += ["--samples", 4, "--seq-len", 16, "--json"]
    printed = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False).stdout
    assert json.loads(printed) == {**made.outputs[0].as_json(), "finished_before": True}
    assert not made.finished_before
    assert made.outputs[0].float16 is not None and made.outputs[0].float16.range
    chosen = json.loads((output / "ms_quant.json").read_text())["chosen"]["block 1"]["down"]
    assert made.outputs[0].report[-1].chosen == chosen and 0 <= chosen["alpha"] <= 1

    verified = ms_quant.verify_checkpoint(str(output), str(model))
    printed = (
        CliRunner()
        .invoke(
            app, ["verify", str(output), "--source", str(model), "--json"], catch_exceptions=False
        )
        .stdout
    )
    assert json.loads(printed) == verified.as_json() and verified.problems == ()


def test_a_recipe_may_be_a_record_a_mapping_or_a_path(tiny_model, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    for number, recipe in enumerate([ms_quant.load_recipe(RECIPE), RECIPE, path, str(path)]):
        model = tmp_path / "model" if number else tiny_model()
        made = ms_quant.quantize_checkpoint(model, tmp_path / f"out{number}", recipe=recipe)
        assert made.outputs[0].scheme == "W8A16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A16"}, "scheme: the recipe says what each linear becomes, expected one"),
        ({"algorithm": "osl"}, "algorithm: the recipe says"),
        ({"exclude": ["*"]}, "exclude: the recipe says"),
        ({"kv_cache": "C8"}, "kv_cache: the recipe says"),
        ({"algorithm_options": {"alpha": 0.5}}, "algorithm_options: the recipe says"),
        ({"formats": "ascend"}, "formats is 'ascend', expected a list of strings"),
    ],
)
def test_what_contradicts_is_refused(arguments, message, tiny_model, tmp_path):
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize_checkpoint(tiny_model(), tmp_path / "out", recipe=RECIPE, **arguments)
    assert not (tmp_path / "out").exists()


def test_an_opened_model_and_a_directory_are_the_same_model(tiny_model, calib_text):
    directory = tiny_model()
    model = ms_quant.open_model(directory)
    with pytest.raises(MsQuantError, match="an opened model has no tokenizer, expected tokenizer="):
        ms_quant.perplexity(model, calib_text)
    found = [
        ms_quant.perplexity(place, calib_text, seq_len=16, windows=2, tokenizer=directory).loss
        for place in (model, str(directory))
    ]
    assert found[0] == found[1] and np.isfinite(found[0])
    texts = [
        ms_quant.generate(m, "the", max_tokens=4, tokenizer=directory) for m in (model, directory)
    ]
    assert texts[0] == texts[1]


def test_a_float_model_is_checked_once(tiny_model, tmp_path, calib_text, monkeypatch):
    """For several formats and a rotation, too: it goes through every tensor of every shard."""
    module, calls = importlib.import_module("ms_quant.formats.float_model"), []
    check = module.check_model
    monkeypatch.setattr(module, "check_model", lambda *given: (calls.append(given), check(*given)))
    ms_quant.quantize_checkpoint(
        *(tiny_model(head_dim=8), Path(tmp_path / "out"), "W8A8_DYNAMIC"),
        algorithm="quarot",
        formats=["ascend", "compressed-tensors"],
    )
    assert len(calls) == 1
