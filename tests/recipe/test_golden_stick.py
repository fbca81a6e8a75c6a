"""PTQConfig, by the public names of its fields and enums."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.recipe import Recipe, Rule, Step, from_ptq_config, load_recipe, to_native
from ms_quant.recipe.assign import assign

PTQMode = Enum("PTQMode", {"QUANTIZE": "quantize", "DEPLOY": "deploy"})
BackendTarget = Enum("BackendTarget", {"NONE": "none", "ASCEND": "ascend"})
Recovery = Enum("PrecisionRecovery", {"GPTQ": "gptq", "NONE": "none"})
Outliers = Enum(
    "OutliersSuppressionType",
    {
        "SMOOTH": "smooth",
        "AWQ": "awq",
        "OUTLIER_SUPPRESSION_PLUS": "outlier-suppression+",
        "OUTLIER_SUPPRESSION_LITE": "outlier-suppression-lite",
        "NONE": "none",
    },
)
Granularity = Enum(
    "QuantGranularity",
    {
        "PER_TENSOR": "per_tensor",
        "PER_CHANNEL": "per_channel",
        "PER_TOKEN": "per_token",
        "PER_GROUP": "per_group",
    },
)


class DType:
    """As MindSpore's: only its text says what it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


INT8, INT4, FLOAT16 = DType("Int8"), DType("Int4"), DType("Float16")


@dataclass
class Config:
    mode: Any = PTQMode.QUANTIZE
    backend: Any = BackendTarget.ASCEND
    opname_blacklist: list[str] = field(default_factory=list)
    algo_args: Any = field(default_factory=dict)
    weight_quant_dtype: Any = INT8
    kvcache_quant_dtype: Any = None
    act_quant_dtype: Any = None
    precision_recovery: Any = Recovery.NONE
    outliers_suppression: Any = Outliers.NONE
    weight_quant_granularity: Any = Granularity.PER_CHANNEL
    kvcache_quant_granularity: Any = Granularity.PER_CHANNEL
    act_quant_granularity: Any = Granularity.PER_TENSOR
    group_size: int = 0
    weight_clip: bool = False


@dataclass
class GPTQQuantConfig:
    block_size: int = 128
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False


@dataclass
class AWQConfig:
    duo_scaling: bool = True
    smooth_alpha: list[float] = field(default_factory=lambda: [i / 20 for i in range(20)])
    weight_clip_ratio: list[float] = field(default_factory=lambda: [1 - i / 20 for i in range(10)])


@dataclass
class SmoothQuantConfig:
    alpha: float = 0.5


GPTQ = {"gptq.damping": 0.01, "gptq.act_order": False, "gptq.static_groups": False}
ORDERED = GPTQ | {"gptq.act_order": True, "gptq.static_groups": True}
A8W8 = {"act_quant_dtype": INT8}
A8DYN = A8W8 | {"act_quant_granularity": Granularity.PER_TOKEN}
W4 = {"weight_quant_dtype": INT4}
GROUPS = {"weight_quant_granularity": Granularity.PER_GROUP, "group_size": 128}
SMOOTH = {"outliers_suppression": Outliers.SMOOTH}
AWQ = {"outliers_suppression": Outliers.AWQ}
OSL = {"outliers_suppression": Outliers.OUTLIER_SUPPRESSION_LITE}
WITH_GPTQ = {"precision_recovery": Recovery.GPTQ}
CACHE = {"kvcache_quant_dtype": INT8}


@pytest.mark.parametrize(
    ("fields", "rule", "steps"),
    [
        ({}, Rule("W8A16"), ()),
        (GROUPS, Rule("W8A16", {"group_size": 128}), ()),
        (W4, Rule("W4A16", {"group_size": 0}), ()),
        (W4 | GROUPS, Rule("W4A16", {"group_size": 128}), ()),
        ({"weight_clip": True}, Rule("W8A16", {}, ("clip",)), ()),
        (WITH_GPTQ, Rule("W8A16", {}, ("gptq",), GPTQ), ()),
        (
            W4 | GROUPS | WITH_GPTQ | {"algo_args": GPTQQuantConfig(damp_percent=0.1)},
            Rule("W4A16", {"group_size": 128}, ("gptq",), GPTQ | {"gptq.damping": 0.1}),
            (),
        ),
        (
            W4 | AWQ | {"algo_args": AWQConfig()},
            Rule("W4A16", {"group_size": 0}),
            (Step("awq", {"exponents": 20, "duo_scaling": True}),),
        ),
        (
            AWQ | {"algo_args": {"duo_scaling": False, "smooth_alpha": [0, 0.5]}},
            Rule("W8A16"),
            (Step("awq", {"exponents": 2, "duo_scaling": False}),),
        ),
        (A8W8, Rule("W8A8"), ()),
        (A8W8 | SMOOTH, Rule("W8A8"), (Step("smoothquant", {"alpha": 0.5}),)),
        (
            A8W8 | SMOOTH | {"algo_args": SmoothQuantConfig(0.7)},
            Rule("W8A8"),
            (Step("smoothquant", {"alpha": 0.7}),),
        ),
        (A8W8 | OSL, Rule("W8A8"), (Step("osl"),)),
        (A8DYN, Rule("W8A8_DYNAMIC"), ()),
        (A8DYN | SMOOTH, Rule("W8A8_DYNAMIC"), (Step("smoothquant", {"alpha": 0.5}),)),
        (
            A8DYN
            | W4
            | GROUPS
            | WITH_GPTQ
            | {"algo_args": {"desc_act": True, "static_groups": True}},
            Rule("W4A8_DYNAMIC", {"group_size": 128}, ("gptq",), ORDERED),
            (),
        ),
        (
            A8DYN
            | W4
            | WITH_GPTQ
            | {"algo_args": GPTQQuantConfig(desc_act=True, static_groups=True)},
            Rule("W4A8_DYNAMIC", {"group_size": 0}, ("gptq",), ORDERED),
            (),
        ),
    ],
)
def test_a_config_is_a_recipe(fields, rule, steps):
    recipe = from_ptq_config(Config(**fields))
    assert recipe == Recipe((rule,), steps)
    assert load_recipe(to_native(recipe)) == recipe


@pytest.mark.parametrize("fields", [{}, A8W8, A8W8 | SMOOTH, A8DYN])
@pytest.mark.parametrize(
    ("granularity", "name"),
    [(Granularity.PER_CHANNEL, "C8"), (Granularity.PER_TOKEN, "C8_DYNAMIC")],
)
def test_a_cache(fields, granularity, name):
    config = Config(**fields, **CACHE, kvcache_quant_granularity=granularity)
    assert from_ptq_config(config).kv_cache == name


def test_a_cache_alone_is_refused():
    with pytest.raises(MsQuantError, match=r"weight_quant_dtype is None \(a cache alone is not"):
        from_ptq_config(Config(weight_quant_dtype=None, **CACHE))


@pytest.mark.parametrize("dtype", [INT8, np.int8, np.dtype("int8"), "int8"])
def test_ways_to_write_a_type(dtype):
    assert from_ptq_config(SimpleNamespace(act_quant_dtype=dtype)).rules[0].scheme == "W8A8"


PATHS = {
    "model.layers.0.self_attn.q_proj": "qkv",
    "model.layers.0.mlp.down_proj": "down",
    "model.layers.0.mlp.up_proj": "gate_up",
}


def test_a_blacklist_is_parts_of_names():
    recipe = from_ptq_config(Config(opname_blacklist=["down_proj", "lm_head", "a[b]*"]))
    assert recipe.rules[0].exclude == ("*down_proj*", r"*lm_head*", r"*a\[b\]\**")
    assert list(assign(recipe, PATHS)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    ]


def test_layer_policies_take_linears_from_the_config():
    policies = OrderedDict(
        {
            r".*\.mlp\.(?!down)": Config(**A8DYN),
            r".*\.down_proj$": None,
        }
    )
    recipe = from_ptq_config(Config(**A8W8, **SMOOTH), policies)
    names = (r"re:.*\.mlp\.(?!down)", r"re:.*\.down_proj$")
    assert recipe.rules == (
        Rule("W8A8", exclude=names),
        Rule("W8A8_DYNAMIC", include=names[:1]),
    )
    assert recipe.steps == (Step("smoothquant", {"alpha": 0.5}, exclude=names),)
    schemes = {path: found.scheme for path, found in assign(recipe, PATHS).items()}
    assert schemes == {
        "model.layers.0.self_attn.q_proj": "W8A8",
        "model.layers.0.mlp.up_proj": "W8A8_DYNAMIC",
    }
    assert load_recipe(to_native(recipe)) == recipe


def test_two_policies_of_one_linear_are_refused():
    policies = {r".*mlp": Config(), r".*down": Config()}
    with pytest.raises(MsQuantError, match=r"down_proj: is reached by .*mlp.* and .*down"):
        assign(from_ptq_config(Config(), policies), PATHS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": PTQMode.DEPLOY}, r"config\.mode is .*DEPLOY.*, expected QUANTIZE"),
        ({"backend": "cuda"}, r"config\.backend is 'cuda', expected one of ASCEND, NONE"),
        ({"weight_quant_dtype": FLOAT16}, r"config\.weight_quant_dtype is .*, expected int8, qint"),
        ({"act_quant_dtype": INT4}, r"config\.act_quant_dtype is 'int4', expected int8 or None"),
        ({"kvcache_quant_dtype": INT4}, r"config\.kvcache_quant_dtype is 'int4'"),
        (
            A8W8 | {"outliers_suppression": Outliers.OUTLIER_SUPPRESSION_PLUS},
            r"config\.outliers_suppression is .*PLUS.*, expected one of NONE, SMOOTH, AWQ, OUTLIER",
        ),
        (SMOOTH, r"config\.outliers_suppression is 'SMOOTH' \(the dtypes say W8A16\), expected o"),
        (A8W8 | AWQ, r"config\.outliers_suppression is 'AWQ' \(the dtypes say W8A8\)"),
        (A8DYN | OSL, r"config\.outliers_suppression is .*W8A8_DYNAMIC.*expected one of NONE, SMO"),
        (A8W8 | WITH_GPTQ, r"config\.precision_recovery is 'GPTQ' \(the dtypes say W8A8\), expect"),
        (AWQ | WITH_GPTQ, r"config\.precision_recovery is 'GPTQ', expected NONE with AWQ"),
        (A8DYN | W4, r"config\.precision_recovery is 'NONE' .*W4A8_DYNAMIC.*expected GPTQ"),
        (A8W8 | W4, r"config\.act_quant_granularity is 'PER_TENSOR', expected PER_TOKEN"),
        (
            A8DYN | W4 | WITH_GPTQ,
            r"config\.algo_args\.desc_act is False .*expected True",
        ),
        (
            A8DYN | W4 | WITH_GPTQ | {"algo_args": {"desc_act": True}},
            r"config\.algo_args\.static_groups is False .*expected True",
        ),
        (
            W4 | GROUPS | WITH_GPTQ | {"algo_args": {"desc_act": True}},
            r"config\.algo_args\.static_groups is False \(desc_act is True and PER_GROUP\)",
        ),
        (A8W8 | GROUPS, r"config\.weight_quant_granularity is 'PER_GROUP'"),
        ({"group_size": 64}, r"config\.group_size is 64 .*PER_CHANNEL.*, expected 0"),
        (GROUPS | {"group_size": 0}, r"config\.group_size is 0 .*expected one of 64, 128, 256"),
        ({"group_size": "64"}, r"config\.group_size is '64', expected an integer"),
        ({"weight_clip": 1}, r"config\.weight_clip is 1, expected True or False"),
        (W4 | CACHE, r"config\.kvcache_quant_dtype is 'int8', expected None with qint4x2"),
        (A8W8 | OSL | CACHE, r"config\.kvcache_quant_dtype is 'int8', expected None with OUTLIER"),
        (WITH_GPTQ | CACHE, r"config\.kvcache_quant_dtype is 'int8', expected None with GPTQ"),
        (
            {"weight_quant_dtype": None} | A8W8,
            r"config\.act_quant_dtype is 'int8' \(weight_quant_dtype is None\), expected None",
        ),
        ({"weight_quant_dtype": None}, r"config\.weight_quant_dtype is None \(nothing is quantiz"),
        (
            {"weight_quant_dtype": None} | CACHE | SMOOTH,
            r"config\.outliers_suppression is 'SMOOTH'",
        ),
        (
            {"opname_blacklist": "lm_head"},
            r"config\.opname_blacklist is 'lm_head', expected a list",
        ),
        ({"algo_args": 3}, r"config\.algo_args is 3, expected a dict or a dataclass"),
        ({"algo_args": {"alpha": 0.5}}, r"config\.algo_args is {'alpha': 0.5} \(nothing takes"),
        (
            A8W8 | SMOOTH | {"algo_args": {"beta": 1}},
            r"config\.algo_args\.beta: is no known key, expected alpha",
        ),
        (A8W8 | SMOOTH | {"algo_args": {"alpha": 2}}, r"config: smoothquant\.alpha is 2"),
        (
            AWQ | {"algo_args": {"smooth_alpha": [0.3, 0.5]}},
            r"config\.algo_args\.smooth_alpha is \[0\.3, 0\.5\], expected \[0, 1/n",
        ),
        (
            AWQ | {"algo_args": {"weight_clip_ratio": [1.0]}},
            r"config\.algo_args\.weight_clip_ratio is \[1\.0\]",
        ),
    ],
)
def test_what_goes_together_nowhere_is_refused_by_its_field(fields, words):
    with pytest.raises(MsQuantError, match=words):
        from_ptq_config(Config(**fields))


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"(": None}, r"layer_policies\['\('\] is no regular expression"),
        ({3: None}, r"layer_policies\[3\] is no regular expression"),
        ({".*": Config(**AWQ, **A8W8)}, r"layer_policies\['\.\*'\]\.outliers_suppression is 'AWQ'"),
        ({".*": Config(**CACHE)}, r"layer_policies\['\.\*'\]\.kvcache_quant_dtype is 'int8', exp"),
    ],
)
def test_a_policy_is_refused_by_its_pattern(policies, words):
    with pytest.raises(MsQuantError, match=words):
        from_ptq_config(Config(), policies)
