"""QuaRot against dense matrices, and the function it must preserve against a float64 decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from slow_decoder import SlowDecoder

from ms_quant.algorithms.quarot import QuaRot
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.numerics.rotation import hadamard, random_hadamard, random_signs

Tensors = dict[str, np.ndarray]
IDS = np.random.default_rng(1).integers(0, 50, 11)
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, biases": {"model_type": "llama", **BIASES},
    "llama, biases, tied": {"model_type": "llama", **BIASES, **TIED},
    "llama, heads alone": {"model_type": "llama", "num_key_value_heads": 4, "hidden_size": 12},
    "qwen2": {"model_type": "qwen2", "head_dim": 64, "num_key_value_heads": 1},
    "qwen2, tied": {"model_type": "qwen2", "head_dim": 2, "hidden_size": 16, **TIED},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "qwen3, biases, tied": {"model_type": "qwen3", "head_dim": 64, "attention_bias": True, **TIED},
}


def model(model_type: str, **changes: Any) -> ModelConfig:
    """Hidden size 12 * 8, four heads of 8 that share two of keys and values."""
    raw = {
        "model_type": model_type,
        "hidden_size": 96,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
        "rms_norm_eps": 1e-2,  # large enough to be seen
        **changes,
    }
    return parse_config(raw)


def random_tensors(config: ModelConfig) -> Tensors:
    """float64; gains far from 1 and of both signs."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in config.parameter_shapes().items():
        noise = rng.standard_normal(shape)
        tensors[name] = noise if len(shape) == 1 else noise / np.sqrt(shape[1])
    return tensors


def rotated(config: ModelConfig, tensors: Tensors, seed: int = 0) -> tuple[ModelConfig, Tensors]:
    quarot = QuaRot(config, seed)
    names = quarot.config.parameter_shapes()
    return quarot.config, {name: quarot.tensor(name, tensors.__getitem__) for name in names}


def logits(config: ModelConfig, tensors: Tensors) -> np.ndarray:
    return SlowDecoder(config, tensors).logits(IDS)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_function_is_preserved(options: dict[str, Any]) -> None:
    config = model(**options)
    tensors = random_tensors(config)
    expected = logits(config, tensors)
    for seed in (0, 7):
        assert difference(logits(*rotated(config, tensors, seed)), expected) < 1e-11


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_tensor_that_changes_has_to(options: dict[str, Any]) -> None:
    """One tensor as it was among rotated ones is another function: the test above sees it."""
    config = model(**options)
    tensors = random_tensors(config)
    expected = logits(config, tensors)
    new_config, new = rotated(config, tensors)
    for name in new:
        old = tensors.get(name)
        if old is not None and not np.array_equal(old, new[name]):
            assert difference(logits(new_config, {**new, name: old}), expected) > 1e-6, name


def test_tensors_by_dense_matrices() -> None:
    """W @ R, R^T @ W and one H a head; an order of Paley's, whose matrix is not symmetric."""
    config = model(**MODELS["qwen3"], attention_bias=True, tie_word_embeddings=True)
    tensors = random_tensors(config)
    _, found = rotated(config, tensors, seed=3)
    R, H = random_hadamard(96, 3), hadamard(20)
    assert np.abs(H - H.T).max() > 0.1
    per_kv_head, per_head = np.kron(np.eye(2), H), np.kron(np.eye(4), H)
    ones = np.ones(96)
    table = tensors["model.embed_tokens.weight"]
    expected = {
        "model.embed_tokens.weight": table @ R,
        "lm_head.weight": table @ np.diag(tensors["model.norm.weight"]) @ R,
        "model.norm.weight": ones,
    }
    for index in range(2):
        old = {
            name: tensors[f"model.layers.{index}.{name}"] for name in config.block(index).tensors
        }
        first = np.diag(old["input_layernorm.weight"]) @ R
        second = np.diag(old["post_attention_layernorm.weight"]) @ R
        new = {
            **old,
            "input_layernorm.weight": ones,
            "post_attention_layernorm.weight": ones,
            "self_attn.q_proj.weight": old["self_attn.q_proj.weight"] @ first,
            "self_attn.k_proj.weight": old["self_attn.k_proj.weight"] @ first,
            "self_attn.v_proj.weight": per_kv_head.T @ old["self_attn.v_proj.weight"] @ first,
            "self_attn.v_proj.bias": old["self_attn.v_proj.bias"] @ per_kv_head,
            "self_attn.o_proj.weight": R.T @ old["self_attn.o_proj.weight"] @ per_head,
            "self_attn.o_proj.bias": old["self_attn.o_proj.bias"] @ R,
            "mlp.gate_proj.weight": old["mlp.gate_proj.weight"] @ second,
            "mlp.up_proj.weight": old["mlp.up_proj.weight"] @ second,
            "mlp.down_proj.weight": R.T @ old["mlp.down_proj.weight"],
        }
        expected |= {f"model.layers.{index}.{name}": array for name, array in new.items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], array, atol=1e-13, rtol=0, err_msg=name)


def test_inputs_are_left_alone_and_the_seed_decides() -> None:
    config = model(**MODELS["llama, biases, tied"])
    tensors = random_tensors(config)
    kept = {name: array.copy() for name, array in tensors.items()}
    first, again, other = (rotated(config, tensors, seed)[1] for seed in (1, 1, 2))
    for name, array in kept.items():
        np.testing.assert_array_equal(tensors[name], array)
        np.testing.assert_array_equal(first[name], again[name])
    table = "model.embed_tokens.weight"
    assert (first[table] != other[table]).any()


def test_tied_embeddings_become_untied() -> None:
    tied, free = model("llama", **TIED), model("llama")
    config = QuaRot(tied, 0).config
    assert not config.tied and config.raw["tie_word_embeddings"] is False
    assert tied.raw["tie_word_embeddings"] is True
    assert parse_config(config.raw) == config == free
    assert QuaRot(free, 0).config is free


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 52},
            "^config.json: hidden_size: no Hadamard matrix of order 52, expected",
        ),
        ({"head_dim": 6}, "^config.json: head_dim: no Hadamard matrix of order 6, expected"),
    ],
)
def test_sizes_without_a_hadamard_matrix_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        QuaRot(model("llama", **changes), 0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(MsQuantError, match=r"^seed is -1, expected at least 0$"):
        QuaRot(model("llama"), -1)


@pytest.mark.parametrize("block", [1, 2, 8])
def test_blocks_are_rotated_by_dense_block_diagonal_matrices(block: int) -> None:
    config = model(**MODELS["llama, biases, tied"])
    tensors, prefix = random_tensors(config), "model.layers.1."
    quarot = QuaRot(config, 3, block_size=block)
    stream = np.diag(random_signs(96, 3)) @ np.kron(np.eye(96 // block), hadamard(block))
    heads = np.kron(np.eye(16 // block), hadamard(block))  # two of keys and values, 8 each
    gain = tensors[f"{prefix}input_layernorm.weight"]
    value = tensors[f"{prefix}self_attn.v_proj.weight"]
    expected = {
        "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] @ stream,
        f"{prefix}self_attn.v_proj.weight": heads.T @ (value * gain @ stream),
        f"{prefix}self_attn.v_proj.bias": tensors[f"{prefix}self_attn.v_proj.bias"] @ heads,
        f"{prefix}mlp.down_proj.weight": stream.T @ tensors[f"{prefix}mlp.down_proj.weight"],
    }
    for name, dense in expected.items():
        found = quarot.tensor(name, tensors.__getitem__)
        np.testing.assert_allclose(found, dense, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_is_rotated_in_blocks_has_the_same_logits(name: str) -> None:
    config = model(**MODELS[name])
    tensors, quarot = random_tensors(config), QuaRot(config, 0, block_size=2)
    names = quarot.config.parameter_shapes()
    turned = {name: quarot.tensor(name, tensors.__getitem__) for name in names}
    np.testing.assert_allclose(
        logits(quarot.config, turned), logits(config, tensors), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "block", "message"),
    [
        ({}, 16, "^config.json: head_dim is 8, expected a multiple of quarot.block_size 16"),
        ({}, 64, "^config.json: hidden_size is 96, expected a multiple of quarot.block_size 64"),
        ({"hidden_size": 48, "head_dim": 6}, 3, "^quarot.block_size: no Hadamard matrix of ord"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(changes: dict, block: int, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        QuaRot(model("llama", **changes), 0, block_size=block)
