"""Config keys that change what a model computes: neutral ones pass, others are refused by name."""

from __future__ import annotations

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, parse_config, written_config
from ms_quant.models.config_keys import HARMLESS, NEUTRAL, USED
from ms_quant.models.families import FAMILIES

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


def parse(model_type: str = "llama", **changes: object) -> ModelConfig:
    rotated = {"no_rope_layers": [1, 1]} if model_type == "smollm3" else {}
    window = {"sliding_window": None} if model_type == "mistral" else {}
    return parse_config(
        {"model_type": model_type, **BASE, **rotated, **window, **changes}, "c.json"
    )


def refusal(model_type: str = "llama", **changes: object) -> str:
    with pytest.raises(MsQuantError) as caught:
        parse(model_type, **changes)
    assert str(caught.value).startswith("c.json: ")
    return str(caught.value)


DENSE = sorted(name for name, family in FAMILIES.items() if family.routing is None)


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize(
    ("key", "value"), [("num_experts", 8), ("num_local_experts", 8), ("no_rope_layers", [1])]
)
def test_what_would_change_the_numbers_of_a_dense_family(
    model_type: str, key: str, value: object
) -> None:
    test_what_would_change_the_numbers(model_type, key, value)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078125),
        ("rope_interleaved", True),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("hidden_act", "gelu"),
        ("mlp_activation", "relu2"),
        ("clip_qkv", 8),
        ("is_encoder_decoder", True),
        ("audio_config", {"depth": 2}),
        ("lm_head_bias", True),
        ("kv_channels", 32),
    ],
)
def test_what_would_change_the_numbers(model_type: str, key: str, value: object) -> None:
    assert key in refusal(model_type, **{key: value})


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_only_a_text_model_in_a_larger_one_has_what_sees(model_type: str) -> None:
    if not FAMILIES[model_type].nested:
        test_what_would_change_the_numbers(model_type, "vision_config", {"depth": 2})


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_neutral_values_pass(key: str) -> None:
    for value in (None, *NEUTRAL[key]):
        assert parse(**{key: value}).unknown == ()
    assert key in refusal(**{key: "another"})


def test_true_is_not_the_number_one() -> None:
    assert "logit_scale is True" in refusal(logit_scale=True)
    assert "is_causal is 0" in refusal(is_causal=0)


@pytest.mark.parametrize(
    ("model_type", "key", "right"),
    [
        ("llama", "attention_bias", True),
        ("llama", "qkv_bias", False),
        ("mistral", "attention_bias", False),
        ("qwen2", "attention_bias", True),
        ("qwen3", "mlp_bias", False),
        ("seed_oss", "attention_out_bias", True),
        ("internlm3", "qkv_bias", True),
        ("internlm3", "attention_bias", False),
    ],
)
def test_biases_that_the_family_does_not_have(model_type: str, key: str, right: bool) -> None:
    parse(model_type, **{key: right})
    if not right:
        assert f"{key} is True" in refusal(model_type, **{key: True})


def test_norms_of_q_and_k_are_the_family_s() -> None:
    parse("qwen3", use_qk_norm=True)
    assert "use_qk_norm is True" in refusal("llama", use_qk_norm=True)
    assert "qk_norm is False" in refusal("qwen3", qk_norm=False)


def test_unknown_keys_are_noted() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "strange": 1}
    config = parse(foo=1, dual_chunk_attention_config={"chunk_size": 8}, rope_parameters=rope)
    assert config.unknown == ("dual_chunk_attention_config", "foo", "strange (rotary)")
    assert parse(attention_dropout=0.5, pretraining_tp=2, use_cache=False).unknown == ()


def test_each_key_is_in_one_table() -> None:
    assert not USED & HARMLESS
    assert not (USED | HARMLESS) & NEUTRAL.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaEncoderModel"]}, "architectures is 'LlamaEncoderModel'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "expected one of LlamaForCausalLM, LlamaModel"),
        ({"architectures": [5]}, "architectures is 5"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
            "auto_map.AutoModelForCausalLM is 'XForCausalLM'",
        ),
        ({"auto_map": {"AutoModel": ["a.LlamaModel", None]}}, "auto_map.AutoModel is"),
        ({"auto_map": "modeling_x"}, "expected classes by their kind"),
    ],
)
def test_classes_that_may_compute_something_else(changes: dict, named: str) -> None:
    assert named in refusal(**changes)


def test_classes_that_are_the_family_s() -> None:
    custom = {"AutoConfig": "c.AnyConfig", "AutoModel": "other/repo--m.LlamaModel"}
    for name in ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaForSequenceClassification"):
        parse(architectures=[name], auto_map=custom)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 28}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0,
                   "layer_types": ["full_attention"] * 2}),
        ("qwen3", {"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
        ("mistral", {"sliding_window": 128}),
        ("mistral", {"sliding_window": None}),
        ("llama", {"sliding_window": None}),
        ("llama", {"sliding_window": 4096}),
    ],
)  # fmt: skip
def test_windows_that_are_not_in_force(model_type: str, changes: dict) -> None:
    written = written_config(parse(model_type, **changes))
    assert not written.get("use_sliding_window")
    assert written.get("layer_types") in (None, ["full_attention"] * 2)
    flagged = FAMILIES[model_type].flagged_window
    assert flagged or written["sliding_window"] is None  # Mistral's is 4096 where nothing is said


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "32"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0,
                   "max_position_embeddings": 8192}, "sliding_window is 4096"),
        ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
         "'sliding_attention'"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "1 entries, expected one for each of 2"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("llama", {"sliding_window": 64}, "sliding_window is 64"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64, "no_rope_layers": [1, 0]},
         "sliding_window is 64"),
    ],
)  # fmt: skip
def test_windows_that_are_in_force(model_type: str, changes: dict, named: str) -> None:
    assert named in refusal(model_type, **changes)


def test_an_absent_window_of_mistral_is_its_default() -> None:
    raw = {"model_type": "mistral", **BASE, "max_position_embeddings": 8192}
    with pytest.raises(MsQuantError, match="sliding_window is 4096, expected no such key, null"):
        parse_config(raw)
    short = parse_config({**raw, "max_position_embeddings": 4096})
    assert written_config(short)["sliding_window"] is None


@pytest.mark.parametrize(
    ("changes", "unrotated"),
    [
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, (1,)),
        ({"no_rope_layers": [0, 1], "no_rope_layer_interval": 2}, (0,)),
        ({"no_rope_layers": [0, 0]}, (0, 1)),
        ({"no_rope_layers": [1, 1]}, ()),
        ({"no_rope_layers": None}, ()),  # every fourth, and there are two
    ],
)
def test_layers_without_positions(changes: dict, unrotated: tuple[int, ...]) -> None:
    config = parse("smollm3", **changes)
    assert config.unrotated == unrotated
    assert [config.rotates(index) for index in range(2)] == [i not in unrotated for i in range(2)]
    assert written_config(config).get("no_rope_layers") == changes["no_rope_layers"]


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "for each of 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "expected 1 (rotated) or 0"),
        ("smollm3", {"no_rope_layers": "10"}, "no_rope_layers is '10'"),
        ("smollm3", {"no_rope_layers": []}, "for each of 2 layers"),
        ("smollm3", {"no_rope_layers": [[1], 1]}, "no_rope_layers is [[1], 1]"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "a positive number"),
        ("llama", {"no_rope_layers": [0, 1]}, "its own class does not read the key"),
        ("qwen3", {"no_rope_layer_interval": 2}, "layer 1 has no rotary embedding"),
    ],
)
def test_layers_without_positions_that_cannot_be(
    model_type: str, changes: dict, named: str
) -> None:
    assert named in refusal(model_type, **changes)


def test_an_empty_list_of_layers_says_nothing_elsewhere() -> None:
    assert parse("llama", no_rope_layers=[]).unrotated == ()


def test_smollm3_takes_its_own_defaults() -> None:
    raw = {key: v for key, v in BASE.items() if key not in ("num_key_value_heads", "rope_theta")}
    config = parse_config({"model_type": "smollm3", **raw})  # every fourth layer, and there are 2
    assert (config.num_kv_heads, config.tied, config.rope["rope_theta"]) == (4, True, 2000000.0)
    assert written_config(config)["rope_theta"] == 2000000.0


def test_internlm3_says_what_it_is() -> None:
    config = parse("internlm3", qkv_bias=True, bias=False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    llama = parse("llama", attention_bias=True, mlp_bias=True)
    both = parse("internlm3", qkv_bias=True, bias=True)
    assert both.parameter_shapes() == llama.parameter_shapes()  # vLLM has it as Llama
    with pytest.raises(MsQuantError, match="'head_dim' is missing"):
        parse("internlm3", head_dim=None)
