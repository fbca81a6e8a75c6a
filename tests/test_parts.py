"""A scheme for each part of a model, and what runtimes ask of the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from routed_models import DEEPSEEK, QWEN, save_routed

import ms_quant
from ms_quant.errors import MsQuantError
from ms_quant.formats.checks import not_served_by, served_by
from ms_quant.mixed_precision.request import MixedOptions, prepare_mixed
from ms_quant.models.config import parse_config
from ms_quant.models.names import GroupId
from ms_quant.pipeline.best import with_best
from ms_quant.pipeline.condensed import condensed
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.parts import as_text, by_part, part_of
from ms_quant.pipeline.planning import make_plan, plan_of_recipe, recipe_notes
from ms_quant.pipeline.request import prepare
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.recipe import Recipe, Rule, Step

BF16 = np.dtype(ml_dtypes.bfloat16)
DENSE = {
    **{key: QWEN[key] for key in ("hidden_size", "num_attention_heads", "vocab_size")},
    "model_type": "qwen3",
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "torch_dtype": "bfloat16",
}
W4A8 = "W8A8_DYNAMIC,experts=W4A8_DYNAMIC"


def plan(
    scheme: str, algorithm: str = "minmax", raw: dict[str, Any] = DEEPSEEK, **more: Any
) -> Plan:
    return make_plan(parse_config(dict(raw)), scheme, algorithm, dtype=BF16, **more)


def said(found: Plan) -> dict[str, str]:
    """Part to what its groups are, with the algorithms where there are some."""
    parts: dict[str, dict[str, None]] = {}
    for group, members in all_groups(found.config):
        layer = found.layers[group]
        title = "FLOAT" if layer is None else f"{layer.scheme.name} {layer.algorithms.name}"
        parts.setdefault(part_of(found.config, group, members), {})[
            title.removesuffix(" minmax")
        ] = None
    return {part: " or ".join(titles) for part, titles in parts.items()}


def refusal(*args: Any, **more: Any) -> str:
    with pytest.raises(MsQuantError) as error:
        plan(*args, **more)
    return str(error.value)


def test_static_inputs_are_for_attention_where_there_are_experts():
    found = plan("W8A8", "osl+gptq")
    assert said(found) == {
        "attention": "W8A8 osl+gptq",
        "dense": "W8A8_DYNAMIC gptq",
        "experts": "W8A8_DYNAMIC gptq",
        "shared": "W8A8_DYNAMIC gptq",
        **dict.fromkeys(("mtp.attention", "mtp.experts", "mtp.shared"), "FLOAT"),
    }
    assert found.format == "golden-stick"
    mixed = said(plan("W8A8_MIX"))
    assert mixed["attention"] == "W8A8_MIX" and mixed["experts"] == "W8A8_DYNAMIC"


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A8FP8_DYNAMIC", "W4A8_DYNAMIC"])
def test_other_schemes_are_for_the_whole_model(scheme):
    names = {name for part, name in said(plan(scheme)).items() if not part.startswith("mtp")}
    assert names == {scheme}


def test_a_dense_model_is_as_before():
    assert said(plan("W8A8", "osl", DENSE)) == {"attention": "W8A8 osl", "dense": "W8A8 osl"}
    mixed = said(plan("W8A8_DYNAMIC,attention=W8A8", raw=DENSE))
    assert mixed == {"attention": "W8A8", "dense": "W8A8_DYNAMIC"}


def test_each_part_gets_its_own():
    found = plan(
        "attention=W8A8,dense=FLOAT,shared=W8A8,experts=W4A8_DYNAMIC,mtp=FLOAT,mtp.experts=W8A8_DYNAMIC",
        "gptq,attention=osl",
    )
    assert said(found) == {
        "attention": "W8A8 osl",
        "dense": "FLOAT",
        "shared": "W8A8 gptq",
        "experts": "W4A8_DYNAMIC gptq",
        "mtp.attention": "FLOAT",
        "mtp.experts": "W8A8_DYNAMIC",
        "mtp.shared": "FLOAT",
    }


def test_options_go_to_those_that_take_them():
    found = plan(
        "attention=W8A8,dense=W8A8_DYNAMIC,shared=W8A8_DYNAMIC,experts=W4A16",
        "attention=smoothquant,experts=gptq",
        scheme_options={"group_size": 32},
        algorithm_options={"alpha": 0.7, "damping": 0.02},
        format="compressed-tensors",
    )
    assert found.layers[GroupId(1, "experts.3.down")].scheme.weight.group_size == 32
    assert found.layers[GroupId(1, "o")].algorithms.options["smoothquant"].alpha == 0.7
    assert found.layers[GroupId(1, "experts.3.down")].algorithms.options["gptq"].damping == 0.02


def test_the_python_function_takes_a_mapping():
    assert as_text({"": "W8A8", "experts": "W4A8_DYNAMIC"}) == "W8A8,experts=W4A8_DYNAMIC"
    assert as_text("W8A8") == "W8A8"
    assert by_part("scheme", " W8A8 , mtp = FLOAT").named == {"mtp": "FLOAT"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("W8A8,W4A16",), "expected one for the whole model, or PART=SCHEME with commas"),
        (("W8A8,experts=",), "expected one for the whole model, or PART=SCHEME with commas"),
        (("W8A8,router=FLOAT",), "part 'router' is unknown, expected one of attention, dense"),
        (("W8A8,dense=FLOAT,dense=W8A8",), "names dense twice, expected once"),
        (("experts=W4A16",), "nothing is said of attention and dense and shared, expected PART="),
        (("W8A8,experts=W9A9",), "scheme 'W9A9' is unknown"),
        (("W8A8_DYNAMIC", "mtp=ssz"), "algorithm of mtp: it stays float, expected a scheme of it"),
        (("FLOAT,attention=FLOAT",), "every linear stays float, nothing is left to quantize"),
        (("W8A8", "attention=quarot"), "quarot rotates the whole model, expected it without"),
        (("W8A8,attention=FLOAT", "osl"), "osl is of use in no part that is not named"),
        # what no runtime of any format forgives
        (("W8A8,experts=W8A8",), "experts.0.gate_proj: W8A8 has static inputs, which no runtime"),
        (("W8A8S",), "experts.0.gate_proj: W8A8S has static inputs, which no runtime has of"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments, reason):
    assert reason in refusal(*arguments)


def test_only_the_first_layer_for_further_tokens_is_calibrated():
    both = {**DEEPSEEK, "num_nextn_predict_layers": 2}
    arguments = "W8A8,mtp=W8A8_DYNAMIC", "mtp=gptq"
    text = refusal(*arguments, raw=both, **ASCEND)
    assert "layers.4.self_attn.q_a_proj: W8A8_DYNAMIC with gptq needs calibration data" in text
    assert plan(*arguments, **ASCEND)


@pytest.mark.parametrize("part", ["shared", "mtp", "experts"])
def test_a_part_that_the_model_lacks_is_refused(part):
    expected = f"scheme of {part}: the model has no such part, expected some of attention, dense"
    assert expected in refusal(f"W8A8,{part}=FLOAT", raw=DENSE)


@pytest.mark.parametrize("pattern", ["*.experts.3.*", "*.experts.*.down_proj"])
def test_experts_of_a_layer_are_one(pattern):
    text = refusal("W8A8_DYNAMIC", exclude=[pattern])
    assert "model.layers.1.mlp.experts.0.gate_proj is W8A8_DYNAMIC, expected one " in text
    assert "one scheme for all experts of model.layers.1: runtimes take the first" in text
    assert plan("W8A8_DYNAMIC", exclude=["model.layers.1.mlp.experts.*"])  # layers may differ


GOLDEN = {"format": "golden-stick"}
ASCEND = {"format": "ascend"}
NO_Q_LORA = {**DEEPSEEK, "q_lora_rank": None}


@pytest.mark.parametrize(
    ("scheme", "more", "reason"),
    [
        ("W8A8_DYNAMIC", GOLDEN, "folds its input_scale into a norm"),
        (
            "W8A8,attention=FLOAT",
            GOLDEN,
            "0.self_attn.q_a_proj: is FLOAT, expected W8A8",
        ),
        ("W8A8,experts=FLOAT", GOLDEN, "no float experts in a quantized model"),
        ("W8A8,mtp=W8A8_DYNAMIC", GOLDEN, "expected FLOAT: it reads blocks that predict"),
        ("W8A8", {**GOLDEN, "raw": NO_Q_LORA}, "q_lora_rank is null, expected a rank"),
        ("W8A8", {**GOLDEN, "raw": QWEN}, "does not build quantized experts of qwen3_moe"),
        ("W8A16", ASCEND, "is W8A16, expected W8A8_DYNAMIC, W4A8_DYNAMIC, W4A16, "),
        ("W4A4_DYNAMIC", {**ASCEND, "raw": QWEN}, "experts.0.gate_proj: is W4A4_DYNAMIC, expected"),
        (
            "W4A16",
            {
                "format": "compressed-tensors",
                "scheme_options": {"group_size": 32, "symmetric": False},
            },
            "has zero points, expected symmetric weights in groups",
        ),
        (
            "W8A16",
            {"format": "compressed-tensors"},
            "has one scale a channel, expected symmetric",
        ),
        ("W8A8_DYNAMIC", {"format": "mindie-sd"}, "no network of it with routed experts is known"),
    ],
)
def test_what_the_asked_format_cannot_serve_is_refused_with_the_rule(scheme, more, reason):
    text = refusal(scheme, **more)
    assert text.startswith(f"format {more['format']}: ") and reason in text
    assert "expected --format " in text or "expected another plan" in text


def test_groups_that_do_not_divide_an_expert_are_refused():
    text = refusal("FLOAT,experts=W4A16", scheme_options={"group_size": 64})
    assert "1.mlp.experts.0.down_proj.weight: groups of 64 do not divide K = 32" in text


@pytest.mark.parametrize(
    ("scheme", "raw", "format"),
    [
        ("W8A8", DEEPSEEK, "golden-stick"),
        ("W8A8", QWEN, "ascend"),
        ("W8A8", NO_Q_LORA, "ascend"),
        ("W8A8_DYNAMIC", DEEPSEEK, "ascend"),
        ("W8A8,mtp=W8A8_DYNAMIC", DEEPSEEK, "ascend"),
        (W4A8, DEEPSEEK, "ascend"),
        (W4A8, QWEN, "ascend"),
    ],
)
def test_the_format_is_one_that_a_runtime_serves(scheme, raw, format):
    found = plan(scheme, raw=raw)
    assert found.format == format and served_by(found)


def test_int4_experts_are_served_by_new_runtimes_and_int4_linears_by_old_ones():
    assert served_by(plan(W4A8)) == ["vllm-ascend (--quantization ascend)"]
    assert served_by(plan("W4A8_DYNAMIC")) == ["vllm-ascend up to 0.25 (--quantization ascend)"]


def test_what_no_runtime_serves_is_held_and_said_before_the_work(tmp_path: Path):
    found = plan("W8A16", raw=QWEN)
    assert not served_by(found)
    assert any("expected W8A8_DYNAMIC, W4A8_DYNAMIC" in line for line in not_served_by(found))
    model = save_routed(tmp_path / "model", QWEN)
    checked = prepare(QuantizeOptions(model, tmp_path / "out", "W8A16"))
    (note,) = [line for line in checked.notes if line.startswith("no runtime serves this plan: ")]
    assert "vllm-ascend" in note


def test_what_became_of_a_scheme_is_noted_and_recorded(tmp_path: Path):
    model = save_routed(tmp_path / "model", DEEPSEEK)
    np.savez(tmp_path / "calib.npz", tokens=np.random.default_rng(5).integers(0, 256, (4, 32)))
    options = {"calib": tmp_path / "calib.npz", "seq_len": 32}
    checked = prepare(QuantizeOptions(model, tmp_path / "out", "W8A8", "osl", **options))
    assert checked.notes[0] == (
        "the model has routed experts, which no runtime serves with static inputs: W8A8 with osl "
        "is for attention, and dense, experts, shared MLPs become W8A8_DYNAMIC (--scheme "
        "PART=SCHEME,... says otherwise)"
    )
    assert "parts" not in checked.record
    text = "W8A8_DYNAMIC,mtp=W8A8_DYNAMIC"
    one, other = (prepare(QuantizeOptions(model, tmp_path / "out", s)) for s in (text, text[:12]))
    assert one.record["parts"] == {"rest": "W8A8_DYNAMIC", "mtp": "W8A8_DYNAMIC"}
    assert one.record != other.record and not one.notes


def test_a_checkpoint_of_parts_is_made_and_proven(tmp_path: Path):
    model = save_routed(tmp_path / "model", DEEPSEEK)
    schemes = {"": "W8A8_DYNAMIC", "experts": "W4A8_DYNAMIC", "mtp": "W8A8_DYNAMIC"}
    result = ms_quant.quantize_checkpoint(model, tmp_path / "out", schemes)
    (output,) = result.outputs
    kinds = {line.group: line.scheme for line in output.report}
    assert kinds["model.layers.1.experts.3.down"] == "W4A8_DYNAMIC"
    assert kinds["model.layers.3.experts.3.down"] == "W8A8_DYNAMIC"
    assert kinds["model.layers.1.shared.down"] == "W8A8_DYNAMIC"
    record = json.loads((tmp_path / "out" / "ms_quant.json").read_text())["record"]
    assert record["parts"]["experts"] == "W4A8_DYNAMIC"
    assert not ms_quant.verify_checkpoint(tmp_path / "out", model).problems


def of_recipe(recipe: Recipe, raw: dict[str, Any] = DEEPSEEK, **more: Any) -> Plan:
    return plan_of_recipe(parse_config(dict(raw)), recipe, BF16, **more)


def test_patterns_reach_layers_that_predict_further_tokens_by_name_only():
    everything = Rule("W8A8_DYNAMIC")
    found = said(of_recipe(Recipe((everything,))))
    assert found["mtp.experts"] == "FLOAT" and found["experts"] == "W8A8_DYNAMIC"
    (note,) = recipe_notes(parse_config(dict(DEEPSEEK)), Recipe((everything,)))
    assert note.startswith("model.layers.3.self_attn.q_a_proj stays float: it predicts further")
    for pattern in ("mtp.mlp.experts.*", "model.layers.3.mlp.experts.*", "*.3.mlp.experts.*"):
        main = Rule("W8A8_DYNAMIC", exclude=("*.layers.3.*",))
        own = Rule("W8A8_DYNAMIC", include=(pattern,))
        found = said(of_recipe(Recipe((main, own))))
        assert found["mtp.experts"] == "W8A8_DYNAMIC", pattern
        assert found["mtp.attention"] == "FLOAT" and found["experts"] == "W8A8_DYNAMIC"
    both = Rule("W8A8_DYNAMIC", include=("*", "mtp.*"), exclude=("mtp.self_attn.*",))
    found = said(of_recipe(Recipe((both,))))
    assert found["mtp.attention"] == "FLOAT" and found["mtp.shared"] == "W8A8_DYNAMIC"
    with pytest.raises(MsQuantError, match=r"pattern 'mtp\.\*' matches no linear"):
        of_recipe(Recipe((both,)), QWEN)


def test_recipes_name_the_groups_of_latent_attention():
    steps = tuple(Step("smoothquant", groups=(kind,)) for kind in ("qkv_a", "q_b"))
    found = of_recipe(Recipe((Rule("W8A8_DYNAMIC"),), steps))
    smoothed = [name for (block, name), layer in found.layers.items() if block == 0 and layer.folds]
    assert smoothed == ["qkv_a", "q_b"]
    found = of_recipe(
        Recipe((Rule("W8A8_DYNAMIC"),), (Step("smoothquant", groups=("q", "kv_a")),)), NO_Q_LORA
    )
    smoothed = [name for (block, name), layer in found.layers.items() if block == 0 and layer.folds]
    assert smoothed == ["q", "kv_a"]


@pytest.mark.parametrize("name", ["self_attn.kv_b_proj", "mlp.gate", "eh_proj"])
def test_what_is_float_in_every_plan_is_not_named_by_a_recipe(name):
    rule = Rule("W8A8_DYNAMIC", include=(f"*.{name}",))
    with pytest.raises(MsQuantError, match=rf"{name}, which is float in every plan"):
        of_recipe(Recipe((rule,)))


def test_a_recipe_with_static_experts_is_refused():
    with pytest.raises(MsQuantError, match=r"experts\.0\.gate_proj: W8A8 has static inputs"):
        of_recipe(Recipe((Rule("W8A8"),)))
    split = Rule("W8A8", exclude=("*.mlp.*",)), Rule("W8A8_DYNAMIC", include=("*.mlp.*",))
    assert of_recipe(Recipe(split)).format == "golden-stick"
    assert of_recipe(Recipe(split), QWEN).format == "ascend"


def test_many_paths_are_a_few_lines():
    floats = plan("W8A8_DYNAMIC").float_linears()
    assert condensed(floats) == [
        "self_attn.kv_b_proj of layers 0-3",
        "mlp.gate of layers 1-3",
        "self_attn.q_a_proj and self_attn.kv_a_proj_with_mqa and self_attn.q_b_proj and "
        "self_attn.o_proj and mlp.experts.*.gate_proj and mlp.experts.*.up_proj and "
        "mlp.experts.*.down_proj and mlp.shared_experts.gate_proj and "
        "mlp.shared_experts.up_proj and mlp.shared_experts.down_proj and eh_proj and embed_tokens "
        "and shared_head.head of layer 3",
    ]
    assert condensed(floats[:3]) == floats[:3]
    paths = [f"model.layers.{i}.mlp.gate" for i in (*range(12), 20, 22)]
    assert condensed(paths) == ["mlp.gate of layers 0-11, 20 and 22"]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W8A8", "osl"),
        ("W8A8_DYNAMIC", "minmax"),
        ("W8A8,experts=W4A8_DYNAMIC,mtp=FLOAT", "osl,experts=gptq"),
        (
            "attention=W8A8_DYNAMIC,dense=FLOAT,shared=FLOAT,experts=W4A8_DYNAMIC",
            "attention=minmax,experts=gptq",
        ),
    ],
)
def test_best_is_chosen_for_each_part(scheme, expected, tmp_path):
    job = QuantizeOptions(tmp_path, tmp_path / "out", scheme, "best")
    found = with_best(job, by_part("scheme", scheme).names, parse_config(dict(DEEPSEEK)))
    assert found.algorithm == expected
    assert plan(scheme, found.algorithm, **ASCEND)


def test_a_budget_does_not_give_up_experts_one_by_one(tmp_path):
    model, calib = save_routed(tmp_path / "model", DEEPSEEK), tmp_path / "x.npz"
    np.savez(calib, tokens=np.zeros((4, 32), np.int64))
    job = QuantizeOptions(model, tmp_path / "out", "W8A8", calib=calib)
    with pytest.raises(MsQuantError, match="has routed experts, of which runtimes take one scheme"):
        prepare_mixed(MixedOptions(job, ["W8A8", "FLOAT"], 0.01, None, None, None))
