"""``parse_config``: what it accepts is read right, what it refuses is named with its value."""

from __future__ import annotations

import json

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.models.config import load_config, parse_config, read_json, written_config

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def parse(**changes):
    return parse_config({**BASE, **changes}, "dir/config.json")


def refusal(**changes) -> str:
    with pytest.raises(MsQuantError) as caught:
        parse(**changes)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "mamba"},
            ("model_type", "'mamba'", "llama, mistral, qwen2, qwen2_5_vl, qwen2_moe, qwen3"),
        ),
        ({"model_type": None}, ("model_type", "None")),
        ({"model_type": ["llama"]}, ("model_type", "['llama']")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
        ({"use_sliding_window": "yes"}, ("use_sliding_window", "'yes'", "true or false")),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            ("layer_types", "'sliding_attention'"),
        ),
        ({"layer_types": 5}, ("layer_types is 5", "a list")),
        ({"num_hidden_layers": 4097}, ("num_hidden_layers is 4097", "at most 4096")),
        ({"num_hidden_layers": (1 << 31) - 1}, ("num_hidden_layers is 2147483647", "4096")),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ("quantization_config", "'gptq'", "dequantize"),
        ),
        ({"torch_dtype": "float64"}, ("dtype", "'float64'", "bfloat16")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'")),
        ({"eos_token_id": [2, -1]}, ("eos_token_id", "[2, -1]")),
        ({"rms_norm_eps": "tiny"}, ("rms_norm_eps", "'tiny'")),
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps", "-1e-05")),
        ({"tie_word_embeddings": "false"}, ("tie_word_embeddings", "'false'")),
        ({"attention_bias": 2}, ("attention_bias", "2")),
        ({"num_key_value_heads": 3}, ("num_attention_heads 4", "num_key_value_heads 3")),
        ({"head_dim": 15}, ("head_dim 15", "odd")),
    ],
)
def test_refuses(changes, named):
    message = refusal(**changes)
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [-4, 0, 2.0, "4k", True, 1 << 31, float("nan")])
def test_refuses_sizes_that_are_not_positive_integers(key, value):
    message = refusal(**{key: value})
    assert f"{key} is {value!r}, expected a positive integer" in message


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_refuses_a_missing_key(key):
    with pytest.raises(MsQuantError, match=f"the key '{key}' is missing"):
        parse_config({name: value for name, value in BASE.items() if name != key})


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, ("rope_type", "'longrope'", "yarn")),
        ({"type": "su"}, ("rope_type", "'su'")),
        ({"rope_type": ["yarn"]}, ("rope_type", "['yarn']")),
        ({"rope_type": "linear"}, ("factor", "linear", "None")),
        ({"rope_type": "linear", "factor": -2.0}, ("factor", "-2.0")),
        ({"rope_type": "dynamic", "factor": "two"}, ("factor", "'two'")),
        ({**YARN, "factor": float("nan")}, ("factor", "nan")),
        ({**YARN, "beta_fast": "3 2"}, ("beta_fast", "'3 2'")),
        ({**YARN, "attention_factor": -1}, ("attention_factor", "-1")),
        ({**YARN, "original_max_position_embeddings": []}, ("original_max_position_emb", "[]")),
        ({**LLAMA3, "low_freq_factor": None}, ("low_freq_factor", "None")),
        ({**LLAMA3, "high_freq_factor": 1.0}, ("high_freq_factor", "1.0", "low_freq_factor")),
        ({"rope_type": "default", "rope_theta": float("inf")}, ("rope_theta", "inf")),
        ({"rope_type": "default", "rope_theta": 1}, ("rope_theta", "1")),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"full_attention": {"rope_type": "default"}}, ("'full_attention'", "flat object")),
        (["yarn"], ("['yarn']", "flat object")),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_refuses_bad_rotary_parameters(key, rope, named):
    message = refusal(**{key: rope})
    for part in named:
        assert part in message


def test_refuses_outer_rotary_keys():
    assert "rope_theta of the default rotary embedding is 0" in refusal(rope_theta=0)
    assert "partial_rotary_factor 0.5" in refusal(partial_rotary_factor=0.5)


def test_refuses_two_rotary_rules_that_differ():
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    message = refusal(rope_parameters=plain, rope_scaling=YARN)
    assert "rope_parameters" in message
    assert "rope_scaling" in message
    both = parse(rope_parameters=YARN, rope_scaling={"type": "yarn", "factor": 4.0})
    assert both.rope["rope_type"] == "yarn"


def test_an_original_length_outside_is_taken_in():
    inside = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    config = parse(rope_parameters=inside, original_max_position_embeddings=16)
    assert config.rope["original_max_position_embeddings"] == 16
    written = written_config(config)["rope_scaling"]
    assert written["original_max_position_embeddings"] == 16  # transformers 4 looks inside only


def test_original_length_defaults_to_the_maximum():
    for rope in (YARN, {**YARN, "original_max_position_embeddings": None}):
        assert parse(rope_scaling=rope).rope["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "max_position"),
    [("llama", 32, 64, 2048), ("qwen2", 32, 64, 32768), ("qwen3", 32, 128, 32768)],
)
def test_absent_keys_take_the_defaults_of_transformers(
    model_type, kv_heads, head_dim, max_position
):
    absent = ("num_key_value_heads", "max_position_embeddings")
    raw = {name: value for name, value in BASE.items() if name not in absent}
    raw.update(model_type=model_type, hidden_size=2048, num_attention_heads=32)
    config = parse_config(raw)
    found = (config.num_kv_heads, config.head_dim, config.max_position)
    assert found == (kv_heads, head_dim, max_position)
    assert config.rope["rope_theta"] == 10000.0
    assert not config.tied


def test_reads_what_the_family_says():
    llama = parse(attention_bias=True, mlp_bias=True, torch_dtype="float16", eos_token_id=[2, 3])
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (True,) * 3 + (False,)
    assert (llama.dtype, llama.eos_token_ids) == ("float16", (2, 3))
    qwen2 = parse(model_type="qwen2", eos_token_id=None)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    assert (qwen2.dtype, qwen2.eos_token_ids) == ("bfloat16", ())
    qwen3 = parse(model_type="qwen3", head_dim=32, tie_word_embeddings=True)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tied) == (False, True, True)
    assert qwen3.parameter_shapes()["model.layers.1.self_attn.q_norm.weight"] == (32,)
    assert qwen3.block(1).linears["self_attn.o_proj"].shape == (64, 128)
    assert "lm_head.weight" not in qwen3.parameter_shapes()


def test_load_config_reads_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE), encoding="utf-8")
    config = load_config(tmp_path)
    assert config == parse_config(BASE)
    assert config.raw == BASE


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"rms_norm_eps": NaN}', "NaN, expected a finite number"),
        (b"[1]", "a JSON list, expected an object"),
        (b" " * 2000, "2000 bytes, expected at most 1000"),
    ],
)
def test_read_json_refuses(tmp_path, content, named):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    limit = 1000 if content.isspace() else 1 << 20
    with pytest.raises(MsQuantError) as caught:
        read_json(path, limit)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


def test_load_config_names_what_is_missing(tmp_path):
    with pytest.raises(MsQuantError, match="no such model directory"):
        load_config(tmp_path / "absent")
    with pytest.raises(MsQuantError, match="no such file"):
        load_config(tmp_path)
