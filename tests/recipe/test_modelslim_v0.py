"""Recipes of modelslim_v0: bits, flags and names."""

from __future__ import annotations

from typing import Any

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.recipe import Recipe, Rule, Step, load_recipe, to_native

ALL = ("down", "o", "qkv", "gate_up")
PLAIN = {"mm_tensor": False}
SPARSE = {"w_bit": 4, "is_lowbit": True}
GROUPED = {"is_lowbit": True, "open_outlier": False}


def document(calib: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    config = PLAIN | (calib or {})
    return {"apiversion": "modelslim_v0", "spec": {"calib_cfg": config, **spec}}


def made(*rules: Rule, **more: Any) -> Recipe:
    values = {"formats": ("ascend",), "calib": "teacher_qualification.jsonl", **more}
    values = {"shard_bytes": 0, "lenient": True, **values}
    return Recipe(rules, **values)


WHOLE = """
apiversion: modelslim_v0
metadata: {config_id: qwen3-dense, label: {w_bit: 8, a_bit: 8}}
spec:
  anti_cfg:
    anti_method: m4
    disable_anti_names: [model.layers.0.self_attn.k_proj, model.layers.1.mlp.down_proj]
  calib_cfg:
    w_bit: 8
    a_bit: 8
    mm_tensor: false
    act_method: 2
    pdmix: true
    use_kvcache_quant: true
    disable_names: [lm_head, 'model.layers.0.mlp.down_proj']
  calib_params:
    disable_level: L0
    mix_cfg:
      "*.o_proj": "w8a8"
      "model.layers.1.mlp.down_proj": "float"
  calib_dataset: prompts.jsonl
  calib_save_params: {part_file_size: 4}
"""


def test_a_whole_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE)
    names = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    excluded = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    recipe = load_recipe(path)
    assert recipe == made(
        Rule("W8A8_MIX", {}, ("histogram",), {}, ("*.o_proj",), names),
        Rule("W8A8_MIX", {}, ("histogram",), {}, ("*",), names),
        steps=(Step("smoothquant", {"alpha": 0.9}, exclude=excluded, groups=ALL, together=True),),
        kv_cache="C8",
        calib="prompts.jsonl",
        shard_bytes=4 << 30,
        not_for=recipe.not_for,
    )
    assert list(recipe.not_for) == ["qwen3", "qwen3_moe"] and recipe.notes == ()
    assert load_recipe(to_native(recipe)) == recipe


@pytest.mark.parametrize(
    ("calib", "rule"),
    [
        ({}, Rule("W8A8")),
        ({"w_bit": 8, "a_bit": 8, "act_method": 1, "pr": 1.0, "w_sym": True}, Rule("W8A8")),
        ({"act_method": 2}, Rule("W8A8", {}, ("histogram",))),
        ({"pdmix": True}, Rule("W8A8_MIX")),
        ({"is_dynamic": True, "act_method": 3}, Rule("W8A8_DYNAMIC")),
        ({"a_bit": 16, "act_method": 2}, Rule("W8A16")),
        ({"a_bit": 16, "w_sym": False}, Rule("W8A16", {"symmetric": False})),
        ({"a_bit": 16, **GROUPED}, Rule("W8A16", {"group_size": 64})),
        ({"w_bit": 4, "a_bit": 16}, Rule("W4A16", {"group_size": 0})),
        (
            {"w_bit": 4, "a_bit": 16, "w_sym": False, "group_size": 128, **GROUPED},
            Rule("W4A16", {"group_size": 128, "symmetric": False}),
        ),
        (
            {"w_bit": 4, "is_dynamic": True, "group_size": 256, "mm_tensor": True, **GROUPED},
            Rule("W4A8_DYNAMIC", {"group_size": 256}),
        ),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, Rule("W4A4_FLATQUANT_DYNAMIC")),
        ({**SPARSE}, Rule("W8A8S", {}, ("low_bits",), {"low_bits.fraction": 0.01})),
        (
            {**SPARSE, "co_sparse": True, "fraction": 0.011, "act_method": 2, "nonuniform": False},
            Rule("W8A8S", {}, ("histogram", "low_bits"), {"low_bits.fraction": 0.011}),
        ),
        (
            {**SPARSE, "fraction": 0.011, "use_sigma": True, "sigma_factor": 4.0},
            Rule("W8A8S", {}, ("low_bits",), {"low_bits.sigma": 4.0}),
        ),
        (
            {"co_sparse": True, "fraction": 0.02, "use_sigma": True},
            Rule("W8A8S", {}, ("low_bits",), {"low_bits.fraction": 0.02, "low_bits.whole": True}),
        ),
        ({"disable_names": ["a{b}*"]}, Rule("W8A8", exclude=(r"a\{b\}\*",))),
    ],
)
def test_bits_and_flags_are_a_scheme(calib, rule):
    recipe = load_recipe(document(calib))
    formats = () if rule.scheme == "W4A16" else ("ascend",)
    assert recipe == made(rule, formats=formats)


def test_no_data_is_none():
    assert load_recipe(document({"a_bit": 16}, calib_dataset=None)).calib is None


def test_mixed_kinds_go_by_name_first_and_then_in_order():
    mixed = {
        "*.mlp.*": "w8a8_dynamic",
        "*.{0}.*": "w8a16",
        "*.0.mlp.*": "float",
        "m.0.mlp.up_proj": "w8a8",
        "*": "w8a8",
    }
    recipe = load_recipe(document({"disable_names": ["x"]}, calib_params={"mix_cfg": mixed}))
    late = ("x", "*.0.mlp.*")
    assert recipe.rules == (
        Rule("W8A8", include=("m.0.mlp.up_proj",), exclude=("x",)),
        Rule("W8A8_DYNAMIC", include=("*.mlp.*",), exclude=("x",)),
        Rule("W8A16", include=(r"*.\{0\}.*",), exclude=("x",)),
        Rule("W8A8", include=("*",), exclude=late),
        Rule("W8A8", exclude=late),
    )
    assert recipe.rules[1].where == "spec.calib_params.mix_cfg.*.mlp.*"


@pytest.mark.parametrize(
    ("anti", "step"),
    [
        ({"anti_method": "m1"}, Step("smoothquant", {"alpha": 0.5}, groups=("qkv", "gate_up"))),
        ({"anti_method": "m4", "a_bit": 8}, Step("smoothquant", {"alpha": 0.9}, groups=ALL)),
        ({"anti_method": "m6"}, Step("flexsmooth", groups=ALL)),
        (
            {"anti_method": "m6", "flex_config": {"alpha": 0.75, "beta": 0.1}},
            Step("flexsmooth", {"alpha": 0.75, "beta": 0.1}, groups=ALL),
        ),
        (
            {"anti_method": "m6", "disable_anti_names": ["a.mlp.up_proj", "a.mlp.other"]},
            Step(
                "flexsmooth",
                exclude=("a.mlp.up_proj", "a.mlp.other"),
                groups=ALL,
                together=True,
            ),
        ),
    ],
)
def test_a_method_is_a_step(anti, step):
    recipe = load_recipe(document(anti_cfg=anti))
    assert recipe.steps == (step,) and recipe.notes == ()
    assert bool(recipe.not_for) == (anti["anti_method"] == "m4")


@pytest.mark.parametrize(
    ("calib", "spec", "note"),
    [
        ({}, {"anti_dataset": "a.jsonl"}, "spec.anti_dataset: is not read"),
        (
            {},
            {"calib_save_params": {"safetensors_name": "x.safetensors"}},
            "spec.calib_save_params.safetensors_name: files are named by their format",
        ),
        (
            {},
            {"anti_cfg": {"anti_method": "m1", "disable_anti_names": ["lm_head"]}},
            "spec.anti_cfg.disable_anti_names: m1 there smooths these linears, too",
        ),
        (
            {},
            {"anti_cfg": {"anti_method": "m4"}, "anti_params": {"norm_class_name": "RMSNorm"}},
            "spec.anti_params.norm_class_name: the family says",
        ),
        ({"fraction": 0.02, "use_sigma": False}, {}, "spec.calib_cfg: without sparse weights"),
    ],
)
def test_what_changes_nothing_is_noted(calib, spec, note):
    (found,) = load_recipe(document(calib, **spec)).notes
    assert found.startswith(note)


@pytest.mark.parametrize(
    ("calib", "words"),
    [
        ({"mm_tensor": True}, r"mm_tensor is True \(its default is true: one scale .*expected fal"),
        ({"w_bit": 2}, "spec.calib_cfg.w_bit is 2, expected one of 8, 4"),
        ({"a_bit": 4}, "spec.calib_cfg.a_bit is 4, expected 8 or 16 beside w_bit 8"),
        ({"a_bits": 8}, "spec.calib_cfg.a_bits: is no known key, expected one of w_bit, a_bit"),
        ({"a_sym": True}, "spec.calib_cfg.a_sym: is no known key"),
        (
            {**SPARSE, "pdmix": True},
            r"spec.calib_cfg.pdmix is True \(it is of static .*expected false",
        ),
        (
            {"co_sparse": True, "is_dynamic": True},
            r"is_dynamic is True \(sparse weights have static",
        ),
        ({**SPARSE, "open_outlier": False}, r"open_outlier is False \(of weights without .*exp"),
        ({**SPARSE, "do_smooth": True}, r"do_smooth is True \(its search is not documented\)"),
        ({**SPARSE, "nonuniform": True}, r"nonuniform is True \(codes are steps of equal size"),
        (
            {**SPARSE, "fraction": 0.2},
            "spec.calib_cfg.fraction is 0.2, expected a number from 0.01",
        ),
        (
            {**SPARSE, "use_sigma": True, "sigma_factor": 2},
            "sigma_factor is 2.0, expected a number",
        ),
        ({**SPARSE, "mm_tensor": True}, "spec.calib_cfg.mm_tensor is True"),
        ({**SPARSE, "act_method": 3}, "spec.calib_cfg.act_method is 3"),
        ({"w_bit": 4}, "spec.calib_cfg.is_lowbit is False .*expected true"),
        ({"is_lowbit": True}, r"is_lowbit is True \(beside w_bit 8 a_bit 8\), expected false"),
        (
            {"w_bit": 4, "a_bit": 16, "is_lowbit": True},
            r"open_outlier is True \(how outliers are kept .*expected false",
        ),
        (
            {"w_bit": 4, "a_bit": 16, "group_size": 48, **GROUPED},
            "spec.calib_cfg.group_size is 48, expected one of 32, 64, 128, 256",
        ),
        ({"w_sym": False}, r"w_sym is False \(beside quantized activations\), expected true"),
        ({"w_method": "GPTQ", "a_bit": 16}, r"w_method is 'GPTQ' .*expected MinMax"),
        ({"act_method": 3}, r"act_method is 3 \(how it chooses .*expected 1 \(minmax\) or 2"),
        ({"act_method": 4}, "spec.calib_cfg.act_method is 4, expected one of 1, 2, 3"),
        ({"pr": 0.5}, r"spec.calib_cfg.pr is 0.5 \(others draw at random\), expected 1.0"),
        ({"pdmix": True, "is_dynamic": True}, r"pdmix is True \(it is of static .*expected false"),
        ({"a_bit": 16, "is_dynamic": True}, r"is_dynamic is True \(activations stay float\)"),
        ({"w_bit": 4, "a_bit": 4}, r"is_dynamic is False \(beside w_bit 4 a_bit 4\), expected tru"),
        ({"disable_last_linear": False}, r"disable_last_linear is False \(lm_head stays float"),
        ({"use_fa_quant": True}, r"use_fa_quant is True \(attention is not quantized here\)"),
        ({"disable_names": "lm_head"}, "spec.calib_cfg.disable_names is 'lm_head', expected a lis"),
    ],
)
def test_a_config_without_counterpart_is_refused_by_its_key(calib, words):
    with pytest.raises(MsQuantError, match=words):
        load_recipe(document(calib))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"calib_cfg": None}, "spec.calib_cfg.mm_tensor is True"),
        ({"calib_cfg": [1]}, r"spec.calib_cfg is \[1\], expected a mapping"),
        ({"process": []}, "spec.process: is no known key, expected one of anti_cfg, anti_params"),
        ({"batch_size": 0}, "spec.batch_size is 0, expected an integer of at least 1"),
        ({"calib_dataset": 3}, "spec.calib_dataset is 3, expected text"),
        ({"calib_dataset": ""}, "spec.calib_dataset is '', expected the name of a file"),
        (
            {"calib_params": {"disable_level": "L10"}},
            r"spec.calib_params.disable_level is 'L10' \(it chooses layers .*expected L0, with",
        ),
        ({"calib_params": {"all_tensors": {}}}, "spec.calib_params.all_tensors: is no known key"),
        (
            {"calib_params": {"mix_cfg": {"*": "w4a8_dynamic"}}},
            r"spec.calib_params.mix_cfg.\* is 'w4a8_dynamic', expected one of w8a8, w8a8_dynamic",
        ),
        (
            {"calib_cfg": PLAIN | {"pdmix": True}, "calib_params": {"mix_cfg": {"*": "w8a16"}}},
            r"mix_cfg.\* is 'w8a16' \(pdmix is of w8a8 only\), expected w8a8 or float",
        ),
        (
            {
                "calib_cfg": PLAIN | {"w_bit": 4, "a_bit": 16},
                "calib_params": {"mix_cfg": {"*": "w8a8"}},
            },
            r"mix_cfg.\* is 'w8a8', expected float",
        ),
        ({"calib_save_params": {"part_file_size": 0}}, "part_file_size is 0, expected an integer"),
        ({"calib_save_params": {"save_type": "x"}}, "calib_save_params.save_type: is no known key"),
        *(
            ({"anti_cfg": {"anti_method": name}}, rf"anti_cfg.anti_method is '{name}' \(.* not doc")
            for name in ("m2", "m3", "m5")
        ),
        ({"anti_cfg": {}}, r"spec.anti_cfg.anti_method is 'm2' \(the thresholds of its outlier"),
        ({"anti_cfg": {"anti_method": "m7"}}, "spec.anti_cfg.anti_method is 'm7', expected one of"),
        ({"anti_cfg": {"anti_method": ["m4"]}}, r"anti_method is \['m4'\], expected one of"),
        ({"anti_cfg": {"anti_method": "m4", "a_bit": 16}}, "anti_cfg.a_bit is 16, expected 8"),
        ({"anti_cfg": {"anti_method": "m4", "alpha": 1}}, "spec.anti_cfg.alpha: is no known key"),
        (
            {"anti_cfg": {"anti_method": "m6", "flex_config": {"alpha": 2}}},
            "spec.anti_cfg.flex_config.alpha is 2.0, expected a number from 0 to 1",
        ),
    ],
)
def test_a_spec_without_counterpart_is_refused_by_its_path(spec, words):
    with pytest.raises(MsQuantError, match=words):
        load_recipe({"apiversion": "modelslim_v0", "spec": {"calib_cfg": PLAIN, **spec}})
