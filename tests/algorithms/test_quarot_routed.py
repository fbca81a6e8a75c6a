"""QuaRot of models with experts and latent attention: the function it must preserve against a
float64 decoder, and where experts choose, the choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed_models import DEEPSEEK, QWEN, routed_tensors, save_routed
from slow_routed import SlowRouted

from ms_quant.algorithms.quarot import QuaRot
from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.models.config import load_config, parse_config
from ms_quant.numerics.rotation import hadamard, random_hadamard
from ms_quant.quantization import rotated
from ms_quant.quantization.rotated import RotatedCheckpoint

Tensors = dict[str, np.ndarray]
IDS = np.random.default_rng(1).integers(0, 50, 9)
SMALL = {"vocab_size": 50, "num_hidden_layers": 2}
QWEN2 = {
    **QWEN,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek": {**DEEPSEEK, **SMALL},
    "deepseek, biases": {**DEEPSEEK, **SMALL, "attention_bias": True},
    "deepseek, one projection of queries": {**DEEPSEEK, **SMALL, "q_lora_rank": None},
    "deepseek, orders of Paley": {**DEEPSEEK, **SMALL, "q_lora_rank": 20, "v_head_dim": 12},
    "qwen3": {**QWEN, **SMALL},
    "qwen2, a gate beside the experts": {**QWEN2, **SMALL},
}


def turned(raw: dict[str, Any], seed: int = 0, block: int = 0) -> tuple[SlowRouted, SlowRouted]:
    """A model, and what it becomes."""
    config, tensors = parse_config(dict(raw)), doubled(raw)
    quarot = QuaRot(config, seed, block_size=block)
    names = quarot.config.parameter_shapes()
    after = {name: quarot.tensor(name, tensors.__getitem__) for name in names}
    return SlowRouted(config, tensors), SlowRouted(quarot.config, after)


def doubled(raw: dict[str, Any]) -> Tensors:
    return {name: tensor.astype(np.float64) for name, tensor in routed_tensors(raw).items()}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("block", [0, 4])
def test_the_function_and_the_routing_are_preserved(raw: dict[str, Any], block: int) -> None:
    before, after = turned(raw, seed=7, block=block)
    assert difference(after.logits(IDS), before.logits(IDS)) < 1e-11
    assert before.routes
    for index, chosen in before.routes.items():
        np.testing.assert_array_equal(after.routes[index], chosen)


def test_every_tensor_that_changes_has_to() -> None:
    """One tensor as it was among rotated ones is another function: the test above sees it."""
    before, after = turned(MODELS["deepseek"])
    expected, used = before.logits(IDS), {f"experts.{e}." for e in np.unique(before.routes[1])}
    for name, old in before.tensors.items():
        unused = ".experts." in name and not any(part in name for part in used)
        changed = not np.array_equal(old, after.tensors[name])
        if not changed or unused or name.startswith("model.layers.2."):
            continue
        mixed = SlowRouted(after.config, {**after.tensors, name: old})
        assert difference(mixed.logits(IDS), expected) > 1e-6, name


def test_what_experts_are_chosen_by_beside_scores_stays_bit_for_bit() -> None:
    before, after = turned(MODELS["deepseek"])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(before.tensors[name], after.tensors[name])
    assert (before.tensors[name] != 0).all()


@pytest.mark.parametrize("block", [0, 4])
def test_the_next_but_one_token_is_predicted_as_before(block: int) -> None:
    """Exactly where the last norm's gain changes each token's length alike."""
    raw = {**MODELS["deepseek"], "rms_norm_eps": 1e-13}  # it is added twice
    gain = np.random.default_rng(0).choice([-0.7, 0.7], 64)
    tensors = {**doubled(raw), "model.norm.weight": gain}
    config = parse_config(raw)
    quarot = QuaRot(config, 3, block_size=block)
    names = quarot.config.parameter_shapes()
    after = {name: quarot.tensor(name, tensors.__getitem__) for name in names}
    expected = SlowRouted(config, tensors).further(IDS)
    assert difference(SlowRouted(quarot.config, after).further(IDS), expected) < 1e-10


def test_tensors_by_dense_matrices() -> None:
    raw = MODELS["deepseek"]
    before, after = turned(raw, seed=3)
    R, low, latent, values = (
        random_hadamard(64, 3),
        hadamard(32),
        hadamard(32),
        np.kron(np.eye(4), hadamard(16)),
    )
    prefix, old, new = "model.layers.1.", before.tensors, after.tensors

    def weight(name: str) -> np.ndarray:
        return old[f"{prefix}{name}.weight"]

    first = np.diag(weight("input_layernorm")) @ R
    second = np.diag(weight("post_attention_layernorm")) @ R
    kv_a = weight("self_attn.kv_a_proj_with_mqa") @ first
    kv_a[:32] = latent.T @ kv_a[:32]
    heads = weight("self_attn.kv_b_proj").reshape(4, 32, 32)
    heads = heads * weight("self_attn.kv_a_layernorm") @ latent
    heads[:, 16:] = hadamard(16).T @ heads[:, 16:]
    q_b = weight("self_attn.q_b_proj") * weight("self_attn.q_a_layernorm")
    expected = {
        "self_attn.q_a_proj": low.T @ weight("self_attn.q_a_proj") @ first,
        "self_attn.q_a_layernorm": np.ones(32),
        "self_attn.q_b_proj": q_b @ low,
        "self_attn.kv_a_proj_with_mqa": kv_a,
        "self_attn.kv_a_layernorm": np.ones(32),
        "self_attn.kv_b_proj": heads.reshape(128, 32),
        "self_attn.o_proj": R.T @ weight("self_attn.o_proj") @ values,
        "mlp.gate": weight("mlp.gate") @ second,
        "mlp.experts.5.up_proj": weight("mlp.experts.5.up_proj") @ second,
        "mlp.experts.5.down_proj": R.T @ weight("mlp.experts.5.down_proj"),
        "mlp.shared_experts.gate_proj": weight("mlp.shared_experts.gate_proj") @ second,
    }
    for name, dense in expected.items():
        found = new[f"{prefix}{name}.weight"]
        np.testing.assert_allclose(found, dense, rtol=0, atol=1e-13, err_msg=name)
    prefix, final = "model.layers.2.", old["model.norm.weight"]
    states = weight("hnorm") * final / np.sqrt(np.mean(final**2))
    joined = np.concatenate([weight("enorm"), states])
    both = np.kron(np.eye(2), R)
    dense = R.T @ (weight("eh_proj") * joined) @ both
    np.testing.assert_allclose(new[f"{prefix}eh_proj.weight"], dense, rtol=0, atol=1e-13)
    dense = (weight("shared_head.head") * weight("shared_head.norm")) @ R
    np.testing.assert_allclose(new[f"{prefix}shared_head.head.weight"], dense, rtol=0, atol=1e-13)
    table = new[f"{prefix}embed_tokens.weight"]
    np.testing.assert_allclose(table, weight("embed_tokens") @ R, rtol=0, atol=1e-13)


@pytest.mark.parametrize("block", [1, 300, rotated.BLOCK_ELEMENTS])
def test_a_checkpoint_is_rotated_in_pieces(
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load_tensors: Callable[[Path], Tensors],
) -> None:
    directory = save_routed(tmp_path / "model", MODELS["deepseek"])
    stored = {name: array.astype(np.float64) for name, array in load_tensors(directory).items()}
    config = load_config(directory)
    monkeypatch.setattr(rotated, "BLOCK_ELEMENTS", block)
    found, quarot = RotatedCheckpoint(Checkpoint(directory), config, 5), QuaRot(config, 5)
    for name in found.names:
        if ".experts." in name and ".experts.3." not in name:
            continue
        expected = quarot.tensor(name, stored.__getitem__).astype(np.float32)
        np.testing.assert_array_equal(found.read_float32(name), expected, err_msg=name)
        pieces = np.concatenate([part for _, part in found.float32_chunks(name, 100)])
        np.testing.assert_array_equal(pieces, expected, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": 26}, "^config.json: q_lora_rank: no Hadamard matrix of order 26"),
        ({"kv_lora_rank": 18}, "^config.json: kv_lora_rank: no Hadamard matrix of order 18"),
        ({"v_head_dim": 14}, "^config.json: v_head_dim: no Hadamard matrix of order 14"),
    ],
)
def test_sizes_without_a_hadamard_matrix_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        QuaRot(parse_config({**DEEPSEEK, **changes}), 0)
