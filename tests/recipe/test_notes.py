"""What is said of a recipe on a model."""

from __future__ import annotations

import pytest

from ms_quant.recipe import Recipe, Rule, Step
from ms_quant.recipe.notes import notes

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
MEMBERS = {
    f"{index}.{group}": [f"model.layers.{index}.{name}" for name in names]
    for index in range(2)
    for group, names in (("qkv", NAMES[:3]), ("down", NAMES[3:]))
}
PRODUCERS = {
    path: path.replace("down_proj", "up_proj") if "down" in path else f"{path[:15]}input_layernorm"
    for paths in MEMBERS.values()
    for path in paths
}


def said(*records: Rule | Step, **more) -> list[str]:
    rules = tuple(record for record in records if isinstance(record, Rule))
    steps = tuple(record for record in records if isinstance(record, Step))
    recipe = Recipe(rules or (Rule("W8A8"),), steps, **{"lenient": True, **more})
    return notes(recipe, MEMBERS, PRODUCERS, ("lm_head",))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Rule("W8A8", exclude=("lm_head", "*.down_proj")), []),
        (
            Rule("W8A8", include=("*.dwon_proj", "*"), where="a"),
            ["a: pattern '*.dwon_proj' matches nothing of this model; near it is 'down_proj'"],
        ),
        (
            Rule("W8A8", exclude=("*mlp.experts*",), where="a"),
            ["a: pattern '*mlp.experts*' matches nothing of this model"],
        ),
        (
            Rule("W8A8", exclude=("model.layers.7.mlp.down_proj", "x", "*.0.*"), where="a"),
            [
                "a: 2 patterns, 'model.layers.7.mlp.down_proj' the first, match nothing of this "
                "model; near it is 'model.layers.1.mlp.down_proj'"
            ],
        ),
        (
            Step("smoothquant", exclude=("*layernrom",), by_producer=True, where="b"),
            ["b: pattern '*layernrom' matches nothing of this model"],
        ),
        (
            Step("smoothquant", include=("*.input_layernrom",), by_producer=True, where="b"),
            [
                "b: pattern '*.input_layernrom' matches nothing of this model; near it is "
                "'input_layernorm'"
            ],
        ),
    ],
)
def test_patterns_that_match_nothing_are_named_with_a_name_near_them(record, expected):
    assert said(record) == expected


def test_what_stays_float_beside_a_fused_one_is_counted():
    one = Rule("W8A8", exclude=("model.layers.0.self_attn.k_proj",))
    first = "model.layers.0.self_attn.q_proj and 1 more stay float, too: runtimes fuse it with a "
    assert said(one) == [f"{first}linear that does"]
    assert said(one, lenient=False) == []  # refused there
    two = Rule("W8A8", exclude=("*.1.self_attn.{q,k}_proj",))
    assert said(two) == [
        "model.layers.1.self_attn.v_proj stays float, too: runtimes fuse it with a linear that does"
    ]


def test_notes_of_the_recipe_come_first():
    assert said(Rule("W8A8", include=("*", "?"), where="a"), notes=("first",))[0] == "first"
