"""Recipes through the whole pipeline: mixed schemes, several formats, refusals."""

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
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.files.atomic import write_json
from ms_quant.files.sealed import seal
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import JobModel, open_model
from ms_quant.job.directory import JobDirectory
from ms_quant.pipeline import request
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.estimate import estimate
from ms_quant.pipeline.options import read_recipe
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.recipe import Recipe, load_recipe
from ms_quant.verify.checkpoint import verify_checkpoint

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 4, "seq_len": 16}
TOKENS = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)
INT8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
DYNAMIC = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
MIXED = {"scope": "pd_mix", "dtype": "int8", "symmetric": False, "method": "minmax"}
PDMIX = {
    "apiversion": "modelslim_v1",
    "spec": {
        "process": [
            {"type": "iter_smooth", "alpha": 0.9, "enable_subgraph_type": ["norm-linear"]},
            {
                "type": "group",
                "configs": [
                    {
                        "type": "linear_quant",
                        "qconfig": {"act": MIXED, "weight": INT8},
                        "include": ["*"],
                        "exclude": ["*.down_proj", "model.layers.{0,7}.*o_proj"],
                    },
                    {
                        "type": "linear_quant",
                        "qconfig": {"act": DYNAMIC, "weight": INT8},
                        "include": ["*.down_proj"],
                    },
                ],
            },
        ],
        "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
    },
}
NATIVE = {
    "apiversion": "ms_quant_v1",
    "rules": [
        {"scheme": "W4A16", "options": {"group_size": 32}, "include": ["*.mlp.*"]},
        {"scheme": "W8A8_DYNAMIC", "include": ["*.0.self_attn.*"]},
        {"scheme": "W8A16", "include": ["*.1.self_attn.*"], "exclude": ["*.o_proj"]},
    ],
}


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    model: list[Path] = []

    def run(recipe: dict | Recipe | None, output: str = "out", **options: Any) -> Any:
        if not model:
            shape = {**SHAPE, **options.pop("model", {})}
            model.append(tiny_model(family="qwen2", layers=2, **shape))
        chosen = load_recipe(recipe) if isinstance(recipe, dict) else recipe
        wanted = QuantizeOptions(
            model[0], tmp_path / output, recipe=chosen, keep_job=True, **options
        )
        checked = prepare(wanted)
        run_job(wanted, checked=checked)
        return checked

    run.calibrated = {"calib": calib_text, **CALIBRATED}
    return run


def assert_written_as_made(checked: Any) -> None:
    job = JobModel(checked.plan, checked.job(), checked.tensors)
    output = checked.options.output
    written = open_model(output)
    np.testing.assert_array_equal(token_losses(written, TOKENS), token_losses(job, TOKENS))
    proof = verify_checkpoint(output, checked.options.model)
    assert proof.problems == () and proof.quantized == len(checked.plan.quantized())


def test_the_pdmix_recipe(make):
    checked = make(PDMIX, formats=("ascend",), **make.calibrated)
    description = checked.options.output / "quant_model_description.json"
    kinds = json.loads(description.read_text())
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "W8A8_MIX"
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == "FLOAT"
    assert kinds["model.layers.1.self_attn.o_proj.weight"] == "W8A8_MIX"
    assert kinds["model.layers.1.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    assert kinds["model_quant_type"] == "W8A8_MIX"  # after W8A8_DYNAMIC in the runtime's order
    assert open_model(checked.options.output).format == "ascend W8A8_DYNAMIC+W8A8_MIX"
    assert checked.plan.layer_of("model.layers.0.self_attn.q_proj").algorithms.names == (
        "smoothquant",
    )
    assert checked.plan.layer_of("model.layers.1.mlp.down_proj").algorithms.names == ()
    assert_written_as_made(checked)


def test_schemes_of_several_formats_find_one_that_holds_all(make):
    checked = make(NATIVE)
    config = json.loads((checked.options.output / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [4, 6, 3]
    assert config["quantization_config"]["ignore"][0] == "model.layers.1.self_attn.o_proj"
    assert checked.plan.scheme_name == "W8A8_DYNAMIC+W4A16+W8A16"
    assert_written_as_made(checked)


def test_one_rule_is_the_same_as_its_options(make, file_contents):
    recipe = {
        "apiversion": "ms_quant_v1",
        "rules": [{"scheme": "W8A8", "algorithms": ["histogram"], "exclude": ["*.down_proj"]}],
    }
    one = make(recipe, **make.calibrated)
    options = {"algorithm": "histogram", "exclude": ("*.down_proj",)}
    other = make(None, "other", **options, **make.calibrated)
    found, expected = (file_contents(p.options.output) for p in (one, other))
    assert {n: v for n, v in found.items() if n != "ms_quant.json"} == {
        n: v for n, v in expected.items() if n != "ms_quant.json"
    }


def rule(scheme: str, *include: str, **more: Any) -> dict[str, Any]:
    return {"scheme": scheme, "include": list(include) or ["*"], **more}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule("W8A16", "*.mpl.*")], r"rules\[0\]: pattern '\*\.mpl\.\*' matches no linear"),
        ([rule("W8A16", exclude=["*.7.*"])], r"rules\[0\]: pattern '\*\.7\.\*' matches no linear"),
        (
            [rule("W8A16", "lm_head")],
            r"rules\[0\]: pattern 'lm_head' names lm_head, which is float",
        ),
        ([rule("W8A16", "*.q_proj")], r"q_proj would be W8A16 with minmax and .*k_proj float, exp"),
        ([rule("W8A16"), rule("W4A16", "*.mlp.*")], r"is reached by .*rules\[0\] and .*rules\[1\]"),
        (
            [rule("W8A8_MIX", "*.mlp.*"), rule("W4A16", "*attn*", options={"group_size": 32})],
            r"no format holds all of W4A16, W8A8_MIX, expected",
        ),
    ],
)
def test_refused_before_any_work(make, tmp_path, rules, message):
    with pytest.raises(MsQuantError, match=message):
        make({"apiversion": "ms_quant_v1", "rules": rules})
    assert not (tmp_path / "out").exists()


def test_a_rotation_is_of_the_whole_model(make):
    steps = [{"algorithm": "quarot", "include": ["*.0.*"]}]
    recipe = {"apiversion": "ms_quant_v1", "rules": [rule("W8A16")], "steps": steps}
    with pytest.raises(MsQuantError, match=r"steps\[0\]: quarot rotates the whole model, expected"):
        make(recipe)
    steps = [{"algorithm": "quarot"}]
    rules = [rule("W8A8_DYNAMIC", "*.mlp.*"), rule("W8A16", "*.0.self_attn.*")]
    assert_written_as_made(make({**recipe, "rules": rules, "steps": steps}))


SEVERAL = ("golden-stick", "ascend", "compressed-tensors")


@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("W8A8", "smoothquant"), ("W8A8_DYNAMIC", "minmax")]
)
def test_several_formats_are_what_each_alone_is(make, file_contents, scheme, algorithm):
    options = {"scheme": scheme, "algorithm": algorithm}
    if scheme == "W8A8":
        options |= make.calibrated
    together = make(None, formats=SEVERAL, **options)
    for checked in together.all:
        (name,) = checked.options.formats
        alone = make(None, f"alone-{name}", formats=(name,), **options)
        found = file_contents(checked.options.output)
        assert found == file_contents(alone.options.output)
        assert verify_checkpoint(checked.options.output, checked.options.model).problems == ()
    assert sorted(p.name for p in together.options.output.parent.iterdir()) == sorted(SEVERAL)


@pytest.mark.parametrize("stopped", [1, 2, 3, 4])
def test_a_job_for_several_formats_goes_on(make, file_contents, monkeypatch, stopped):
    options = {"scheme": "W8A8", "formats": SEVERAL[:2], **make.calibrated}
    expected = file_contents(make(None, "whole", **options).options.output.parent)
    finish, count = JobDirectory.finish_block, 0

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == stopped:
            raise KeyboardInterrupt
        finish(*arguments)

    monkeypatch.setattr(JobDirectory, "finish_block", stop)
    with pytest.raises(KeyboardInterrupt):
        make(None, "again", **options)
    monkeypatch.setattr(JobDirectory, "finish_block", finish)
    again = make(None, "again", **options)
    assert file_contents(again.options.output.parent) == expected


def test_what_hubs_add_beside_several_formats_changes_nothing(make):
    options = {"scheme": "W8A16", "formats": ("ascend", "mindie-sd")}
    output = make(None, **options).options.output
    for place in (output, output.parent):
        for name in ("README.md", ".gitattributes", "configuration.json"):
            (place / name).write_text("")
    again = make(None, **options)
    assert all(request.output().finished for request in again.all)
    (output.parent / "model.safetensors").write_text("")
    with pytest.raises(MsQuantError, match=r"holds 'model\.safetensors', expected a new directory"):
        make(None, **options)


def test_a_format_twice_is_refused(make):
    with pytest.raises(MsQuantError, match="formats ascend, ascend: expected each once"):
        make(None, scheme="W8A16", formats=("ascend", "ascend"))


MX = {"scope": "per_block", "symmetric": True}
MX4 = {**MX, "dtype": "mxfp4", "method": "minmax"}
TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
FLOATS = {"scope": "per_tensor", "dtype": "float", "symmetric": True, "method": "none"}
INT4 = {"scope": "per_channel", "dtype": "int4", "symmetric": True, "method": "minmax"}
MODELSLIM: list[tuple[str, list[dict[str, Any]], str]] = [
    ("static", [{"act": TENSOR, "weight": INT8}], "ascend W8A8"),
    ("dynamic, gptq", [{"act": DYNAMIC, "weight": {**INT8, "method": "gptq"}}], "_DYNAMIC"),
    ("weight only, ssz", [{"act": FLOATS, "weight": {**INT8, "method": "ssz"}}], "ascend W8A16"),
    ("four bits", [{"act": DYNAMIC, "weight": INT4}], "ascend W4A8_DYNAMIC"),
    (
        "MXFP8",
        [
            {
                "act": {**MX, "dtype": "mxfp8", "method": "minmax"},
                "weight": {**MX, "dtype": "mxfp8", "method": "mse_round"},
            }
        ],
        "ascend W8A8_MXFP8",
    ),
    (
        "MXFP4",
        [
            {
                "act": {**MX, "dtype": "mxfp4", "method": "minmax"},
                "weight": {**MX, "dtype": "mxfp4", "method": "ceil_x"},
            }
        ],
        "ascend W4A4_MXFP4",
    ),
]


@pytest.mark.parametrize(("name", "qconfigs", "format"), MODELSLIM)
def test_recipes_of_modelslim_run(make, name, qconfigs, format):
    process = [{"type": "linear_quant", "qconfig": qconfig} for qconfig in qconfigs]
    recipe = {
        "apiversion": "modelslim_v1",
        "spec": {
            "runner": "auto",
            "process": process,
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
            "dataset": str(make.calibrated["calib"]),
        },
    }
    windows = {"samples": 4, "seq_len": 16} if name in ("static", "dynamic, gptq") else {}
    checked = make(recipe, **windows)
    assert format in open_model(checked.options.output).format
    assert_written_as_made(checked)


@pytest.mark.parametrize(
    ("process", "scheme"),
    [
        ([{"type": "float_sparse", "sparse_ratio": 0.25}], "W16A16S"),
        (
            [
                {"type": "svd_res", "rank": 4},
                {"type": "linear_quant", "qconfig": {"act": MX4, "weight": MX4}},
            ],
            "W4A4_MXFP4_SVD",
        ),
    ],
)
def test_recipes_that_name_a_format_which_no_runtime_serves_yet_run(make, process, scheme):
    saver = [{"type": "ascendv1_saver"}]
    recipe = {"apiversion": "modelslim_v1", "spec": {"process": process, "save": saver}}
    data = make.calibrated if scheme == "W16A16S" else {}
    checked = make(recipe, **data)
    assert open_model(checked.options.output).format == f"ascend {scheme}"
    assert_written_as_made(checked)


def test_the_example_of_the_document(make, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    _, _, every_key, *_ = text.split("```yaml\n")
    example = every_key.partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(example)
    recipe = replace(read_recipe(tmp_path / "recipe.yaml"), calib=None)
    checked = make(recipe, **make.calibrated)
    assert checked.plan.scheme_name == "W8A8_DYNAMIC+W8A16" and checked.plan.kv_cache == "C8"
    floats = checked.plan.float_linears()
    assert floats == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert_written_as_made(checked)


def smoothing(rules: list[dict[str, Any]], *groups: str, **more: Any) -> dict[str, Any]:
    step = {"algorithm": "smoothquant", "groups": list(groups), **more}
    return {"apiversion": "ms_quant_v1", "steps": [step], "rules": rules}


@pytest.mark.parametrize(
    ("recipe", "format", "target"),
    [
        (
            smoothing([rule("W8A8_DYNAMIC", "*attn*"), rule("W8A8", "*.mlp.*")]),
            "golden-stick",
            "norm",
        ),
        (smoothing([rule("W8A8", "*attn*")], "o"), "compressed-tensors", ""),
        (smoothing([rule("W8A8", "*attn*")], "o"), "mindie-sd", ""),
        (
            smoothing(
                [
                    rule("W8A8_DYNAMIC", "*.[qkv]_proj"),
                    rule("W4A4_MXFP4", "*.o_proj", "*.down_proj"),
                    rule("W8A8_PER_TENSOR", "*.{gate,up}_proj"),
                ]
            ),
            "mindie-sd",
            "norm",
        ),
    ],
)
def test_each_group_has_a_target_of_its_own(make, tmp_path, recipe, format, target, file_contents):
    made = make(recipe, formats=(format,), smoothing_target=target, **make.calibrated)
    assert_written_as_made(made)
    if format == "compressed-tensors":
        convert_checkpoint(made.options.output, tmp_path / "two", "golden-stick")
        assert verify_checkpoint(tmp_path / "two", made.options.model).problems == ()
        convert_checkpoint(tmp_path / "two", tmp_path / "three", format)
        assert file_contents(tmp_path / "three") == file_contents(made.options.output)


def test_both_phases_of_a_mixture_are_evaluated(make):
    recipe = smoothing([rule("W8A8_DYNAMIC", "*attn*"), rule("W8A8_MIX", "*.mlp.*")])
    made = make(recipe, **make.calibrated)
    assert open_model(made.options.output).phased
    assert not open_model(made.options.model).phased


def test_formats_that_leave_other_groups_float(make):
    """Rows of 28 inputs fill no words of eight, which one format needs."""
    options = {"scheme": "W4A16", "algorithm": "gptq", **make.calibrated}
    choices = {"scheme_options": {"group_size": 0}, "float_undivided": True}
    formats = ("compressed-tensors", "mindie-sd")
    model = {"intermediate_size": 28}
    made = make(None, model=model, formats=formats, **choices, **options)
    floats = [len(part.plan.float_linears()) for part in made.all]
    assert floats == [2, 0]
    for part in made.all:
        proof = verify_checkpoint(part.options.output, part.options.model)
        assert proof.problems == ()


def test_other_versions_of_a_job_for_several_formats(make, monkeypatch):
    options = {"scheme": "W8A8", "formats": SEVERAL[:2], **make.calibrated}
    monkeypatch.setattr(JobDirectory, "finish_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(None, **options)
    monkeypatch.undo()
    monkeypatch.setattr(request, "environment", lambda *_: {"threads": 99})
    message = r"begun with environment\..*; use --any-environment"
    with pytest.raises(MsQuantError, match=message):
        make(None, **options)
    with pytest.raises(MsQuantError, match=r"calibration\.samples = 4, now .* is 3; finish"):
        make(None, **{**options, "samples": 3, "any_environment": True})
    make(None, any_environment=True, **options)


def stopped(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_place_that_is_a_checkpoint_takes_no_formats(make):
    make(None, scheme="W8A16")
    with pytest.raises(MsQuantError, match=r"out: holds 'config\.json', expected a new directory"):
        make(None, scheme="W8A8_DYNAMIC", formats=SEVERAL)


def test_what_is_inspected(make, tmp_path):
    made = make(None, scheme="W4A16", scheme_options={"group_size": 32})
    found = {row["stored_as"] for row in inspect_checkpoint(made.options.output)["linears"]}
    assert found == {"I32, 8 inputs each"}
    options = {"algorithm": "smoothquant", "formats": ("mindie-sd",)}
    made = make(None, "other", scheme="W8A8_DYNAMIC", **options, **make.calibrated)
    found = {row["stored_as"] for row in inspect_checkpoint(made.options.output)["linears"]}
    assert found == {"I8"}


def test_options_are_those_of_schemes(make):
    for key in ("name", "fold", "format"):
        with pytest.raises(MsQuantError, match=rf"takes no {key}, expected group_size or"):
            make({"apiversion": "ms_quant_v1", "rules": [rule("W8A16", options={key: "norm"})]})


def test_a_calibration_file_beside_the_recipe(make, tmp_path, calib_text, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"apiversion: ms_quant_v1\nrules: [{{scheme: W8A8}}]\ncalib: {calib_text.name}"
    )
    assert calib_text.parent == tmp_path
    assert read_recipe(recipe).calib == str(calib_text)


def test_a_record_whose_first_group_is_an_exception(make):
    """What stands at the top is the first group's, so it is never among the others."""
    made = make(NATIVE)
    path = made.options.output / "ms_quant.json"
    content = json.loads(path.read_text())
    first = {key: content["record"][key] for key in ("scheme", "algorithm")}
    groups = [f"model.layers.{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate_up")]
    content["record"]["mixed"] |= dict.fromkeys(groups[:2], first)
    for wrong in (5, None, ["quarot"]):
        content["record"]["algorithm"] = wrong
        content.pop("sha256", None)
        write_json(path, seal(content))
        problems = verify_checkpoint(made.options.output, made.options.model).problems
        assert any("algorithm is" in text for text in problems)


def test_a_dry_run_says_what_each_linear_becomes(make, tmp_path):
    made = make(NATIVE)
    plan = estimate(made, tmp_path / "out")
    found = {row.partition(":")[0]: row.rpartition(", ")[2] for row in plan["linears_of_a_block"]}
    assert found["self_attn.q_proj"] == "W8A8_DYNAMIC or W8A16"
    assert found["self_attn.o_proj"] == "W8A8_DYNAMIC or FLOAT"
    assert found["mlp.down_proj"] == "W4A16"
