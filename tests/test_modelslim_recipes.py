"""Recipes of msModelSlim on a model: what reaches which linear, what is noted, where data is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import open_model
from ms_quant.pipeline.options import read_recipe
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.recipe import load_recipe
from ms_quant.verify.checkpoint import verify_checkpoint
from sparse_compress.msmodelslim.compress import check, compress
from sparse_compress.msmodelslim.directory import ModelSlimDirectory

INT8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
DYNAMIC = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "layers": 2}
WINDOWS = {"samples": 4, "seq_len": 16}
LAYER = "model.layers.0."


def linear(act: dict, *include: str, exclude: tuple[str, ...] = ()) -> dict[str, Any]:
    qconfig = {"act": act, "weight": INT8}
    patterns = {"include": list(include or "*"), "exclude": list(exclude)}
    return {"type": "linear_quant", "qconfig": qconfig, **patterns}


def newer(*process: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"apiversion": "modelslim_v1", "spec": {"process": list(process), **spec}}


def older(calib: dict[str, Any], **spec: Any) -> dict[str, Any]:
    config = {"mm_tensor": False, **calib}
    return {"apiversion": "modelslim_v0", "spec": {"calib_cfg": config, **spec}}


@pytest.fixture
def plan(tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    def run(recipe: dict[str, Any], family: str = "qwen2", **more: Any) -> Any:
        source = tiny_model(family, family=family, **SHAPE)
        loaded = replace(load_recipe(recipe), calib=str(calib_text))
        return prepare(QuantizeOptions(source, tmp_path / "out", recipe=loaded, **WINDOWS, **more))

    return run


def kinds(checked: Any, layer: str = LAYER) -> dict[str, str]:
    """Linear of a block to its scheme and algorithms; what stays float is left out."""
    found = {}
    for path in checked.plan.quantized():
        if path.startswith(layer):
            layer_plan = checked.plan.quantized_layer(path)
            names = layer_plan.scheme.name, *layer_plan.algorithms.names
            found[path.rpartition(".")[2]] = "+".join(names)
    return found


def test_the_first_rule_that_reaches_a_linear_holds(plan):
    first = linear(TENSOR, "*self_attn*", exclude=("*.o_proj",))
    found = kinds(plan(newer(first, linear(DYNAMIC, exclude=("*.1.*",)))))
    qkv = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "W8A8")
    others = ("o_proj", "gate_proj", "up_proj", "down_proj")
    assert found == {**qkv, **dict.fromkeys(others, "W8A8_DYNAMIC")}


def test_patterns_of_smoothing_name_what_it_is_folded_into(plan):
    smooth = {"type": "iter_smooth", "include": ["*self_attn*", "*post_attention_layernorm"]}
    found = kinds(plan(newer(smooth, linear(TENSOR))))
    smoothed = [name for name, kind in found.items() if kind == "W8A8+smoothquant"]
    assert sorted(smoothed) == ["gate_proj", "o_proj", "up_proj"]


def test_fused_linears_stay_float_together_and_that_is_noted(plan):
    names = ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    checked = plan(older({"disable_names": [*names, "model.layers.9.mlp.down_proj"]}))
    assert sorted(kinds(checked)) == ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert sorted(kinds(checked, "model.layers.1.")) == [
        "down_proj",
        "gate_proj",
        "o_proj",
        "up_proj",
    ]
    idle, fused = checked.notes
    assert idle == (
        "spec.calib_cfg: pattern 'model.layers.9.mlp.down_proj' matches nothing of this model; "
        "near it is 'model.layers.1.mlp.down_proj'"
    )
    assert fused.startswith("model.layers.0.mlp.up_proj and 2 more stay float, too")


def test_names_that_are_not_smoothed_leave_out_their_group(plan):
    anti = {"anti_method": "m4", "disable_anti_names": [f"{LAYER}self_attn.k_proj"]}
    checked = plan(older({"w_bit": 8}, anti_cfg=anti))
    found = kinds(checked)
    assert {name for name, kind in found.items() if kind == "W8A8"} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert set(kinds(checked, "model.layers.1.").values()) == {"W8A8+smoothquant"}
    with pytest.raises(MsQuantError, match=r"^qwen3: spec\.anti_cfg\.anti_method m4 shifts inputs"):
        plan(older({"w_bit": 8}, anti_cfg=anti), "qwen3")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            newer(linear(DYNAMIC, "*mlp.experts*")),
            r"spec\.process\[0\]: pattern '\*mlp\.experts\*' ma",
        ),
        (
            newer(linear(DYNAMIC, "*.q_proj"), linear(TENSOR, "*.{k,v}_proj")),
            r"q_proj would be W8A8_DYNAMIC with minmax and .*k_proj W8A8 with minmax, expected one",
        ),
        (
            newer({"type": "quarot", "block_size": 32}, linear(TENSOR)),
            "head_dim is 16, expected a mu",
        ),
    ],
)
def test_what_a_model_refuses(plan, recipe, words):
    with pytest.raises(MsQuantError, match=words):
        plan(recipe)


def test_a_rotation_in_blocks_is_verified(plan, tmp_path):
    saver = [{"type": "ascendv1_saver"}]
    checked = plan(newer({"type": "quarot", "block_size": 8}, linear(TENSOR), save=saver))
    assert checked.record["algorithm_options"]["quarot"] == {"seed": 0, "block_size": 8}
    run_job(checked.options, checked=checked)
    proof = verify_checkpoint(tmp_path / "out", checked.options.model)
    assert proof.problems == () and proof.made_again == 14


def test_sparse_weights_are_written_and_compressed(tiny_model, tmp_path, calib_text):
    shape = {"hidden_size": 384, "intermediate_size": 384, "head_dim": 64, "layers": 1}
    source = tiny_model(family="qwen2", num_attention_heads=6, num_key_value_heads=2, **shape)
    sparse = older({"w_bit": 4, "is_lowbit": True, "use_sigma": True, "sigma_factor": 4.0})
    recipe = replace(load_recipe(sparse), calib=str(calib_text))
    options = QuantizeOptions(source, tmp_path / "out", recipe=recipe, dtype="float16", **WINDOWS)
    run_job(options)
    assert open_model(tmp_path / "out").format == "ascend W8A8S"
    assert verify_checkpoint(tmp_path / "out", source).problems == ()
    assert len(ModelSlimDirectory(tmp_path / "out").plain) == 7
    compress(check(tmp_path / "out", tmp_path / "coded"))
    assert len(ModelSlimDirectory(tmp_path / "coded").coded) >= 4


@pytest.mark.parametrize("up", [0, 1, 2])
def test_data_is_found_where_msmodelslim_has_it(tmp_path, monkeypatch, up):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "package" / "lab_practice" / "qwen3" / "recipe.yaml"
    data = [recipe.parent, *recipe.parents[1:]][up] / "lab_calib" / "prompts.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    data.write_text('{"text": "x"}')
    recipe.write_text(
        "apiversion: modelslim_v1\nspec: {dataset: prompts.jsonl, process: [{type: float_sparse}]}"
    )
    assert read_recipe(recipe).calib == str(data)
    (recipe.parent / "prompts.jsonl").write_text('{"text": "y"}')
    assert read_recipe(recipe).calib == str(recipe.parent / "prompts.jsonl")


def test_data_that_is_nowhere_is_asked_for(tiny_model, tmp_path, calib_text):
    recipe = load_recipe(newer(linear(TENSOR), dataset="boolq.jsonl"))
    options = QuantizeOptions(tiny_model(family="qwen2", **SHAPE), tmp_path / "out", recipe=recipe)
    with pytest.raises(MsQuantError, match=r"^boolq\.jsonl: the calibration data .*--calib FILE$"):
        prepare(options)
    assert prepare(replace(options, calib=calib_text, **WINDOWS)).tokens is not None


def test_notes_are_printed_by_a_dry_run(tiny_model, tmp_path, ms_quant_command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "apiversion: multimodal_vlm_modelslim_v1\n"
        "spec:\n"
        "  runner: dp_layer_wise\n"
        "  default_text: Describe.\n"
        "  process:\n"
        "  - type: linear_quant\n"
        f"    qconfig: {{act: {DYNAMIC}, weight: {INT8}}}\n"
        "    exclude: ['*visual*']\n".replace("True", "true")
    )
    model = tiny_model(family="qwen3", **SHAPE)
    result = ms_quant_command(
        "quantize", model, "-o", tmp_path / "o", "--recipe", recipe, "--dry-run"
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert [line.split(" ")[1] for line in lines] == [
        "spec.default_text",
        "spec.runner:",
        "spec.process[0]:",
    ]
