"""Spellings of ``config.json`` and other JSON that real directories have: one model, one output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms_quant.data.tokenizer import load_tokenizer, model_vocab_size
from ms_quant.errors import MsQuantError
from ms_quant.files.companion_files import companion_files
from ms_quant.formats.companions import source_problems
from ms_quant.formats.float_model import open_float
from ms_quant.models.config import load_config, parse_config, written_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.options import QuantizeOptions, read_recipe
from ms_quant.pipeline.run import run_job

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": "auto", "dtype": "torch.bfloat16"},
        {"dtype": "torch.bfloat16"},
        {"quantization_config": {}},
        {"quantization_config": None, "compression_config": None},
        {"compression_config": {}},
        {"rms_norm_eps": "1e-05"},
        {"rms_norm_eps": " 0.00001 "},
        {"hidden_size": "64", "vocab_size": "64", "num_hidden_layers": "2"},
        {"rope_theta": "1000000.0"},
        {"rope_theta": "1e6"},
        {"rope_theta": None, "rope_scaling": {**BASE["rope_scaling"], "rope_theta": "1e6"}},
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": "4.0",
                "original_max_position_embeddings": "32",
            }
        },
    ],
)
def test_values_spelled_in_another_way_are_the_same_model(changes: dict[str, Any]) -> None:
    found, expected = parse_config({**BASE, **changes}), parse_config(BASE)
    assert found == expected
    keys = ("rms_norm_eps", "hidden_size", "rope_theta", "rope_scaling", "rope_parameters")
    written, plain = written_config(found), written_config(expected)
    assert {key: written[key] for key in keys} == {key: plain[key] for key in keys}
    assert not {"quantization_config", "compression_config"} & written.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": "torch.bfloat16", "dtype": "float16"}, "'bfloat16' and|'float16' and"),
        ({"torch_dtype": "torch.int8"}, "'int8' is not supported"),
        ({"torch_dtype": ""}, "'' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quant_method None"),
        ({"hidden_size": "64.0"}, "hidden_size is 64.0, expected a positive integer"),
        ({"hidden_size": "0x40"}, "hidden_size is '0x40', expected a positive integer"),
        ({"hidden_size": "6_4"}, "hidden_size is '6_4', expected a positive integer"),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps is 'nan'"),
        ({"rms_norm_eps": "1e999"}, "rms_norm_eps is inf"),
        ({"rope_theta": "1,000,000"}, "rope_theta of the yarn rotary embedding is '1,000,000'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
    ],
)
def test_what_is_not_plain_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        parse_config({**BASE, **changes})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_auto_is_the_type_of_the_tensors(tiny_model: Callable[..., Path], dtype: str) -> None:
    model = tiny_model(dtype=dtype)
    raw = json.loads((model / "config.json").read_text())
    raw.pop("dtype", None)
    (model / "config.json").write_text(json.dumps({**raw, "torch_dtype": "auto"}))
    assert open_float(model).config.dtype == dtype


def test_byte_order_marks_change_nothing(
    tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path
) -> None:
    plain, marked = tiny_model("plain"), tiny_model("marked")
    (plain / "generation_config.json").write_text('{"eos_token_id": 5}')
    (marked / "generation_config.json").write_text('{"eos_token_id": 5}')
    for path in marked.glob("*.json"):
        path.write_bytes(MARK + path.read_bytes())
    assert load_config(marked) == load_config(plain)
    assert model_vocab_size(marked) == model_vocab_size(plain) is not None
    text = "the words of a text"
    assert (load_tokenizer(marked).encode(text) == load_tokenizer(plain).encode(text)).all()

    outputs = []
    for model in (plain, marked):
        output = tmp_path / f"{model.name}-out"
        run_job(QuantizeOptions(model, output, calib=calib_text, samples=2, seq_len=8))
        outputs.append({p.name: p.read_bytes() for p in output.iterdir()})
        assert not list(source_problems(output, model, DTYPES["bfloat16"]))
    first, second = outputs
    assert first.keys() == second.keys() > {*companion_files(plain)}
    assert [n for n in first if first[n] != second[n] and n != "ms_quant.json"] == []


@pytest.mark.parametrize(
    "content",
    [
        '{"apiversion": "ms_quant_v1", "rules": [{"scheme": "W8A8_DYNAMIC"}]}',
        "apiversion: ms_quant_v1\nrules:\n- scheme: W8A8_DYNAMIC\n",
    ],
)
def test_a_recipe_behind_a_byte_order_mark(tmp_path: Path, content: str) -> None:
    plain, marked = tmp_path / "plain.yaml", tmp_path / "marked.yaml"
    plain.write_text(content)
    marked.write_bytes(MARK + content.encode())
    assert read_recipe(marked) == read_recipe(plain)
