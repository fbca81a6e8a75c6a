"""What may be excluded: linears, and what is float anyway; the rest is an error with near names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.pipeline.run import QuantizeOptions, prepare
from ms_quant.recipe import load_recipe

FLOATS = [
    "lm_head",
    "*lm_head*",
    "lm_head.weight",
    "model.embed_tokens",
    "*embed*",
    "model.norm",
    "*norm*",
    "model.layers.0.input_layernorm",
    "*.q_norm",
    "*.post_attention_layernorm.weight",
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", FLOATS)
def test_what_is_float_anyway_is_a_note(
    pattern: str, tied: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(tied=tied)
    exclude = (pattern, "model.layers.1.mlp.down_proj")
    options = QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC", exclude=exclude)
    checked = prepare(options)
    assert checked.notes == (f"exclude {pattern!r}: it stays float anyway",)
    assert checked.plan.float_linears() == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("pattern", FLOATS)
def test_recipes_alike(pattern: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"apiversion: ms_quant_v1\nrules:\n  - exclude: ['{pattern}']\n    scheme: W8A8_DYNAMIC\n"
    )
    recipe = load_recipe(path)
    assert prepare(QuantizeOptions(tiny_model(), tmp_path / "out", recipe=recipe)).plan.quantized()
    path.write_text(
        "apiversion: ms_quant_v1\nrules:\n  - exclude: ['*down']\n    scheme: W8A8_DYNAMIC\n"
    )
    with pytest.raises(MsQuantError, match=r"matches no linear, expected something like '\*\*down"):
        prepare(QuantizeOptions(tiny_model("b"), tmp_path / "out", recipe=load_recipe(path)))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.0", "'model.layers.0.*'"),
        ("model.layers.0.mlp", "'model.layers.0.mlp.*'"),
        ("layers.1.*", "'model.layers.1.*'"),
        ("down_proj", "'*.down_proj'"),
        ("mlp.down_proj", "'*.mlp.down_proj'"),
        ("model.layers.0.mlp.down_proj.weight", "'model.layers.0.mlp.down_proj'"),
        ("*.dwn_proj", "'*.down_proj'"),
        ("lm_hed", "'lm_head'"),
        ("model.layers.7.*", "the last block is model.layers.1"),
        ("layers.2.mlp.down_proj", "the last block is model.layers.1"),
        ("model.layers.0.mlp.donw_proj", "'model.layers.0.mlp.down_proj'"),
        ("re:.*lm_head", "is a regular expression, expected a glob"),
        ("*visual*", "'model.layers.0.*' or '*.down_proj'"),
    ],
)
def test_near_names(
    pattern: str, near: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model()
    options = QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC", exclude=(pattern,))
    with pytest.raises(MsQuantError, match="exclude pattern") as found:
        prepare(options)
    assert near in str(found.value)
