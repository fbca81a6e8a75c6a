"""What a recipe does to one linear."""

from __future__ import annotations

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.recipe import LayerChoice, Recipe, Rule, Step, assign, idle_patterns

Q, OUT, UP, DOWN = (
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)
LINEARS = {Q: "qkv", OUT: "o", UP: "gate_up", DOWN: "down"}


def test_rules_and_steps_meet_at_a_linear():
    recipe = Recipe(
        (
            Rule("W8A8_DYNAMIC", include=("*.self_attn.*",)),
            Rule(
                "W4A16", {"group_size": 64}, ("gptq",), {"gptq.damping": 0.1}, ("*.mlp.*",), (DOWN,)
            ),
        ),
        (Step("smoothquant", {"alpha": 0.9}, groups=("qkv",)), Step("quarot")),
    )
    assert assign(recipe, LINEARS) == {
        Q: LayerChoice("W8A8_DYNAMIC", {}, ("smoothquant", "quarot"), {"smoothquant.alpha": 0.9}),
        OUT: LayerChoice("W8A8_DYNAMIC", {}, ("quarot",)),
        UP: LayerChoice("W4A16", {"group_size": 64}, ("quarot", "gptq"), {"gptq.damping": 0.1}),
    }


def test_a_branch_or_a_transform_makes_another_scheme():
    recipe = Recipe(
        (Rule("W4A4_MXFP4", include=("*.mlp.*",)), Rule("W4A4_DYNAMIC", exclude=("*.mlp.*",))),
        (Step("svd", {"rank": 16}, (DOWN,)), Step("flatquant", include=(OUT,))),
    )
    found = assign(recipe, LINEARS)
    assert {path: made.scheme for path, made in found.items()} == {
        Q: "W4A4_DYNAMIC",
        OUT: "W4A4_FLATQUANT_DYNAMIC",
        UP: "W4A4_MXFP4",
        DOWN: "W4A4_MXFP4_SVD",
    }
    assert found[DOWN] == LayerChoice("W4A4_MXFP4_SVD", {}, ("svd",), {"svd.rank": 16})


def test_what_a_scheme_cannot_do_without_is_named():
    found = assign(Recipe((Rule("W4A4_FLATQUANT_DYNAMIC"),)), LINEARS)
    assert found[Q].algorithms == ("flatquant",)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            Recipe((Rule("W8A8", where="a"), Rule("W8A16", include=(DOWN,), where="b"))),
            rf"{DOWN}: is reached by a and b, expected one",
        ),
        (
            Recipe((Rule("W8A16", where="a"),), (Step("smoothquant", where="b"),)),
            rf"a and b: {Q}: algorithm 'smoothquant' does not work with scheme W8A16",
        ),
        (
            Recipe((Rule("W8A8", where="a"),), (Step("awq", where="b"), Step("osl", where="c"))),
            rf"a and b and c: {Q}: .* both decide the smoothing",
        ),
        (
            Recipe((Rule("W8A8", {}, ("histogram",), where="a"),), (Step("osl", where="b"),)),
            rf"a and b: {Q}: .*histogram looks at the input before osl smooths",
        ),
        (
            Recipe((Rule("W8A8", where="a"),), (Step("svd", where="b"),)),
            rf"a and b: {Q}: algorithm 'svd' does not work with scheme W8A8",
        ),
        (
            Recipe(
                (Rule("W4A4_MXFP4", {"rule": "mxfp4_msmodelslim_ceil_x"}, where="a"),),
                (Step("svd", where="b"),),
            ),
            rf"a and b: {Q}: scheme W4A4_MXFP4_SVD takes no rule",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_both_paths(recipe, words):
    with pytest.raises(MsQuantError, match=words):
        assign(recipe, LINEARS)


def test_idle_patterns_come_with_their_paths():
    recipe = Recipe(
        (Rule("W8A8", exclude=("*lm_head*", DOWN), where="a"),),
        (
            Step("osl", include=("*.w2", "*"), where="b"),
            Step("osl", include=(NORM, OUT), by_producer=True, where="c"),
        ),
    )
    producers = list(PRODUCERS.values())
    idle = [("b", "*.w2"), ("c", OUT)]
    assert idle_patterns(recipe, list(LINEARS), producers) == [("a", "*lm_head*"), *idle]
    assert idle_patterns(recipe, list(LINEARS), producers, ["lm_head"]) == idle


NORM = "model.layers.0.input_layernorm"
PRODUCERS = {
    Q: NORM,
    OUT: "model.layers.0.self_attn.v_proj",
    UP: "model.layers.0.post_attention_layernorm",
    DOWN: UP,
}


@pytest.mark.parametrize(
    ("include", "exclude", "reached"),
    [
        (("*",), (), [Q, OUT, UP, DOWN]),
        (("*self_attn*",), (), [OUT]),  # v_proj before o_proj, and no norm
        (("*input_layernorm*",), (), [Q]),
        (("*",), ("*post_attention_layernorm*",), [Q, OUT, DOWN]),
        (("*.mlp.up_proj",), (), [DOWN]),
        (("*.down_proj",), (), []),
    ],
)
def test_patterns_may_name_what_makes_an_input(include, exclude, reached):
    step = Step("smoothquant", include=include, exclude=exclude, by_producer=True)
    found = assign(Recipe((Rule("W8A8"),), (step,)), LINEARS, PRODUCERS)
    assert [path for path, made in found.items() if made.algorithms] == reached


def test_of_a_lenient_recipe_the_first_rule_holds():
    rules = (Rule("W8A8", include=("*.self_attn.*",)), Rule("W8A16", exclude=(DOWN,)))
    found = assign(Recipe(rules, lenient=True), LINEARS)
    assert {path: made.scheme for path, made in found.items()} == {
        Q: "W8A8",
        OUT: "W8A8",
        UP: "W8A16",
    }


def test_a_linear_that_a_step_leaves_takes_its_mates_along():
    key, mates = Q.replace("q_proj", "k_proj"), {Q: [Q], OUT: [OUT], UP: [UP], DOWN: [DOWN]}
    linears = {**LINEARS, key: "qkv"}
    mates[Q] = mates[key] = [Q, key]
    for together in (False, True):
        step = Step("smoothquant", exclude=(key, UP), together=together)
        found = assign(Recipe((Rule("W8A8_DYNAMIC"),), (step,)), linears, mates=mates)
        smoothed = {path for path, choice in found.items() if choice.algorithms}
        assert smoothed == {OUT, DOWN} | (set() if together else {Q})
