"""Paths of linears and groups: made and parsed in one place, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_quant.models.config import parse_config
from ms_quant.models.names import (
    GroupId,
    LinearId,
    block_name,
    block_prefix,
    in_block,
    linear_id,
    parse_linear,
    short_name,
)

PATHS = [
    ("model.layers.0.self_attn.q_proj", LinearId(0, "self_attn.q_proj")),
    ("model.layers.61.mlp.down_proj", LinearId(61, "mlp.down_proj")),
    ("model.layers.3.mlp.gate", LinearId(3, "mlp.gate")),
    ("model.layers.3.mlp.experts.0.up_proj", LinearId(3, "mlp.experts.up_proj", 0)),
    ("model.layers.3.mlp.experts.255.up_proj", LinearId(3, "mlp.experts.up_proj", 255)),
    # no expert's own linear
    ("model.layers.3.mlp.shared_experts.up_proj", LinearId(3, "mlp.shared_experts.up_proj")),
    ("model.layers.3.mlp.experts.7.mlp.w1", LinearId(3, "mlp.experts.7.mlp.w1")),
    ("model.layers.3.mlp.experts.7", LinearId(3, "mlp.experts.7")),
    ("model.layers.3.mlp.experts.007.up_proj", LinearId(3, "mlp.experts.007.up_proj")),
    ("model.layers.3.branches.7.up_proj", LinearId(3, "branches.7.up_proj")),
]


@pytest.mark.parametrize(("path", "found"), PATHS)
def test_paths_are_parsed(path: str, found: LinearId) -> None:
    assert parse_linear(path) == found
    inner = path.split(".", 3)[3]
    assert in_block(path) == (found.block, inner)
    assert linear_id(found.block, inner) == found
    assert found.expert is not None or found.inner == found.member == inner


@pytest.mark.parametrize("path", [path for path, _ in PATHS])
def test_paths_come_back(path: str) -> None:
    assert str(parse_linear(path)) == path
    assert block_prefix(parse_linear(path).block) + parse_linear(path).inner == path


_NAMES = st.from_regex(r"[a-z_][a-z_0-9]*", fullmatch=True).filter(lambda name: name != "experts")


@given(
    block=st.integers(0, 999_999_999),
    module=st.lists(_NAMES, max_size=3),
    name=_NAMES,
    expert=st.none() | st.integers(0, 999_999_999),
)
def test_every_linear_comes_back(
    block: int, module: list[str], name: str, expert: int | None
) -> None:
    modules = module if expert is None else [*module, "moe", "experts"]
    linear = LinearId(block, ".".join([*modules, name]), expert)
    assert parse_linear(str(linear)) == linear
    assert str(linear).startswith(block_prefix(block))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "lm_head",
        "model.norm.weight",
        "model.layers",
        "model.layers.",
        "model.layers.0",
        "model.layers.0.",
        "model.layers.00.mlp.up_proj",
        "model.layers.01.mlp.up_proj",
        "model.layers.-1.mlp.up_proj",
        "model.layers.+1.mlp.up_proj",
        "model.layers. 1.mlp.up_proj",
        "model.layers.1_0.mlp.up_proj",
        "model.layers.²3.mlp.up_proj",
        "model.layers.٣.mlp.up_proj",
        "model.layers.1000000000.mlp.up_proj",
        "model.layers.x.mlp.up_proj",
        "xmodel.layers.0.mlp.up_proj",
        "model_layers.0.mlp.up_proj",
        "language_model.model.layers.0.mlp.up_proj",
    ],
)
def test_what_is_in_no_block(path: str) -> None:
    assert in_block(path) is None
    with pytest.raises(ValueError, match="is in no block"):
        parse_linear(path)


def test_strange_names_in_a_block_are_kept() -> None:
    """Nothing of a checkpoint's names is lost, whatever they hold."""
    for inner in (".", "a\nb", "model.layers.1.mlp", "\u2028.w", " "):
        assert in_block(block_prefix(2) + inner) == (2, inner)
        assert str(linear_id(2, inner)) == block_prefix(2) + inner


def test_groups_and_blocks() -> None:
    assert str(GroupId(0, "qkv")) == "model.layers.0.qkv"
    assert (block_name(12), block_prefix(12)) == ("model.layers.12", "model.layers.12.")
    assert short_name("model.layers.3.mlp.up_proj") == "3.mlp.up_proj"
    assert short_name("lm_head") == "lm_head"
    assert len({LinearId(1, "a.b"), LinearId(1, "a.b", None), LinearId(1, "a.b", 0)}) == 2


def test_every_linear_of_a_model_has_such_a_name() -> None:
    config = parse_config(
        {
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 11,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
        }
    )
    names = set(config.parameter_shapes())
    for block in config.blocks:
        for member in block.linears:
            linear = LinearId(block.index, member)
            assert f"{linear}.weight" in names and parse_linear(str(linear)) == linear
