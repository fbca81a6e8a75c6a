"""Recipes of modelslim_v1, unchanged."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import yaml

from ms_quant.errors import MsQuantError
from ms_quant.recipe import Recipe, Rule, Step, load_recipe, to_native
from ms_quant.recipe.modelslim_linear import PAIRS
from ms_quant.schemes.table import SCHEMES

made = partial(Recipe, lenient=True, calib="mix_calib.jsonl")
ROWS = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
TOKENS = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
PHASES = TENSOR | {"scope": "pd_mix"}
FLOAT = {"scope": "per_tensor", "dtype": "float", "symmetric": True, "method": "none"}
INT4 = ROWS | {"dtype": "int4"}
GROUPS = ROWS | {"scope": "per_group", "method": "gptq", "ext": {"group_size": 128}}
FP8 = ROWS | {"dtype": "fp8_e4m3"}
MX8 = {"scope": "per_block", "dtype": "mxfp8", "symmetric": True, "method": "minmax"}
MX4 = MX8 | {"dtype": "mxfp4"}
DUAL = MX4 | {"scope": "dual_scale", "method": "dualscale", "ext": {"dual_block_size": 256}}
GPTQ = {"gptq.damping": 0.01, "gptq.static_groups": True}


def linear(act: dict, weight: dict, **more) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, **more}


def document(*process, **spec) -> dict[str, Any]:
    return {"apiversion": "modelslim_v1", "spec": {"process": list(process), **spec}}


PDMIX = """
apiversion: modelslim_v1
metadata:
  config_id: qwen3-dense-w8a8-v1
  score: 90
  verified_model_types: [Qwen3-8B]
  label: {w_bit: 8, a_bit: 8, is_sparse: false, kv_cache: false}
spec:
  runner: auto
  process:
    - type: iter_smooth
      alpha: 0.9
      scale_min: 1e-5
      symmetric: true
      enable_subgraph_type: [norm-linear, linear-linear, ov, up-down]
      include: ["*"]
    - type: linear_quant
      qconfig:
        act: {scope: pd_mix, dtype: int8, symmetric: false, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
      exclude: ["*.layers.{0,1,27}.mlp.down_proj"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset: mix_calib.jsonl
"""


def test_a_whole_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(PDMIX)
    expected = made(
        rules=(Rule("W8A8_MIX", exclude=("*.layers.{0,1,27}.mlp.down_proj",)),),
        steps=(Step("smoothquant", {"alpha": 0.9}, groups=("down", "o", "qkv", "gate_up")),),
        formats=("ascend",),
        calib="mix_calib.jsonl",
        shard_bytes=4 << 30,
    )
    recipe = load_recipe(path)
    assert recipe == expected == load_recipe(yaml.safe_load(PDMIX))
    assert recipe.rules[0].where == "spec.process[1]"
    assert load_recipe(to_native(recipe)) == recipe


def test_anchors_and_several_policies_in_a_group(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
apiversion: modelslim_v1
default_w8a8: &static
  act: {scope: per_tensor, dtype: int8, symmetric: false, method: histogram}
  weight: &rows {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
spec:
  process:
    - type: group
      configs:
        - {type: linear_quant, qconfig: *static, include: ["*.self_attn.*"]}
        - type: linear_quant
          qconfig:
            act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
            weight: {<<: *rows, method: ssz, ext: {step: 5}}
          include: ["*.mlp.*"]
          exclude: ["*.{down,gate}_proj", "*.layers.0.*"]
  save:
    - {type: ascendv1_saver, part_file_size: 0}
    - {type: mindie_format_saver}
    - {type: compressed_tensors}
"""
    )
    recipe = load_recipe(path)
    assert recipe.rules == (
        Rule("W8A8", {}, ("histogram",), {}, ("*.self_attn.*",)),
        Rule(
            "W8A8_DYNAMIC",
            {},
            ("ssz",),
            {"ssz.steps": 5},
            ("*.mlp.*",),
            ("*.{down,gate}_proj", "*.layers.0.*"),
        ),
    )
    assert recipe.rules[1].where == "spec.process[0].configs[1]"
    assert recipe.formats == ("ascend", "mindie-sd", "compressed-tensors")
    assert recipe.shard_bytes == 0


@pytest.mark.parametrize(
    ("act", "weight", "rule"),
    [
        (TENSOR, ROWS, Rule("W8A8")),
        (TENSOR | {"method": "histogram"}, ROWS, Rule("W8A8", {}, ("histogram",))),
        (TOKENS, ROWS, Rule("W8A8_DYNAMIC")),
        (TOKENS, ROWS | {"method": "gptq"}, Rule("W8A8_DYNAMIC", {}, ("gptq",), GPTQ)),
        (TOKENS, ROWS | {"method": "ssz"}, Rule("W8A8_DYNAMIC", {}, ("ssz",), {"ssz.steps": 20})),
        (PHASES, ROWS, Rule("W8A8_MIX")),
        (FLOAT, ROWS, Rule("W8A16")),
        ({"dtype": "float"}, ROWS, Rule("W8A16")),
        (
            TOKENS,
            ROWS | {"method": "gptq", "ext": {"percdamp": 0.1, "block_size": 64}},
            Rule("W8A8_DYNAMIC", {}, ("gptq",), GPTQ | {"gptq.damping": 0.1}),
        ),
        (TENSOR | {"ext": {"aggregation_type": "max"}}, ROWS, Rule("W8A8")),
        (FLOAT, GROUPS, Rule("W8A16", {"group_size": 128}, ("gptq",), GPTQ)),
        (
            FLOAT,
            GROUPS | {"symmetric": False},
            Rule("W8A16", {"group_size": 128, "symmetric": False}, ("gptq",), GPTQ),
        ),
        (FLOAT, INT4, Rule("W4A16", {"group_size": 0})),
        (
            FLOAT,
            INT4 | {"symmetric": False},
            Rule("W4A16", {"group_size": 0, "symmetric": False}),
        ),
        (
            FLOAT,
            GROUPS | {"dtype": "int4", "method": "minmax", "ext": {"group_size": 64}},
            Rule("W4A16", {"group_size": 64}),
        ),
        (TOKENS, INT4, Rule("W4A8_DYNAMIC")),
        (TOKENS, INT4 | {"method": "ssz"}, Rule("W4A8_DYNAMIC", {}, ("ssz",), {"ssz.steps": 20})),
        (
            TOKENS,
            GROUPS | {"dtype": "int4", "ext": {"group_size": 256}},
            Rule("W4A8_DYNAMIC", {"group_size": 256}, ("gptq",), GPTQ),
        ),
        (TOKENS | {"dtype": "int4"}, INT4, Rule("W4A4_DYNAMIC")),
        (TOKENS | {"dtype": "fp8_e4m3"}, FP8, Rule("W8A8FP8_DYNAMIC")),
        (MX8, MX8, Rule("W8A8_MXFP8")),
        (
            MX8 | {"ext": {"axes": -1}},
            MX8 | {"method": "mse_round", "ext": {"axes": -1}},
            Rule("W8A8_MXFP8", {"rule": "mxfp8_msmodelslim_mse_round"}),
        ),
        (MX8, MX4, Rule("W4A8_MXFP")),
        (MX4, MX4, Rule("W4A4_MXFP4")),
        (
            MX4,
            MX4 | {"method": "ceil_x"},
            Rule("W4A4_MXFP4", {"rule": "mxfp4_msmodelslim_ceil_x"}),
        ),
        (
            MX8,
            MX4 | {"method": "fouroversix"},
            Rule("W4A8_MXFP", {"rule": "mxfp4_msmodelslim_fouroversix"}),
        ),
        (DUAL, DUAL, Rule("W4A4_MXFP4_DUALSCALE", {"dual_block_size": 256})),
        (DUAL | {"ext": {}}, DUAL, Rule("W4A4_MXFP4_DUALSCALE", {"dual_block_size": 256})),
    ],
)
def test_a_pair_is_a_scheme(act, weight, rule):
    assert load_recipe(document(linear(act, weight))) == made((rule,))


def test_every_pair_is_a_scheme_that_exists():
    assert set(PAIRS.values()) <= set(SCHEMES)


SUBGRAPHS = "enable_subgraph_type"


@pytest.mark.parametrize(
    ("processor", "step"),
    [
        (
            {"type": "smooth_quant"},
            Step("smoothquant", {"alpha": 0.5}, groups=("qkv", "gate_up")),
        ),
        (
            {"type": "iter_smooth", SUBGRAPHS: ["ov"], "exclude": ["*.layers.0.*"]},
            Step(
                "smoothquant",
                {"alpha": 0.9},
                exclude=("*.layers.0.*",),
                groups=("o",),
                by_producer=True,
            ),
        ),
        (
            {"type": "iter_smooth", SUBGRAPHS: ["norm-linear", "linear-linear", "up-down"]},
            Step("smoothquant", {"alpha": 0.9}, groups=("down", "qkv", "gate_up")),
        ),
        (
            {"type": "flex_smooth_quant", "alpha": 0.7, "beta": 0.3, SUBGRAPHS: ["norm-linear"]},
            Step("flexsmooth", {"alpha": 0.7, "beta": 0.3}, groups=("qkv", "gate_up")),
        ),
        ({"type": "flex_smooth_quant", SUBGRAPHS: ["ov"]}, Step("flexsmooth", groups=("o",))),
        (
            {"type": "flex_smooth_quant", SUBGRAPHS: ["ov"], "include": None, "exclude": []},
            Step("flexsmooth", groups=("o",)),
        ),
        (
            {
                "type": "flex_awq_ssz",
                "qconfig": {"act": TOKENS, "weight": ROWS | {"method": "ssz", "ext": {"step": 10}}},
                SUBGRAPHS: ["up-down"],
                "include": ["*.mlp.*"],
            },
            Step("flexsmooth", {"beta": 0.0}, ("*.mlp.*",), groups=("down",), by_producer=True),
        ),
        (
            {"type": "quarot", "block_size": 32, "down_proj_online_layers": []},
            Step("quarot", {"block_size": 32}),
        ),
        (
            {"type": "awq", "weight_qconfig": ROWS, SUBGRAPHS: ["norm-linear"]},
            Step(
                "awq",
                {"exponents": 20, "duo_scaling": False, "clip": False},
                groups=("qkv", "gate_up"),
            ),
        ),
        (
            {"type": "quarot", "online": False, "max_tp_size": 8, "export_extra_info": False},
            Step("quarot"),
        ),
        ({"type": "svd_res", "include": ["*.mlp.*"]}, Step("svd", {"rank": 32}, ("*.mlp.*",))),
    ],
)
def test_a_processor_is_a_step(processor, step):
    recipe = load_recipe(document(processor, linear(TOKENS, ROWS)))
    assert recipe.steps == (step,)
    assert recipe.rules == (Rule("W8A8_DYNAMIC"),)


def test_flatquant_is_a_scheme():
    strategy = {"qconfig": {"act": TOKENS | {"dtype": "int4"}, "weight": INT4}}
    strategies = [strategy | {"include": ["*.mlp.*"]}, strategy | {"exclude": ["*.mlp.*"]}]
    recipe = load_recipe(document({"type": "flatquant", "strategies": strategies, "epochs": 10}))
    assert recipe.rules == (
        Rule("W4A4_FLATQUANT_DYNAMIC", include=("*.mlp.*",)),
        Rule("W4A4_FLATQUANT_DYNAMIC", exclude=("*.mlp.*",)),
    )


def test_activations_that_are_not_named_stay_float():
    processor = {"type": "linear_quant", "qconfig": {"weight": ROWS}}
    assert load_recipe(document(processor)) == made((Rule("W8A16"),))


def test_a_search_may_be_of_some_weights():
    search = {"type": "flex_awq_ssz", "qconfig": {"act": TOKENS, "weight": INT4}}
    recipe = load_recipe(document(search, GOOD, linear(TOKENS, INT4, include=["*.down_proj"])))
    assert [rule.scheme for rule in recipe.rules] == ["W8A8_DYNAMIC", "W4A8_DYNAMIC"]


@pytest.mark.parametrize(("given", "sparsity"), [({}, 0.3), ({"sparse_ratio": 0.5}, 0.5)])
def test_float_weights_are_pruned(given, sparsity):
    more = {"include": ["*.mlp.*"], "exclude": ["*.down_proj"]}
    recipe = load_recipe(document({"type": "float_sparse", **given, **more}))
    found = {name: tuple(patterns) for name, patterns in more.items()}
    assert recipe.rules == (Rule("W16A16S", {}, ("admm",), {"admm.sparsity": sparsity}, **found),)


@pytest.mark.parametrize("more", [{}, {"qconfig": ROWS, "include": ["*"]}])
def test_a_cache(more):
    recipe = load_recipe(document(linear(TOKENS, ROWS), {"type": "dynamic_cache", **more}))
    assert recipe == made((Rule("W8A8_DYNAMIC"),), kv_cache="C8")


HEADS = {"dtype": "int8", "scope": "per_head", "symmetric": True, "method": "minmax"}


@pytest.mark.parametrize("more", [{}, {"qconfig": HEADS}])
def test_quantized_attention(more):
    layers = ["model.layers.0.*", "model.layers.61.*"]
    attention = {"type": "fa3_quant", "include": ["*"], "exclude": layers, **more}
    recipe = load_recipe(document(linear(TOKENS, ROWS), attention))
    assert (recipe.kv_cache, recipe.kv_cache_exclude) == ("C8", tuple(layers))
    assert "possible is dynamic_cache" in recipe.not_for["qwen3"]
    assert not {"deepseek_v3", "kimi_k2"} & set(recipe.not_for)


GOOD = linear(TOKENS, ROWS)
AWQ = {"type": "awq", "weight_qconfig": ROWS}


@pytest.mark.parametrize(
    ("process", "words"),
    [
        ([], r"spec\.process is \[\]"),
        (
            [{"type": "smooth_quant"}],
            r"spec\.process is \['smooth_quant'\], expected a linear_quant",
        ),
        ([3], r"spec\.process\[0\] is 3, expected a mapping"),
        ([{}], r"spec\.process\[0\]\.type: is missing"),
        ([GOOD, {"type": "magic"}], r"spec\.process\[1\]\.type is 'magic', expected one of linear"),
        *(
            (
                [{"type": name}, GOOD],
                rf"spec\.process\[0\]\.type: {name} is not supported, .*possib",
            )
            for name in (
                "online_quarot",
                "adapt_rotation",
                "autoround_quant",
                "kv_smooth",
                "load",
            )
        ),
        (
            [{"type": "float_sparse", "sparse_ratio": 0.9}],
            r"spec\.process\[0\]\.sparse_ratio is 0\.9, expected a number from 0 to 0\.7",
        ),
        # linear_quant
        ([GOOD | {"includes": []}], r"spec\.process\[0\]\.includes: is no known key"),
        ([GOOD | {"include": "*"}], r"spec\.process\[0\]\.include is '\*', expected a list"),
        ([GOOD | {"include": ["*", 3]}], r"spec\.process\[0\]\.include\[1\] is 3, expected text"),
        ([{"type": "linear_quant"}], r"spec\.process\[0\]\.qconfig: is missing"),
        (
            [linear(TOKENS, {"dtype": "int8"})],
            r"qconfig\.weight\.scope is|weight\.scope: is missing",
        ),
        (
            [linear(TOKENS, ROWS | {"dtype": "int2"})],
            r"spec\.process\[0\]\.qconfig\.weight\.dtype is 'int2', expected one of int8, int4",
        ),
        (
            [linear(TOKENS, ROWS | {"scope": "per_tensor"})],
            r"qconfig\.weight\.scope is 'per_tensor', expected one of per_channel, per_group",
        ),
        (
            [linear(TOKENS, ROWS | {"method": "autoround"})],
            r"spec\.process\[0\]\.qconfig\.weight\.method is 'autoround', expected one of minmax",
        ),
        (
            [linear(FLOAT, ROWS | {"symmetric": False, "method": "ssz"})],
            r"weight\.method is 'ssz', expected one of minmax, gptq",
        ),
        (
            [linear(TENSOR | {"symmetric": True}, ROWS)],
            r"qconfig\.act\.symmetric is True \(beside int8 per_channel symmetric .*expected false",
        ),
        (
            [linear(TOKENS | {"symmetric": False}, ROWS)],
            r"qconfig\.act\.symmetric is False .*, expected true",
        ),
        (
            [linear(TOKENS, ROWS | {"symmetric": False})],
            r"act\.dtype is 'int8' \(beside int8 per_channel asymmetric weights\), expected float",
        ),
        ([linear(TOKENS, GROUPS)], r"act\.dtype is 'int8' .* group_size 128 .*, expected float"),
        ([linear(TENSOR, INT4)], r"act\.scope is 'per_tensor' .*, expected per_token"),
        ([linear(FLOAT, FP8)], r"act\.dtype is 'float' .*, expected fp8_e4m3"),
        ([linear(FLOAT | {"method": "minmax"}, ROWS)], r"act\.method is 'minmax', expected none"),
        (
            [linear(TOKENS | {"method": "histogram"}, ROWS)],
            r"spec\.process\[0\]\.qconfig\.act\.method is 'histogram', expected minmax",
        ),
        ([linear(MX4 | {"method": "ceil_x"}, MX4)], r"act\.method is 'ceil_x', expected minmax"),
        (
            [linear(FLOAT, GROUPS | {"ext": {}})],
            r"qconfig\.weight\.ext\.group_size: is missing",
        ),
        (
            [linear(FLOAT, GROUPS | {"ext": {"group_size": 48}})],
            r"ext\.group_size is 48, expected one of 32, 64, 128, 256",
        ),
        (
            [linear(TOKENS, ROWS | {"ext": {"step": 3}})],
            r"weight\.ext is {'step': 3}, expected not",
        ),
        (
            [linear(TOKENS, ROWS | {"method": "ssz", "ext": {"step": 0}})],
            r"ext\.step is 0, expected an integer of at least 1",
        ),
        (
            [linear(TOKENS, ROWS | {"method": "gptq", "ext": {"percdamp": 0}})],
            r"ext\.percdamp is 0\.0, expected a number above 0",
        ),
        (
            [linear(TENSOR | {"ext": {"aggregation_type": "mean"}}, ROWS)],
            r"act\.ext\.aggregation_type is 'mean', expected max",
        ),
        ([linear(TOKENS, ROWS | {"ext": 3})], r"qconfig\.weight\.ext is 3, expected a mapping"),
        ([linear(MX8, MX8 | {"ext": {"axes": 0}})], r"weight\.ext\.axes is 0, expected -1"),
        (
            [linear(MX4, MX4 | {"method": "ceil_x", "ext": {"c": 6}})],
            r"weight\.ext\.c: is no known key, expected axes",
        ),
        ([linear(DUAL, DUAL | {"ext": {}})], r"weight\.ext\.dual_block_size: is missing"),
        (
            [linear(DUAL | {"ext": {"dual_block_size": 512}}, DUAL)],
            r"act\.ext\.dual_block_size is 512, expected the weight's 256",
        ),
        ([{"type": "group", "configs": []}], r"spec\.process\[0\]\.configs is \[\]"),
        (
            [{"type": "group", "configs": [GOOD, {"type": "awq"}]}],
            r"spec\.process\[0\]\.configs\[1\]\.type is 'awq', expected linear_quant",
        ),
        # smoothing
        (
            [{"type": "smooth_quant", "symmetric": False}, GOOD],
            r"spec\.process\[0\]\.symmetric is False \(no shift .*expected true",
        ),
        (
            [{"type": "iter_smooth", "symmetric": False}, GOOD],
            r"spec\.process\[0\]\.symmetric is False \(no shift .*expected true",
        ),
        (
            [{"type": "iter_smooth", "scale_min": 0.01}, GOOD],
            r"spec\.process\[0\]\.scale_min is 0.01, expected 1e-05",
        ),
        (
            [{"type": "iter_smooth", "alpha": 1.5}, GOOD],
            r"spec\.process\[0\]\.alpha is 1.5, expected a number from 0 to 1",
        ),
        ([{"type": "iter_smooth", "alpha": True}, GOOD], r"alpha is True, expected a number"),
        (
            [{"type": "iter_smooth", SUBGRAPHS: ["linear-linear"]}, GOOD],
            r"spec\.process\[0\]\.enable_subgraph_type is .*nothing to smooth",
        ),
        (
            [{"type": "iter_smooth", SUBGRAPHS: ["qk"]}, GOOD],
            r"spec\.process\[0\]\.enable_subgraph_type is 'qk', expected some of up-down, ov",
        ),
        (
            [{"type": "flex_smooth_quant", "alpha": 1.5}, GOOD],
            r"spec\.process\[0\]\.alpha is 1.5",
        ),
        ([{"type": "awq"}, GOOD], r"spec\.process\[0\]\.weight_qconfig: is missing"),
        (
            [AWQ | {"weight_qconfig": INT4}, GOOD],
            r"weight_qconfig is int4 per_channel symmetric, expected int8 per_channel symmetric as "
            r"spec\.process\[1\]\.qconfig\.weight",
        ),
        (
            [
                {"type": "flex_awq_ssz", "qconfig": {"act": TOKENS, "weight": INT4}},
                GOOD,
                linear(TENSOR, ROWS),
            ],
            r"\[0\]\.qconfig\.weight is int4 per_channel symmetric, expected int8 per_channel symm",
        ),
        ([{"type": "flex_awq_ssz"}, GOOD], r"spec\.process\[0\]\.qconfig: is missing"),
        (
            [{"type": "flex_awq_ssz", "beta": 0.5, "qconfig": GOOD["qconfig"]}, GOOD],
            r"spec\.process\[0\]\.beta is 0\.5 \(only alpha is searched\), expected 0",
        ),
        ([AWQ | {"n_grid": 0}, GOOD], r"spec\.process\[0\]\.n_grid is 0"),
        ([{"type": "svd_res", "rank": 0}, GOOD], r"spec\.process\[0\]\.rank is 0"),
        # rotations
        ([{"type": "quarot", "online": True}, GOOD], r"online is True .*expected false"),
        *(
            ([{"type": "quarot", "block_size": wrong}, GOOD], rf"block_size is {wrong}, expected -")
            for wrong in (0, 48, -2, True, 32.0)
        ),
        (
            [{"type": "quarot", "down_proj_online_layers": [-1]}, GOOD],
            r"spec\.process\[0\]\.down_proj_online_layers\[0\] is -1, expected an integer",
        ),
        (
            [{"type": "smooth_quant"}, {"type": "quarot"}, GOOD],
            r"spec\.process\[1\]: comes after spec\.process\[0\], expected it before",
        ),
        (
            [GOOD, {"type": "smooth_quant"}],
            r"spec\.process\[1\]: comes after spec\.process\[0\], expected it before",
        ),
        # flatquant
        ([{"type": "flatquant"}], r"spec\.process\[0\]\.strategies: is missing"),
        ([{"type": "flatquant", "strategies": []}], r"strategies is \[\], expected at least one"),
        (
            [{"type": "flatquant", "strategies": [], "epochs": 15}],
            r"spec\.process\[0\]\.epochs is 15 \(the training here is another one\)",
        ),
        (
            [{"type": "flatquant", "strategies": [{"qconfig": {"act": TOKENS, "weight": ROWS}}]}],
            r"spec\.process\[0\]\.strategies\[0\]\.qconfig\.weight\.dtype is 'int8', expected int4",
        ),
        # the cache
        (
            [GOOD, {"type": "dynamic_cache", "qconfig": ROWS | {"symmetric": False}}],
            r"spec\.process\[1\]\.qconfig\.symmetric is False .*expected true",
        ),
        (
            [GOOD, {"type": "dynamic_cache", "include": ["*.0.*"]}],
            r"spec\.process\[1\]\.include is \['\*\.0\.\*'\]",
        ),
        (
            [GOOD, {"type": "dynamic_cache", "qconfig": TOKENS}],
            r"spec\.process\[1\]\.qconfig\.scope is 'per_token', expected per_channel",
        ),
        (
            [GOOD, {"type": "fa3_quant", "qconfig": TOKENS}],
            r"spec\.process\[1\]\.qconfig\.scope is 'per_token' .*expected per_head",
        ),
        (
            [GOOD, {"type": "fa3_quant", "include": ["*.0.*"]}],
            r"spec\.process\[1\]\.include is \['\*\.0\.\*'\], expected \['\*'\] with exclude",
        ),
    ],
)
def test_a_processor_without_counterpart_is_refused_by_its_path(process, words):
    with pytest.raises(MsQuantError, match=words):
        load_recipe(document(*process))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"runner": "fast"}, "spec.runner is 'fast', expected one of auto, layer_wise, model_wise"),
        ({"prior": 3}, "spec.prior is 3, expected a list"),
        (
            {"prior": [{"process": [GOOD]}]},
            r"spec\.prior\[0\]\.process\[0\]\.qconfig: is no known key, expected one of type, stag",
        ),
        (
            {"prior": [{"process": [{"type": "smooth_quant"}]}]},
            r"prior\[0\]\.process\[0\]\.type is 'smooth_quant' \(a stage before may only prepare\)",
        ),
        (
            {"prior": [{"process": [{"type": "adapt_rotation", "stage": 2}]}]},
            r"spec\.prior\[0\]\.process\[0\]\.stage is 2, expected 1",
        ),
        ({"process": {}}, "spec.process is {}, expected a list"),
        ({"proces": []}, "spec.proces: is no known key, expected one of runner, prior, process"),
        ({"dataset": 3}, "spec.dataset is 3, expected text"),
        ({"dataset": ""}, "spec.dataset is '', expected the name of a file"),
        (
            {"save": [{"type": "gguf"}]},
            r"spec\.save\[0\]\.type is 'gguf', expected one of ascendv1",
        ),
        (
            {"save": [{"type": "ascendv1_saver", "part_file_size": -1}]},
            r"spec\.save\[0\]\.part_file_size is -1",
        ),
        (
            {
                "save": [
                    {"type": "ascendv1_saver", "part_file_size": 4},
                    {"type": "mindie_format_saver", "part_file_size": 2},
                ]
            },
            r"spec\.save\[1\]\.part_file_size is 2, expected 4 as spec\.save\[0\]\.part_file_size",
        ),
    ],
)
def test_a_spec_without_counterpart_is_refused_by_its_path(spec, words):
    with pytest.raises(MsQuantError, match=words):
        load_recipe(document(GOOD) | {"spec": {"process": [GOOD], **spec}})


@pytest.mark.parametrize("kind", ["vlm", "sd"])
def test_the_multimodal_kinds_say_the_same(kind):
    extra = {"default_text": "x"} if kind == "vlm" else {"multimodal_sd_config": {}}
    text = document(GOOD, dataset="images", **extra)
    recipe = load_recipe(text | {"apiversion": f"multimodal_{kind}_modelslim_v1"})
    assert recipe == made((Rule("W8A8_DYNAMIC"),), calib="images")
    (note,) = recipe.notes
    assert note.startswith(f"spec.{next(iter(extra))} is for ")


def test_conversion_without_quantization_is_refused_by_name():
    with pytest.raises(MsQuantError, match="apiversion modelslim_convert is not supported, it cha"):
        load_recipe(document(GOOD) | {"apiversion": "modelslim_convert"})


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        ({"runner": "dp_layer_wise"}, "spec.runner: dp_layer_wise is how msModelSlim works"),
        ({"runner": "model_wise"}, "spec.runner: model_wise is how msModelSlim works"),
        ({"default_text": "Describe."}, "spec.default_text is for images"),
        (
            {"prior": [{"process": [{"type": "adapt_rotation", "stage": 1, "steps": 20}]}]},
            "spec.prior[0]: prepares for adapt_rotation, which spec.process does not have",
        ),
        ({"prior": [{"dataset": "laos.jsonl"}]}, "spec.prior[0]: prepares for"),
        (
            {"process": [{"type": "quarot", "down_proj_online_layers": [0, 3]}, GOOD]},
            "spec.process[0].down_proj_online_layers: is of rotations at run time",
        ),
        (
            {"process": [{"type": "quarot", "export_extra_info": True}, GOOD]},
            "spec.process[0].export_extra_info: optional/quarot.safetensors is not written",
        ),
        (
            {"process": [linear(TOKENS, INT4 | {"ext": {"group_size": 256}})]},
            "spec.process[0].qconfig.weight.ext.group_size: changes nothing, the scope is per_cha",
        ),
    ],
)
def test_what_changes_nothing_is_noted(spec, note):
    recipe = load_recipe(document() | {"spec": {"process": [GOOD], **spec}})
    assert len(recipe.notes) == 1 and recipe.notes[0].startswith(note)


@pytest.mark.parametrize("runner", ["auto", "layer_wise"])
def test_the_usual_runners_are_not_noted(runner):
    assert load_recipe(document(GOOD, runner=runner)).notes == ()


def test_a_recipe_without_spec_is_refused():
    with pytest.raises(MsQuantError, match="spec: is missing"):
        load_recipe({"apiversion": "modelslim_v1"})
