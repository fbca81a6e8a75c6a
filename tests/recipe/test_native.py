"""Our own language: the records as they are."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant.errors import MsQuantError
from ms_quant.recipe import Recipe, Rule, Step, from_native, load_recipe, to_native

TEXT = """
apiversion: ms_quant_v1
steps:
  - algorithm: smoothquant
    options: {alpha: 0.9}
    groups: [qkv, gate_up]
rules:
  - scheme: W8A8_DYNAMIC
    include: ["*.self_attn.*"]
  - scheme: W4A16
    options: {group_size: 128, symmetric: false}
    algorithms: [gptq]
    algorithm_options: {gptq.damping: 0.02}
    include: ["*.mlp.*"]
    exclude: ["*.layers.{0,1}.mlp.down_proj"]
kv_cache: C8
kv_cache_exclude: ["model.layers.0.self_attn"]
formats: [ascend, compressed-tensors]
calib: calib.jsonl
samples: 32
seq_len: 512
seed: 7
shard_bytes: 0
"""
EXPECTED = Recipe(
    rules=(
        Rule("W8A8_DYNAMIC", include=("*.self_attn.*",)),
        Rule(
            "W4A16",
            {"group_size": 128, "symmetric": False},
            ("gptq",),
            {"gptq.damping": 0.02},
            ("*.mlp.*",),
            ("*.layers.{0,1}.mlp.down_proj",),
        ),
    ),
    steps=(Step("smoothquant", {"alpha": 0.9}, groups=("qkv", "gate_up")),),
    kv_cache="C8",
    kv_cache_exclude=("model.layers.0.self_attn",),
    formats=("ascend", "compressed-tensors"),
    calib="calib.jsonl",
    samples=32,
    seq_len=512,
    seed=7,
    shard_bytes=0,
)


def document(**more):
    return {"apiversion": "ms_quant_v1", "rules": [{"scheme": "W8A8"}]} | more


def test_a_file_becomes_records_and_they_the_same_document(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    recipe = load_recipe(path)
    assert recipe == EXPECTED == load_recipe(str(path)) == load_recipe(yaml.safe_load(TEXT))
    assert to_native(recipe) == yaml.safe_load(TEXT)
    assert [record.where for record in recipe.rules + recipe.steps] == [
        "rules[0]",
        "rules[1]",
        "steps[0]",
    ]


def test_a_short_one():
    recipe = load_recipe(document())
    assert recipe == Recipe((Rule("W8A8"),))
    assert to_native(recipe) == document()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "apiversion is missing, expected one of ms_quant_v1, modelslim_v0, "),
        (document(apiversion="modelslim_v2"), "apiversion is 'modelslim_v2', expected one of"),
        (document(apiversion=["x"]), r"apiversion is \['x'\]"),
        (document(rules=[]), "rules: are empty"),
        (document(rule=[]), "rule: is no known key, expected one of apiversion, rules, steps"),
        (document(rules=[{}]), r"rules\[0\]\.scheme: is missing"),
        (document(rules=[{"scheme": "W9"}]), r"rules\[0\]: scheme 'W9' is unknown"),
        (document(rules=[{"scheme": "W8A8", "x": 1}]), r"rules\[0\]\.x: is no known key, expected"),
        (document(rules=[{"scheme": 8}]), r"rules\[0\]\.scheme is 8"),
        (document(rules=[{"scheme": "W8A8", "include": "*"}]), r"rules\[0\]\.include is '\*'"),
        (document(rules=[{"scheme": "W8A8", "include": []}]), r"rules\[0\]: include is empty"),
        (document(rules=[{"scheme": "W8A8", "exclude": [""]}]), r"rules\[0\]: pattern ''"),
        (
            document(rules=[{"scheme": "W8A8", "options": {"group_size": 64}}]),
            r"rules\[0\]: scheme W8A8 takes no group_size",
        ),
        (
            document(rules=[{"scheme": "W4A16", "options": {"group_size": "64"}}]),
            r"rules\[0\]: group_size is '64'",
        ),
        (
            document(rules=[{"scheme": "W4A16", "options": {"group_size": float("nan")}}]),
            r"rules\[0\]\.options\.group_size is nan: expected true, false, text or a finite",
        ),
        (
            document(rules=[{"scheme": "W8A8", "algorithms": ["osl"]}]),
            r"rules\[0\]: algorithm 'osl' is unknown here, expected one of histogram, percentile",
        ),
        (
            document(rules=[{"scheme": "W8A16", "algorithms": ["histogram"]}]),
            r"rules\[0\]: algorithm 'histogram' does not work with scheme W8A16",
        ),
        (
            document(
                rules=[
                    {
                        "scheme": "W8A16",
                        "algorithms": ["gptq"],
                        "algorithm_options": {"gptq.damping": "0.1"},
                    }
                ]
            ),
            r"rules\[0\]: option gptq.damping is '0.1', expected a float",
        ),
        (
            document(
                rules=[
                    {
                        "scheme": "W8A16",
                        "algorithms": ["gptq"],
                        "algorithm_options": {"damping": 0.1},
                    }
                ]
            ),
            r"rules\[0\]: option 'damping': expected its full name",
        ),
        (document(steps=[{"algorithm": "gptq"}]), r"steps\[0\]: algorithm 'gptq' is unknown here"),
        (
            document(steps=[{"algorithm": "smoothquant", "options": {"alpha": 2}}]),
            r"steps\[0\]: smoothquant.alpha is 2",
        ),
        (
            document(steps=[{"algorithm": "awq", "options": {"exponents": True}}]),
            r"steps\[0\]: option exponents is True",
        ),
        (
            document(steps=[{"algorithm": "svd", "options": {"alpha": 2}}]),
            r"steps\[0\]: .* takes no option 'svd.alpha'",
        ),
        (
            document(steps=[{"algorithm": "osl", "groups": ["mlp"]}]),
            r"steps\[0\]: groups 'mlp' is unknown here, expected one of qkv, o, gate_up, down",
        ),
        (document(kv_cache="C4"), "kv_cache 'C4' is unknown here, expected one of C8, C8_ABSMAX"),
        (document(kv_cache_exclude=["*"]), "kv_cache_exclude: there is no kv_cache, expected one"),
        (document(formats=["gguf"]), "formats 'gguf' is unknown here"),
        (document(samples=0), "samples is 0, expected at least 1"),
        (document(samples=True), "samples is True"),
        (document(seed="1"), "seed is '1'"),
        (document(shard_bytes=-1), "shard_bytes is -1"),
        (document(calib=""), "calib is ''"),
        (document(steps={}), "steps is {}"),
        ({1: 2} | document(), "Keys should be strings"),
    ],
)
def test_refusals_name_the_key(found, words):
    with pytest.raises(MsQuantError, match=words):
        load_recipe(found)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("apiversion: ms_quant_v1\nrules: [{scheme: W9}]")
    with pytest.raises(MsQuantError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: rules[0]: scheme 'W9'")


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), min_size=1, max_size=9)
SCALARS = st.one_of(
    st.booleans(), st.integers(), NAMES, st.floats(allow_nan=False, allow_infinity=False)
)
OPTIONS = st.dictionaries(NAMES, SCALARS, max_size=3)
TUPLES = st.lists(NAMES, max_size=3).map(tuple)
SOME = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
RULES = st.builds(Rule, NAMES, OPTIONS, TUPLES, OPTIONS, SOME, TUPLES)
STEPS = st.builds(Step, NAMES, OPTIONS, SOME, TUPLES, TUPLES)
COUNTS = st.none() | st.integers()
RECIPES = st.builds(
    Recipe,
    st.lists(RULES, max_size=3).map(tuple),
    st.lists(STEPS, max_size=3).map(tuple),
    st.just("") | NAMES,
    TUPLES,
    st.none() | NAMES,
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    kv_cache_exclude=TUPLES,
)


@settings(deadline=None)
@given(RECIPES)
def test_records_survive_the_document_and_the_text(recipe):
    document = to_native(recipe)
    assert from_native(document) == recipe
    assert to_native(from_native(document)) == document
    assert from_native(yaml.safe_load(yaml.safe_dump(document))) == recipe
