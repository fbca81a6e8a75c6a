"""What the project promises about the mixtures of experts in its tree: their files and cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.drafts import drafts
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.opening import open_model

MODELS = Path(__file__).resolve().parent.parent / "models"
DEEPSEEK, QWEN3 = MODELS / "stdlib-deepseek", MODELS / "stdlib-qwen3-moe"
BOTH = pytest.mark.parametrize("model", [DEEPSEEK, QWEN3], ids=lambda path: path.name)


def config(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text())


def card(model: Path) -> dict[str, Any]:
    return json.loads((model / "training.json").read_text())


def stored(model: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor."""
    with safe_open(model / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def mlp(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def moe(prefix: str, c: dict[str, Any], experts: int) -> dict[str, tuple[int, ...]]:
    hidden, width = c["hidden_size"], c["moe_intermediate_size"]
    shapes = {f"{prefix}.gate.weight": (experts, hidden)}
    for i in range(experts):
        shapes |= mlp(f"{prefix}.experts.{i}", hidden, width)
    return shapes


def latent_attention(prefix: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    plain, value = c["qk_nope_head_dim"], c["v_head_dim"]
    q_rank, rank = c["q_lora_rank"], c["kv_lora_rank"]
    shapes = {
        "q_a_proj": (q_rank, hidden),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (plain + rope), q_rank),
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (plain + value), rank),
        "o_proj": (hidden, heads * value),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def attention(prefix: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, size = c["hidden_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    shapes = {
        "q_proj": (heads, hidden),
        "k_proj": (kv_heads, hidden),
        "v_proj": (kv_heads, hidden),
        "o_proj": (hidden, heads),
        "q_norm": (size,),
        "k_norm": (size,),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def outside(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    table = c["vocab_size"], c["hidden_size"]
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": table[1:],
    }


def norms(prefix: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    names = "input_layernorm", "post_attention_layernorm"
    return {f"{prefix}.{name}.weight": (c["hidden_size"],) for name in names}


def published_deepseek(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, layers, experts = c["hidden_size"], c["num_hidden_layers"], c["n_routed_experts"]
    shapes = outside(c)
    for i in range(layers + c["num_nextn_predict_layers"]):
        prefix = f"model.layers.{i}"
        shapes |= norms(prefix, c) | latent_attention(f"{prefix}.self_attn", c)
        if i < c["first_k_dense_replace"]:
            shapes |= mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
            continue
        shapes |= moe(f"{prefix}.mlp", c, experts)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (experts,)
        width = c["moe_intermediate_size"] * c["n_shared_experts"]
        shapes |= mlp(f"{prefix}.mlp.shared_experts", hidden, width)
    mtp = f"model.layers.{layers}"
    for name in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"{mtp}.{name}.weight"] = (hidden,)
    shapes[f"{mtp}.eh_proj.weight"] = (hidden, 2 * hidden)
    for name in ("embed_tokens", "shared_head.head"):
        shapes[f"{mtp}.{name}.weight"] = (c["vocab_size"], hidden)
    return shapes


def published_qwen3(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = outside(c)
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        shapes |= norms(prefix, c) | attention(f"{prefix}.self_attn", c)
        shapes |= moe(f"{prefix}.mlp", c, c["num_experts"])
    return shapes


@pytest.mark.parametrize(
    ("model", "published"), [(DEEPSEEK, published_deepseek), (QWEN3, published_qwen3)]
)
def test_names_shapes_and_types_are_those_of_published_checkpoints(model, published):
    found = stored(model)
    assert {name: shape for name, (_, shape) in found.items()} == published(config(model))
    for name, (dtype, _) in found.items():
        assert dtype == ("F32" if name.endswith("e_score_correction_bias") else "BF16"), name


@BOTH
def test_a_model_is_small_and_has_the_tokenizer_of_the_text(model):
    assert (model / "model.safetensors").stat().st_size <= 8_000_000
    tokenizer = (MODELS / "stdlib-qwen3-6m" / "tokenizer.json").read_bytes()
    assert (model / "tokenizer.json").read_bytes() == tokenizer


@BOTH
def test_a_model_learned_and_every_expert_of_it_works(model):
    figures = card(model)
    assert figures["heldout_perplexity"] < 0.6 * figures["trigram_perplexity"]
    assert figures["loss_positions_128_255"] < figures["loss_positions_0_31"]
    for counts in figures["tokens_per_expert"].values():
        assert sum(counts) == 4 * figures["heldout_tokens"]
        assert min(counts) > 0.3 * np.mean(counts)


def test_the_mtp_layer_shares_its_tables_and_its_drafts_are_worth_it():
    import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)

    with safe_open(DEEPSEEK / "model.safetensors", "numpy") as file:
        mtp = f"model.layers.{config(DEEPSEEK)['num_hidden_layers']}"
        for main, copy in (
            ("model.embed_tokens", "embed_tokens"),
            ("lm_head", "shared_head.head"),
        ):
            first, second = (
                file.get_tensor(f"{n}.weight").view(np.uint16) for n in (main, f"{mtp}.{copy}")
            )
            np.testing.assert_array_equal(first, second)
        biases = [
            file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.endswith("e_score_correction_bias")
        ]
    assert len(biases) == 4
    assert all(bias.min() == 0 and bias.max() > 0 for bias in biases)
    assert card(DEEPSEEK)["draft_acceptance"] > 0.4


@pytest.mark.parametrize(("model", "expected"), [(DEEPSEEK, 23.551059), (QWEN3, 20.652914)])
def test_the_perplexity_is_what_the_model_has_where_it_was_trained(model, expected):
    """Of 32 windows, in PyTorch."""
    tokens = eval_windows(MODELS / "text" / "heldout.txt", model, 256)[:32]
    assert perplexity(open_model(model), tokens).perplexity == pytest.approx(expected, rel=1e-5)


def test_the_drafts_are_what_they_are_where_the_model_was_trained():
    tokens = eval_windows(MODELS / "text" / "heldout.txt", DEEPSEEK, 256)[:32]
    found = drafts(open_model(DEEPSEEK), tokens)
    assert found.acceptance == pytest.approx(0.614951, abs=0.001)
    assert found.loss == pytest.approx(3.084450, rel=1e-5)
