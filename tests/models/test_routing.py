"""Which experts a token goes to, against a slow oracle; what configs may say of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routed_models import DEEPSEEK, QWEN

from ms_quant.errors import MsQuantError
from ms_quant.models.config import parse_config, written_config
from ms_quant.models.routing import Routing


def slow_route(
    routing: Routing, products: np.ndarray, bias: np.ndarray | None
) -> list[dict[int, float]]:
    """Expert to weight of each token, one token and one expert after the other."""
    found = []
    for row in products.astype(np.float64):
        if routing.scoring == "softmax":
            scores = np.exp(row - row.max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-row))
        wanted = scores if bias is None else scores + bias
        each = routing.experts // routing.groups
        groups = [range(g * each, (g + 1) * each) for g in range(routing.groups)]
        if routing.groups > 1:
            worth = [sum(sorted(wanted[e] for e in group)[-2:]) for group in groups]
            best = sorted(range(routing.groups), key=lambda g: -worth[g])
            groups = [groups[g] for g in best[: routing.groups_per_token]]
        able = [e for group in groups for e in group]
        chosen = sorted(able, key=lambda e: -wanted[e])[: routing.per_token]
        total = sum(scores[e] for e in chosen) if routing.normalized else 1
        found.append({e: scores[e] / total * routing.scale for e in chosen})
    return found


@given(
    groups=st.sampled_from([1, 2, 4]),
    kept=st.integers(1, 4),
    per_token=st.integers(1, 4),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalized=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    tokens=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_tokens_go_where_the_oracle_sends_them(
    groups, kept, per_token, scoring, normalized, scale, tokens, seed
):
    rng = np.random.default_rng(seed)
    kept = min(kept, groups)
    per_token = min(per_token, 16 // groups * kept)
    routing = Routing(16, per_token, 8, "x", scoring, normalized, scale, groups, kept)
    products = rng.normal(0, 2, (tokens, 16)).astype(np.float32)
    bias = rng.normal(0, 0.3, 16).astype(np.float32) if scoring == "sigmoid" else None
    chosen, weights = routing.route(products, bias)
    assert chosen.shape == weights.shape == (tokens, per_token)
    assert weights.dtype == np.float32
    for experts, shares, expected in zip(
        chosen, weights, slow_route(routing, products, bias), strict=True
    ):
        assert list(experts) == sorted(expected)
        np.testing.assert_allclose(shares, [expected[e] for e in experts], rtol=1e-5)


def test_a_group_of_experts_that_is_left_out_stays_out_where_all_biases_are_negative():
    """Zero, which older runtimes fill in there, would be more than any that is kept."""
    routing = Routing(4, 2, 8, "x", "sigmoid", False, groups=2, groups_per_token=1)
    products = np.array([[3.0, 3.0, 0.0, 0.0]], np.float32)
    chosen, _ = routing.route(products, np.full(4, -2, np.float32))
    assert chosen.tolist() == [[0, 1]]


def test_equal_experts_are_taken_by_their_number():
    routing = Routing(6, 3, 8, "x", "softmax", True)
    chosen, weights = routing.route(np.zeros((2, 6), np.float32), None)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(weights, 1 / 3)


def test_the_blocks_with_experts():
    assert parse_config(
        {**QWEN, "mlp_only_layers": [2], "intermediate_size": 48}
    ).routing.sparse == {0, 1, 3}
    steps = parse_config({**QWEN, "decoder_sparse_step": 2, "intermediate_size": 48})
    assert steps.routing.sparse == {1, 3}
    deepseek = parse_config({**DEEPSEEK, "num_hidden_layers": 6, "moe_layer_freq": 2})
    assert deepseek.routing.sparse == {2, 4, 6}, "6 predicts further tokens"


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (QWEN, {"num_experts": None}, "'num_experts' is missing"),
        (QWEN, {"num_local_experts": 4}, "differ, expected one number of experts"),
        (QWEN, {"num_experts": 1 << 20}, "num_experts is 1048576, expected at most 4096"),
        (QWEN, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most 8"),
        (QWEN, {"mlp_only_layers": [4]}, "mlp_only_layers is [4], expected numbers of the 4"),
        (QWEN, {"mlp_only_layers": [2]}, ""),
        (QWEN, {"decoder_sparse_step": 2}, "'intermediate_size' is missing"),
        (QWEN, {"n_shared_experts": 1}, "n_shared_experts is 1, expected no such key"),
        (DEEPSEEK, {"scoring_func": "sqrtsoftplus"}, "scoring_func 'sqrtsoftplus' is not"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        (DEEPSEEK, {"n_group": 3}, "n_group is 3, expected a divisor of the 16 experts"),
        (DEEPSEEK, {"n_group": 16}, "n_group is 16, expected groups of two or more"),
        (DEEPSEEK, {"topk_group": 5}, "topk_group is 5, expected at most n_group 4"),
        (DEEPSEEK, {"num_experts_per_tok": 9}, "expected at most 8, the experts of 2 groups"),
        (DEEPSEEK, {"routed_scaling_factor": "big"}, "routed_scaling_factor is 'big', expected"),
        (DEEPSEEK, {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        (DEEPSEEK, {"kv_lora_rank": None}, "the key 'kv_lora_rank' is missing"),
        (DEEPSEEK, {"kv_lora_rank": -1}, "kv_lora_rank is -1, expected a positive integer"),
        (DEEPSEEK, {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        (DEEPSEEK, {"num_key_value_heads": 2}, "num_key_value_heads is 2, expected 4 as"),
        (DEEPSEEK, {"first_k_dense_replace": 4}, "first_k_dense_replace is 4, expected 0 to 3"),
        (DEEPSEEK, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    ],
    ids=str,
)
def test_what_a_config_may_say(raw, changes, message):
    changed = {key: value for key, value in {**raw, **changes}.items() if value is not None}
    if not message:
        changed["intermediate_size"] = 48
        assert parse_config(changed).intermediate_size == 48
        return
    with pytest.raises(MsQuantError, match=re.escape(message)):
        parse_config(changed)


def test_old_and_new_runtimes_find_the_number_of_experts():
    written = written_config(parse_config(QWEN))
    assert written["num_experts"] == written["num_local_experts"] == 8
    assert parse_config(json.loads(json.dumps(written))) == parse_config(QWEN)


def test_a_config_says_how_many_further_layers_were_written():
    config = replace(parse_config(DEEPSEEK), further_layers=0)
    assert written_config(config)["num_nextn_predict_layers"] == 0


def test_queries_may_come_from_one_linear():
    found = parse_config({**DEEPSEEK, "q_lora_rank": None}).block(1)
    assert [group.name for group in found.groups[:3]] == ["q", "kv_a", "o"]
    assert found.edge_of("self_attn.q_proj").consumers == ("q", "kv_a")


def test_the_scale_of_scores_is_that_of_the_published_model():
    rope = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    config = parse_config({**DEEPSEEK, **sizes, "rope_scaling": rope})
    assert config.latent.scale(config.rope) == pytest.approx(0.135234, abs=1e-6)
    assert parse_config(DEEPSEEK).latent.scale({"rope_type": "default"}) == pytest.approx(24**-0.5)
