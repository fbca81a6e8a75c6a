"""Keys that old and new runtimes read in different places: read once, refused when they differ,
written in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.companions import config_problems, model_config
from ms_quant.models.config import load_config, parse_config, written_config
from ms_quant.numerics.storage import DTYPES
from sparse_compress.layouts import model_config as sparse_config

BASE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def written(**changes: object) -> dict:
    config = parse_config({**BASE, **changes}, "config.json")
    return model_config(config, DTYPES[config.dtype])


@pytest.mark.parametrize(
    ("given", "theta", "rule"),
    [
        ({}, 10000.0, {}),  # vLLM takes 1000000 for Qwen where nothing is said
        ({"rope_theta": 1000000}, 1000000, {}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, {}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5, {}),
        (
            {"rope_theta": 7.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            7.5,
            {"factor": 2.0},
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}}, 5e5, YARN),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}}, 5e5, YARN),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "yarn", **YARN},
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN},
            },
            5e5,
            YARN,
        ),
        ({"rope_parameters": {"type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, LLAMA3),
        # transformers 4.51 takes another factor where the original length is there
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 10000.0, {"factor": 4.0}),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": None}},
            10000.0,
            {"factor": 4.0},
        ),
    ],
)
def test_rotary_keys_are_written_in_both_spellings(given: dict, theta: float, rule: dict) -> None:
    found = written(**given)
    assert found["rope_theta"] == theta
    new = dict(found["rope_parameters"])
    kind = new.pop("rope_type")
    assert new == {"rope_theta": theta, **rule}
    if kind == "default":
        assert found.get("rope_scaling") is None
    else:
        assert found["rope_scaling"] == {"rope_type": kind, "type": kind, **rule}
    again = parse_config(found, "config.json")
    assert again.rope == parse_config({**BASE, **given}).rope
    assert written_config(again) == {k: v for k, v in found.items() if "dtype" not in k} | {
        "dtype": found["dtype"],
        "torch_dtype": found["torch_dtype"],
    }


@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"torch_dtype": "float16"}])
def test_the_type_is_written_under_both_keys(given: dict) -> None:
    found = written(**given)
    assert (found["dtype"], found["torch_dtype"]) == ("float16", "float16")


def test_sparse_outputs_are_spelled_so_too() -> None:
    rope = {"rope_type": "default", "rope_theta": 1000000}
    found = sparse_config(parse_config({**BASE, "dtype": "bfloat16", "rope_parameters": rope}))
    assert (found["rope_theta"], found["torch_dtype"]) == (1000000, "float16")
    assert found["dtype"] == "float16"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 1000000}},
            ("rope_theta is 10000.0", "rope_parameters.rope_theta is 1000000"),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e4}},
            ("rope_theta is 1000000.0", "rope_scaling.rope_theta is 10000.0"),
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            ("rope_scaling", "rope_type is 'yarn'", "type is 'linear'"),
        ),
        (
            {"rope_parameters": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            ("rope_parameters", "rope_type is 'dynamic'", "type is 'linear'"),
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            ("rope_parameters", "rope_scaling", "differ"),
        ),
        (
            {
                "original_max_position_embeddings": 512,
                "rope_scaling": {"type": "yarn", **YARN},
            },
            ("original_max_position_embeddings is 512", "rope_scaling.original_max", "256"),
        ),
        (
            {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
            ("partial_rotary_factor is 1.0", "rope_parameters.partial_rotary_factor is 0.5"),
        ),
        (
            {"dtype": "bfloat16", "torch_dtype": "float16"},
            ("dtype is 'bfloat16'", "torch_dtype is 'float16'"),
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 2.0}},
            ("attn_factor", "2.0", "some runtimes ignore it"),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", **YARN, "llama_4_scaling_beta": 0.1}},
            ("llama_4_scaling_beta", "0.1", "no such key or 0"),
        ),
    ],
)
def test_spellings_that_differ_are_refused(given: dict, named: tuple[str, ...]) -> None:
    with pytest.raises(MsQuantError) as caught:
        parse_config({**BASE, **given}, "m/config.json")
    assert str(caught.value).startswith("m/config.json")
    for part in named:
        assert part in str(caught.value)


def test_null_beside_a_value_is_no_contradiction() -> None:
    given = {"rope_theta": None, "rope_scaling": None, "dtype": None, "torch_dtype": "float16"}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = parse_config({**BASE, **given, "rope_parameters": rope})
    assert (config.rope["rope_theta"], config.dtype) == (5e5, "float16")


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"rope_theta": 5e5, "torch_dtype": "bfloat16"}, []),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}}, []),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            ["rope_theta is None, expected 500000.0 as rope_parameters says"],
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **YARN}},
            ["rope_theta is None, expected 500000.0", "rope_scaling is None, expected type 'yarn'"],
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", **YARN}},
            ["rope_scaling is None, expected type 'yarn'"],
        ),
    ],
)
def test_what_older_runtimes_would_not_find(
    given: dict, problems: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **given}))
    found = list(config_problems(tmp_path))
    assert len(found) == len(problems)
    for line, expected in zip(found, problems, strict=True):
        assert expected in line


@pytest.mark.parametrize(
    ("eos", "generation", "wanted"),
    [(None, 5, 5), (None, [5, 6], [5, 6]), (3, [5, 6], 3), ([3], None, [3]), (None, None, None)],
)
def test_end_tokens_are_in_config_json_too(
    eos: object, generation: object, wanted: object, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "eos_token_id": eos}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    config = load_config(tmp_path)
    assert written_config(config)["eos_token_id"] == wanted
    every = {*([eos] if isinstance(eos, int) else eos or ())}
    every |= {*([generation] if isinstance(generation, int) else generation or ())}
    assert set(config.eos_token_ids) == every
