"""What the blocks of each family are made of, against tables written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import toy_family
from hypothesis import given
from hypothesis import strategies as st
from routed_models import DEEPSEEK

from ms_quant.errors import MsQuantError
from ms_quant.models import families
from ms_quant.models.block_spec import BlockSpec, LinearSpec
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.models.edge import Edge
from ms_quant.models.families import FAMILIES
from ms_quant.models.ranks import check_tp, fused_rows, fused_shape, shard

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
DENSE = {  # out, in, divided by, in so many parts
    "self_attn.q_proj": (48, 24, "column", 6),
    "self_attn.k_proj": (16, 24, "column", 2),
    "self_attn.v_proj": (16, 24, "column", 2),
    "self_attn.o_proj": (24, 48, "row", 6),
    "mlp.gate_proj": (40, 24, "column", 40),
    "mlp.up_proj": (40, 24, "column", 40),
    "mlp.down_proj": (24, 40, "row", 40),
}
HALVES = "mlp.gate_proj", "mlp.up_proj"
QKV, OUT, MLP, DOWN = ("q", "k", "v"), ("o",), ("gate", "up"), ("down",)
BIASES: dict[str, dict[str, tuple[str, ...]]] = {  # config key to what gets a bias; "" is always
    "llama": {"attention_bias": (*QKV, *OUT), "mlp_bias": (*MLP, *DOWN)},
    "mistral": {},
    "qwen2": {"": QKV},
    "qwen3": {"attention_bias": (*QKV, *OUT)},
    "qwen2_5_vl": {"": QKV},
    "qwen3_vl": {"attention_bias": (*QKV, *OUT)},
    "smollm3": {"attention_bias": (*QKV, *OUT), "mlp_bias": (*MLP, *DOWN)},
    "seed_oss": {"attention_bias": QKV, "attention_out_bias": OUT, "mlp_bias": (*MLP, *DOWN)},
    "internlm3": {"qkv_bias": QKV, "bias": (*OUT, *MLP, *DOWN)},
}
EDGES = (
    Edge("input_layernorm", ("qkv",), norm=True),
    Edge("self_attn.v_proj", ("o",), repeats=3, size=8, averaged=True),
    Edge("post_attention_layernorm", ("gate_up",), norm=True),
    Edge("mlp.up_proj", ("down",)),
)


OTHERS = {"qwen2_moe", "qwen3_moe", "deepseek_v3", "kimi_k2", "kimi_k25", "glm4"}


def test_every_dense_family_is_here():
    assert FAMILIES.keys() - OTHERS == BIASES.keys()


def config_of(family: str, **more: Any) -> ModelConfig:
    return parse_config({**SHAPE, "model_type": family, **more})


def table(block: BlockSpec) -> dict[str, tuple[int, int, str, int]]:
    return {
        path: (*linear.shape, linear.division.parallel, linear.division.units)
        for path, linear in block.linears.items()
    }


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("family", sorted(BIASES))
def test_a_dense_block(family, on):
    keys = {key: on for key in BIASES[family] if key}
    block = config_of(family, **keys).block(0)
    assert table(block) == DENSE and tuple(block.edges) == EDGES
    biased = [name for key, names in BIASES[family].items() if on or not key for name in names]
    ends = tuple(f".{name}_proj" for name in biased) or ("none",)
    assert {p for p, s in block.linears.items() if s.bias} == {
        path for path in DENSE if path.endswith(ends)
    }
    norms = {"input_layernorm": 24, "post_attention_layernorm": 24}
    if family in ("qwen3", "qwen3_vl"):
        norms |= {"self_attn.q_norm": 8, "self_attn.k_norm": 8}
    assert {path: spec.size for path, spec in block.norms.items()} == norms
    assert {p for p, s in block.norms.items() if not s.reads_stream} == set(norms) - {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert [(g.name, g.kind, g.fused, g.parallel) for g in block.groups] == [
        ("qkv", "qkv", "self_attn.qkv_proj", "column"),
        ("o", "o", "self_attn.o_proj", "row"),
        ("gate_up", "gate_up", "mlp.gate_up_proj", "column"),
        ("down", "down", "mlp.down_proj", "row"),
    ]
    assert {group.kind for group in block.groups} <= set(FAMILIES[family].kinds)
    taps = {path: spec.tap for path, spec in block.cached.items()}
    assert taps == {"self_attn.k_proj": "k", "self_attn.v_proj": "v"} and block.rotary


def test_roles_in_a_dense_block():
    linears = config_of("qwen3").block(0).linears
    said = {
        path.rpartition(".")[2][:-5]: (s.reads_stream, s.writes_stream, s.heads_axis, s.scores)
        for path, s in linears.items()
    }
    assert said == {
        "q": (True, False, None, True),
        "k": (True, False, None, True),
        "v": (True, False, 0, False),
        "o": (False, True, -1, False),
        "gate": (True, False, None, False),
        "up": (True, False, None, False),
        "down": (False, True, None, False),
    }


def test_a_block_of_glm():
    block = config_of("glm4", attention_bias=False).block(0)
    expected = {path: row for path, row in DENSE.items() if path not in HALVES}
    expected["mlp.gate_up_proj"] = (80, 24, "column", 40)
    assert table(block) == expected and set(block.linears) == set(expected)
    assert tuple(block.edges) == (
        *EDGES[:3],
        Edge("mlp.gate_up_proj", ("down",), size=40, skipped=40),
    )
    assert [(g.name, g.members, g.fused) for g in block.groups[2:]] == [
        ("gate_up", ("mlp.gate_up_proj",), "mlp.gate_up_proj"),
        ("down", ("mlp.down_proj",), "mlp.down_proj"),
    ]
    assert {p: (s.reads_stream, s.writes_stream) for p, s in block.norms.items()} == {
        "input_layernorm": (True, False),
        "post_self_attn_layernorm": (False, True),
        "post_attention_layernorm": (True, False),
        "post_mlp_layernorm": (False, True),
    }
    assert not any(linear.writes_stream for linear in block.linears.values())
    assert next(iter(block.modules)) == "input_layernorm"


def test_a_layer_without_rotary_embedding():
    config = config_of("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0])
    assert [block.rotary for block in config.blocks] == [True, False]


def test_blocks_that_differ(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)
    dense, mixed = parse_config(toy_family.CONFIG).blocks
    assert list(dense.linears) == list(DENSE)
    experts = ["mlp.experts.0", "mlp.experts.1", "mlp.shared_experts"]
    expected = {path: spec for path, spec in table(dense).items() if "mlp" not in path}
    expected["mlp.gate"] = (2, 64, "replicated", 1)
    for path in experts:
        expected |= dict.fromkeys((f"{path}.gate_proj", f"{path}.up_proj"), (64, 64, "column", 64))
        expected[f"{path}.down_proj"] = (64, 64, "row", 64)
    assert table(mixed) == expected
    assert mixed.loose_tensors == {
        "input_layernorm.weight": (64,),
        "mlp.gate.weight": (2, 64),
        "post_attention_layernorm.weight": (64,),
    }
    edge = mixed.edge_of("mlp.gate")
    assert mixed.readers(edge) == [
        *(f"{path}.{name}_proj" for path in experts for name in ("gate", "up")),
        "mlp.gate",
    ]
    assert [group.routed for group in mixed.groups] == [False] * 2 + [True] * 4 + [False] * 2
    assert mixed.hidden == dense.hidden


def test_values_of_heads_along_an_edge():
    edge = config_of("qwen3").block(0).edge_of("self_attn.o_proj")
    columns = edge.columns(np.arange(16))
    assert list(columns) == [*range(8)] * 3 + [*range(8, 16)] * 3
    np.testing.assert_array_equal(edge.rows(columns), np.arange(16))


CONFIGS = st.builds(
    lambda kv, share, dim, hidden, inter, toy: {
        **(toy_family.CONFIG if toy else SHAPE),
        "model_type": "toy" if toy else "llama",
        "num_key_value_heads": kv,
        "num_attention_heads": kv * share,
        "head_dim": 2 * dim,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "vocab_size": 64,
    },
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 64),
    st.booleans(),
)


def covered(linear: LinearSpec, tp: int) -> np.ndarray:
    """How many ranks hold each weight."""
    count = np.zeros(linear.shape, int)
    for rank in range(tp):
        part = shard(linear, tp, rank)
        count[part.rows, part.columns] += 1
    return count


@given(CONFIGS)
def test_ranks_hold_every_weight_once_or_as_many_copies(raw):
    """Whatever number of ranks is not refused; copies are of whole key and value heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)
        config = parse_config(raw)
        for tp in range(1, 17):
            try:
                check_tp(config, tp)
            except MsQuantError:
                continue
            for block in config.blocks:
                for linear in block.linears.values():
                    copies = 1
                    if linear.division.parallel == "replicated":
                        copies = tp
                    elif linear.division.copied:
                        copies = max(1, tp // linear.division.units)
                    assert (covered(linear, tp) == copies).all()
                for group in block.groups:
                    rows = fused_rows(group, tp)
                    parts = [shard(linear, tp, 0).rows for linear in group.linears.values()]
                    sizes = [part.stop - part.start for part in parts]
                    assert [part.stop - part.start for part in rows.values()] == sizes
                    assert fused_shape(group, tp)[0] == sum(sizes)


def test_a_block_of_experts():
    """One record of a linear serves all experts, and everything reads one norm."""
    block = parse_config(DEEPSEEK).block(1)
    assert [group.name for group in block.groups[:5]] == [
        "qkv_a",
        "q_b",
        "o",
        "experts.0.gate_up",
        "experts.0.down",
    ]
    assert [group.name for group in block.groups[-2:]] == ["shared.gate_up", "shared.down"]
    assert len(block.groups) == 3 + 2 * 16 + 2
    assert block.linears["mlp.experts.0.up_proj"] is block.linears["mlp.experts.15.gate_proj"]
    edge = block.edge_of("mlp.gate")
    assert edge.floats == ("mlp.gate",) and len(edge.consumers) == 17
    floats = {path for path in block.linears if block.group_of(path) is None}
    assert floats == {"self_attn.kv_b_proj", "mlp.gate"}
    assert block.tensors["mlp.gate.e_score_correction_bias"] == (16,)
    assert block.norms["self_attn.kv_a_layernorm"].eps == 1e-6
    assert all(block.group(f"experts.{i}.down").routed for i in range(16))
    assert not block.group("shared.down").routed


def test_a_block_that_predicts_further_tokens_has_what_is_around_it():
    config = parse_config(DEEPSEEK)
    assert (config.num_layers, config.num_blocks) == (3, 4)
    further = config.block(3).tensors
    assert further["eh_proj.weight"] == (64, 128) and further["shared_head.norm.weight"] == (64,)
    assert further["embed_tokens.weight"] == further["shared_head.head.weight"] == (256, 64)
    assert config.block(2).tensors.keys() < further.keys()
    names = [name for name in config.parameter_shapes() if name.startswith("model.layers.3.")]
    assert len(names) == len(further)
