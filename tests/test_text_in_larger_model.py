"""Text models in Qwen2.5-VL and Qwen3-VL: what sees images passes through as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from encoded import edit_config, maker
from routed_models import DEEPSEEK, routed_tensors
from sealed import seal_again

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.float_model import open_float
from ms_quant.formats.opening import open_model
from ms_quant.formats.registry import FORMATS
from ms_quant.models.config import load_config, parse_config, written_config
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_job
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
}
SEEN: dict[str, Any] = {
    "vision_config": {"model_type": "qwen3_vl", "depth": 1, "hidden_size": 32},
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
FLAT: dict[str, Any] = {  # as Qwen2.5-VL-7B-Instruct has it
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    **TEXT,
    **SEEN,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 70,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SECTIONS = {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"}
NESTED: dict[str, Any] = {  # as Qwen3-VL-4B-Instruct has it
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    **SEEN,
    "text_config": {
        "model_type": "qwen3_vl_text",
        **TEXT,
        "head_dim": 32,
        "attention_bias": False,
        "dtype": "bfloat16",
        "rope_scaling": SECTIONS,
        "tie_word_embeddings": True,
    },
    "tie_word_embeddings": True,
}
LAYOUTS = {
    "flat": (FLAT, "model.", "visual."),
    "nested": (NESTED, "model.language_model.", "model.visual."),
}
DATA = {"samples": 12, "seq_len": 32}


def visual(prefix: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    shapes = {
        "patch_embed.proj.weight": (8, 3, 2, 2, 2),
        "blocks.0.attn.qkv.weight": (24, 8),
        "blocks.0.attn.qkv.bias": (24,),
        "blocks.0.norm1.weight": (8,),
        "merger.mlp.0.weight": (64, 8),
    }
    made = {prefix + key: rng.normal(size=s).astype(np.float32) for key, s in shapes.items()}
    stored = {name: array.astype(BF16) for name, array in made.items()}
    norm = f"{prefix}blocks.0.norm1.weight"
    return {**stored, norm: made[norm]}  # float32, as some exports have norms


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(tmp_path: Path, save_tensors: Callable) -> Callable[[str], Path]:
    def run(layout: str) -> Path:
        raw, prefix, other = LAYOUTS[layout]
        directory = tmp_path / layout
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(raw))
        tensors = {
            name.replace("model.", prefix, 1): tensor.astype(BF16)
            for name, tensor in routed_tensors(raw).items()
        }
        save_tensors(directory / "model.safetensors", {**tensors, **visual(other)})
        return directory

    return run


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=windows())
    return path


def windows() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (12, 32)).astype(np.int32)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant"])
def test_an_output_has_the_names_and_the_other_tensors_of_its_source(
    format: str,
    algorithm: str,
    layout: str,
    make: Callable[[str], Path],
    calib: Path,
    tmp_path: Path,
    load_tensors: Callable,
) -> None:
    source, output = make(layout), tmp_path / "out"
    data = {} if algorithm == "minmax" else {"calib": calib, **DATA}
    run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC", algorithm, formats=(format,), **data))
    result = verify_checkpoint(output, source)
    assert not result.problems and result.quantized == 2 * 7
    exact = perplexity(open_model(source), windows()).loss
    assert perplexity(open_model(output), windows()).loss == pytest.approx(exact, rel=0.02)
    _, prefix, other = LAYOUTS[layout]
    before, after = load_tensors(source), load_tensors(output)
    float_names = {name for name in before if "_proj." not in name}
    assert float_names <= after.keys()
    assert any(name.startswith(f"{prefix}layers.0.self_attn.q_proj.") for name in after)
    if prefix != "model.":
        assert not [name for name in after if name.startswith("model.layers.")]
    for name in visual(other):
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == before[name].tobytes()
    for index in output.glob("*.index.json"):
        assert json.loads(index.read_text())["weight_map"].keys() == after.keys()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_descriptions_name_what_stays_float(
    format: str, layout: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    excluded = ("*.1.mlp.up_proj", "*.1.mlp.gate_proj")
    run_job(
        QuantizeOptions(make(layout), output, "W8A8_DYNAMIC", formats=(format,), exclude=excluded)
    )
    _, prefix, other = LAYOUTS[layout]
    (found,) = FORMATS[format].find(output)
    description = json.loads(found.read_text())
    if format == "compressed-tensors":
        entry = description["quantization_config"]
        assert {f"{other}blocks.0.attn.qkv", f"{other}merger.mlp.0"} <= set(entry["ignore"])
        assert f"{prefix}layers.1.mlp.up_proj" in entry["ignore"]
        return
    for name in visual(other):
        assert description[name] == "FLOAT"
    assert description[f"{prefix}layers.1.mlp.up_proj.weight"] == "FLOAT"
    assert description[f"{prefix}layers.1.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    assert description[f"{prefix}embed_tokens.weight"] == "FLOAT"


def test_the_config_keeps_its_shape(make: Callable[[str], Path], tmp_path: Path) -> None:
    written = {}
    for layout in LAYOUTS:
        output = tmp_path / f"{layout}-out"
        run_job(QuantizeOptions(make(layout), output, "W8A8_DYNAMIC", dtype="float16"))
        written[layout] = json.loads((output / "config.json").read_text())
        assert written[layout]["torch_dtype"] == "float16"
        assert load_config(output).dtype == "float16"
        for key, value in SEEN.items():
            assert written[layout][key] == value
    flat, nested = written["flat"], written["nested"]
    assert "text_config" not in flat and flat["rope_scaling"] == FLAT["rope_scaling"]
    assert flat["rope_parameters"]["mrope_section"] == [2, 3, 3]
    inner = nested["text_config"]
    assert "hidden_size" not in nested and "rope_scaling" not in nested
    assert inner["rope_scaling"] == SECTIONS and inner["dtype"] == "float16"
    assert inner["rope_parameters"] == {**SECTIONS, "rope_theta": 1000000.0}
    assert {key: inner[key] for key in TEXT} == TEXT


def test_new_spellings_are_written_for_old_runtimes() -> None:
    raw = json.loads(json.dumps(NESTED))
    text = raw["text_config"]
    del text["rope_theta"], text["rope_scaling"]
    text["rope_parameters"] = {**SECTIONS, "rope_theta": 1000000.0}
    inner = written_config(parse_config(raw))["text_config"]
    assert inner["rope_theta"] == 1000000.0
    assert inner["rope_scaling"] == {**SECTIONS, "type": "default"}


def test_a_model_in_fp8_is_copied_under_its_names(
    make: Callable[[str], Path], tmp_path: Path, load_tensors: Callable, layout: str
) -> None:
    source, encoded, copy = make(layout), tmp_path / "fp8", tmp_path / "copy"
    maker.make_fp8_source(source, encoded, maker.Options(keep=rf"{maker.KEPT}|visual"))
    convert_checkpoint(encoded, copy, "float")
    before, after = load_tensors(source), load_tensors(copy)
    assert before.keys() == after.keys()
    for name in visual(LAYOUTS[layout][2]):
        assert after[name].tobytes() == before[name].tobytes()
    assert perplexity(open_model(copy), windows()).loss == pytest.approx(
        perplexity(open_model(encoded), windows()).loss, rel=1e-3
    )


def test_the_residual_stream_of_images_is_not_turned(
    make: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    with pytest.raises(MsQuantError, match=r"quarot turns the residual stream, which .*visual\."):
        prepare(QuantizeOptions(make(layout), tmp_path / "out", "W8A8_DYNAMIC", "quarot"))


WRONG = [
    ({"hidden_size": 32}, "hidden_size is 32 and text_config.hidden_size 64, expected one value"),
    ({"text_config": [1]}, r"text_config is \[1\], expected an object"),
    ({"architectures": ["Qwen3VLModel"]}, "architectures is 'Qwen3VLModel', expected one of"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_config_that_says_two_things_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        parse_config({**NESTED, **change})


def test_kimi_is_read_in_a_larger_model_and_its_unknown_names_are_refused(
    tmp_path: Path, save_tensors: Callable
) -> None:
    text = {**DEEPSEEK, "model_type": "kimi_k2", "num_nextn_predict_layers": 0}
    raw = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "vision_config": {"depth": 1},
        "text_config": text,
        "torch_dtype": "bfloat16",
    }
    config = parse_config(raw)
    alone = parse_config({**text, "architectures": ["DeepseekV3ForCausalLM"]})
    assert config.parameter_shapes() == alone.parameter_shapes()
    assert config.routing == alone.routing and config.latent == alone.latent
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {n: t.astype(BF16) for n, t in routed_tensors(text).items()}
    other = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_tensors(tmp_path / "model.safetensors", {**other, "tower.w": np.zeros((2, 2), BF16)})
    with pytest.raises(MsQuantError, match=r"tensors begin with 'language_model\.model\.'"):
        open_float(tmp_path)


def test_other_names_are_refused(
    make: Callable[[str], Path], load_tensors: Callable, save_tensors: Callable, tmp_path: Path
) -> None:
    source = make("nested")
    tensors = load_tensors(source)
    tensors["model.audio.conv.weight"] = np.zeros((2, 2), BF16)
    save_tensors(source / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=r"'model\.audio\.conv\.weight' is not a tensor of"):
        prepare(QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC"))
    del tensors["model.audio.conv.weight"]
    tensors["model.visual.merger.mlp.0.weight"][3, 4] = np.nan
    save_tensors(source / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=r"'model\.visual\.merger\.mlp\.0\.weight' holds 1 NaN"):
        run_job(QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC"))


def test_verify_finds_a_changed_tensor_of_the_larger_model(
    make: Callable[[str], Path],
    tmp_path: Path,
    layout: str,
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    source, output = make(layout), tmp_path / "out"
    run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC"))
    (path,) = output.glob("*.safetensors")
    tensors, name = load_tensors(output), f"{LAYOUTS[layout][2]}merger.mlp.0.weight"
    tensors[name][3, 4] += 1
    save_tensors(path, tensors)
    seal_again(output)
    (problem,) = verify_checkpoint(output, source).problems
    assert problem.startswith(f"{name}: differs from")
    tensors[name][3, 4] -= 1
    edit_config(output, lambda raw: raw["vision_config"].update(depth=2))
    seal_again(output)
    assert any("vision_config" in p for p in verify_checkpoint(output, source).problems)
