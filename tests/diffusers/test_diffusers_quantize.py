"""Directories of diffusers quantized for vllm-omni: names, numbers, files, resume, refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion_models import (
    MODELS,
    dequantized,
    load_tensors,
    save_pipeline,
    save_tensors,
    save_transformer,
    tensors_of,
)
from killed import KILLED_AT_RENAME

import ms_quant
from ms_quant.diffusers.component import open_float_component
from ms_quant.diffusers.methods import HELD, storage_of
from ms_quant.diffusers.plan import quantized_linear
from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.quantization import streamed

QKV = {"to_q", "to_k", "to_v"}
ADDED = {"add_q_proj", "add_k_proj", "add_v_proj"}
MLP = {"net.0.proj", "net.2"}


def paths(place: str, names: set[str]) -> set[str]:
    return {f"{place}.{name}" for name in names}


DOUBLE = paths("attn", QKV | ADDED | {"to_out.0", "to_add_out"})
SINGLE = paths("attn", QKV) | {"proj_mlp", "proj_out"}
WAN = paths("attn1", QKV | {"to_out.0"}) | paths("attn2", QKV | {"to_out.0"}) | paths("ffn", MLP)
TEXT = paths("ff", MLP) | paths("ff_context", MLP)
QUANTIZED = {  # of each block; written from the networks of vllm-omni 0.30 and of diffusers
    "wan": {"blocks": WAN},
    "wan_image": {"blocks": WAN | paths("attn2", {"add_k_proj", "add_v_proj"})},
    "hunyuan_video": {
        "transformer_blocks": DOUBLE | TEXT,
        "single_transformer_blocks": SINGLE,
    },
    "hunyuan_video_15": {"transformer_blocks": DOUBLE | TEXT},
    "cogvideox": {"transformer_blocks": paths("attn1", QKV | {"to_out.0"}) | paths("ff", MLP)},
    "flux": {"single_transformer_blocks": SINGLE},
    "qwen_image": {"transformer_blocks": DOUBLE | paths("img_mlp", MLP) | paths("txt_mlp", MLP)},
}


def make(model: Path, output: Path, scheme: str = "W8A8_MXFP8", **options: Any) -> dict[str, Any]:
    return ms_quant.quantize_pipeline(model, output, scheme, **options)


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("key", MODELS)
def test_every_tensor_of_diffusers_is_known(key: str, tmp_path: Path) -> None:
    zeros = {n: np.zeros(s, np.float32) for n, s in MODELS[key]["tensors"].items()}
    component = open_float_component(save_transformer(tmp_path / key, key, zeros))
    found = {path for group in component.groups for path in group.linears}
    wanted = QUANTIZED[key if key in QUANTIZED else re.sub("_[^_]*$", "", key)]
    assert found == {
        f"{stack}.{i}.{path}" for stack, names in wanted.items() for i in (0, 1) for path in names
    }
    shapes = MODELS[key]["tensors"]
    assert {path: list(shape) for path, shape in component.shapes.items()} == {
        path: shapes[f"{path}.weight"] for path in component.shapes
    }


@pytest.mark.parametrize("scheme", HELD)
def test_weights_by_the_rules_of_the_runtime_are_near(scheme: str, tmp_path: Path) -> None:
    scale = 8 if "DUAL" in scheme else 2  # inputs in long blocks of 512
    source = tensors_of("wan", scale=scale, code="BF16", blocks=1)
    model = save_transformer(tmp_path / "pipe" / "transformer", "wan", source, scale, 1)
    index = {"transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    make(model.parent, tmp_path / "out", scheme)
    found = dequantized(tmp_path / "out")
    assert found.keys() == source.keys()
    # The largest error of a block, of its largest magnitude: 512 saturates to 448 in E4M3, and 5 is
    # halfway between 4 and 6 in E2M1; one of 127 or 7 steps; half of E4M3's last of 3 bits.
    part = {"MXFP8": 1 / 8, "W4A": 1 / 4, "W8A8FP8": 1 / 16}
    limit = next((v for k, v in part.items() if k in scheme), 0.51 / 127)
    limit = 0.51 / 7 if scheme == "W4A4_DYNAMIC" else limit
    block = 32 if "MXFP" in scheme else None
    for name, ours in found.items():
        theirs = source[name].astype(np.float32)
        linear = name.startswith("blocks") and theirs.ndim == 2 and name.endswith(".weight")
        if not linear:
            assert np.array_equal(ours, theirs), name
            continue
        size = block or theirs.shape[1]
        error, most = (abs(x).reshape(-1, size).max(1) for x in (ours - theirs, theirs))
        assert not np.array_equal(ours, theirs) and (error <= limit * most).all(), name


def test_golden_codes(tmp_path: Path) -> None:
    """A block of which the largest magnitude is 1, by hand."""
    row = np.zeros(64, np.float32)
    row[:5] = 1, -0.5, 0.75, 0.125, -0.0625
    for scheme, exponent, codes in (
        ("W8A8_MXFP8", 119, [0x78, 0xF0, 0x74, 0x60, 0xD8]),  # 256, -128, 192, 32, -16
        ("W4A4_MXFP4", 125, [0x48, 0xC0, 0x44, 0x30, 0xB0]),  # 4, -2, 3, .5, -.25 away to -.5
    ):
        tensors = tensors_of("wan")
        tensors["blocks.1.attn2.to_k.weight"][7] = row
        model = save_transformer(tmp_path / f"{scheme}-model", "wan", tensors)
        make(model, tmp_path / scheme, scheme)
        found = load_tensors(tmp_path / scheme)
        assert found["blocks.1.attn2.to_k.weight"].view(np.uint8)[7, :5].tolist() == codes
        assert found["blocks.1.attn2.to_k.weight_scale"][7, 0] == exponent


def test_dual_scales_have_a_multiplier_for_each_linear(tmp_path: Path) -> None:
    """vllm-omni takes memory as it is where there is none."""
    model = save_transformer(tmp_path / "m", "wan", scale=8, blocks=1)
    make(model, tmp_path / "out", "W4A4_MXFP4_DUALSCALE")
    found = load_tensors(tmp_path / "out")
    linears = [n.removesuffix(".weight_scale") for n in found if n.endswith(".weight_scale")]
    assert len(linears) == 10
    for path in linears:
        out, into = found[f"{path}.weight"].shape
        assert found[f"{path}.weight_dual_scale"].shape == (out, into // 512, 1)
        assert found[f"{path}.mul_scale"].dtype == np.float32
        assert np.array_equal(found[f"{path}.mul_scale"], np.ones(into))


def test_config_names_float_linears_as_both_sides_call_them(tmp_path: Path) -> None:
    pipe = save_pipeline(tmp_path / "pipe", transformer="wan", transformer_2="wan")
    patterns = ("blocks.0.attn1.to_k", "*.1.ffn.net.2", "blocks.1.attn2.to_out.0")
    result = make(pipe, tmp_path / "out", exclude=patterns)
    assert result["quantized_linears"] == 2 * 15
    config = json.loads((tmp_path / "out" / "transformer_2" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "mxfp8",
        "is_checkpoint_mxfp8_serialized": True,
        "ignored_layers": sorted(
            [
                *(f"blocks.0.attn1.to_{x}" for x in ("q", "k", "v", "qkv")),
                *("blocks.1.ffn.net.2", "blocks.1.ffn.net_2"),
                *("blocks.1.attn2.to_out.0", "blocks.1.attn2.to_out"),
                *(f"condition_embedder.text_embedder.linear_{i}" for i in (1, 2)),
                *(f"condition_embedder.time_embedder.linear_{i}" for i in (1, 2)),
                *("condition_embedder.time_proj", "proj_out"),
            ]
        ),
    }
    assert config == MODELS["wan"]["config"]


def test_ascend_describes_both_transformers_at_the_root(tmp_path: Path) -> None:
    pipe = save_pipeline(tmp_path / "pipe", transformer="wan", transformer_2="wan")
    make(pipe, tmp_path / "out", "W8A8_DYNAMIC", exclude=("blocks.0.*",))
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    for path, kind in {
        "blocks.0.attn1.to_q": "FLOAT",
        "blocks.0.attn1.to_qkv": "FLOAT",
        "blocks.0.ffn.net_0.proj": "FLOAT",
        "blocks.1.attn1.to_q": "W8A8_DYNAMIC",
        "blocks.1.attn1.to_qkv": "W8A8_DYNAMIC",
        "blocks.1.attn1.to_out": "W8A8_DYNAMIC",
        "blocks.1.ffn.net_2": "W8A8_DYNAMIC",
        "condition_embedder.time_proj": "FLOAT",
    }.items():
        assert described[f"{path}.weight"] == kind, path
    assert described["blocks.1.attn1.to_q.weight_scale"] == "W8A8_DYNAMIC"
    assert described["model_quant_type"] == "W8A8_DYNAMIC"
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "ascend"}


def test_components_are_copied_and_links_are_followed_once(tmp_path: Path) -> None:
    pipe = save_pipeline(tmp_path / "pipe", transformer="qwen_image")
    cache, blobs = tmp_path / "cache", tmp_path / "blobs"
    blobs.mkdir()
    for number, (name, content) in enumerate(tree(pipe).items()):
        (blobs / str(number)).write_bytes(content)
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(blobs / str(number))
    make(cache, tmp_path / "out")
    made = tree(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    copied = {n: c for n, c in tree(pipe).items() if n.split("/")[0] != "transformer"}
    del copied["whole_model.safetensors"]
    assert {name: made[name] for name in copied} == copied
    assert made.keys() - copied.keys() == {
        *("ms_quant.json", "transformer/config.json"),
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_shards_have_the_index_of_diffusers_and_the_same_tensors(tmp_path: Path) -> None:
    model = save_transformer(tmp_path / "m", "flux")
    make(model, tmp_path / "one")
    make(model, tmp_path / "many", shard_bytes=100_000)
    index = json.loads(
        (tmp_path / "many" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    whole, parts = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "many")
    assert index["weight_map"].keys() == whole.keys() == parts.keys()
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    assert len(set(index["weight_map"].values())) > 2
    again = tmp_path / "again"  # and a sharded source gives the same
    shutil.copytree(tmp_path / "many", again)
    (again / "ms_quant.json").unlink()
    (again / "config.json").write_text((model / "config.json").read_text())
    for name, path in {p.name: p for p in again.glob("*.safetensors")}.items():
        held = {k: v for k, v in load_tensors(model).items() if index["weight_map"][k] == name}
        save_tensors(path, held)
    names = {k: v for k, v in index["weight_map"].items() if k in load_tensors(model)}
    (again / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names})
    )
    make(again, tmp_path / "from_shards")
    found = load_tensors(tmp_path / "from_shards")
    assert found.keys() == whole.keys()
    assert all(array.tobytes() == whole[name].tobytes() for name, array in found.items())


def test_dtype_narrows_what_stays_float(tmp_path: Path) -> None:
    model = save_transformer(tmp_path / "m", "cogvideox")
    make(model, tmp_path / "out", dtype="bfloat16")
    found = load_tensors(tmp_path / "out")
    assert {str(array.dtype) for array in found.values()} == {"bfloat16", "float8_e4m3fn", "uint8"}


KILLED = (
    KILLED_AT_RENAME
    + """
from ms_quant.diffusers.pipeline import quantize_pipeline
from ms_quant.files import filling

filling.SAVED_SECONDS = 0
quantize_pipeline(model, output, shard_bytes=100_000)
"""
)


def test_a_killed_run_goes_on_and_gives_the_same(
    tmp_path: Path, package_environment: dict[str, str]
) -> None:
    pipe = save_pipeline(tmp_path / "pipe", transformer="wan")
    make(pipe, tmp_path / "whole", shard_bytes=100_000)
    kills, output = 0, tmp_path / "out"
    while True:
        arguments = [str(pipe), "", str(output), "20"]
        run = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=package_environment)
        if run.returncode == 0:
            break
        kills += 1
        assert not output.exists() and kills < 20
    assert kills > 1
    assert tree(output) == tree(tmp_path / "whole")
    assert make(pipe, output, shard_bytes=100_000)["was_finished"]


@pytest.mark.parametrize("scheme", ["W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE", "W8A8_DYNAMIC"])
def test_a_weight_is_read_some_rows_at_a_time(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1024 x 2048 values 8 MiB are float32, and 2 MiB codes."""
    monkeypatch.setattr(streamed, "ELEMENTS", 1 << 13)
    weight = np.ones((1024, 2048), np.float32)
    save_tensors(tmp_path / "model.safetensors", {"linear.weight": weight})
    checkpoint, storage = Checkpoint(tmp_path), storage_of(scheme, {}, np.dtype(np.float32))
    quantized_linear(checkpoint, storage, "linear")
    tracemalloc.start()
    quantized_linear(checkpoint, storage, "linear")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert weight.size < peak < 2 * weight.size


def changed(name: str, value: Any = None, shape: tuple[int, ...] | None = None) -> Any:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if value is None and shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape or tensors[name].shape, value or np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed("blocks.1.ffn.net.2.weight"), "has no tensor 'blocks.1.ffn.net.2.weight'"),
        (changed("proj_out.weight"), "has no tensor 'proj_out.weight'"),
        (
            changed("blocks.2.ffn.net.2.weight", np.float32, (64, 128)),
            "holds 'blocks.2.ffn.net.2.weight', expected only the tensors of a WanTransformer3D",
        ),
        (
            changed("blocks.0.attn1.to_q.weight", np.float32, (64, 32)),
            r"'blocks.0.attn1.to_q.weight' has shape \[64, 32\], expected \[64, 64\]",
        ),
        (changed("blocks.0.attn1.to_q.weight", np.uint8), "has dtype U8, expected one of F32"),
        (changed("proj_out.bias", np.int8), "tensor 'proj_out.bias' has dtype I8"),
    ],
)
def test_tensors_that_are_missing_or_surprising_are_named(
    change: Any, sentence: str, tmp_path: Path
) -> None:
    tensors = tensors_of("wan")
    change(tensors)
    model = save_transformer(tmp_path / "m", "wan", tensors)
    with pytest.raises(MsQuantError, match=sentence):
        make(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nan_is_refused_and_a_finished_output_is_not_made_again(tmp_path: Path) -> None:
    tensors = tensors_of("wan")
    tensors["blocks.0.ffn.net.2.weight"][3, 4] = np.nan
    model = save_transformer(tmp_path / "m", "wan", tensors)
    with pytest.raises(MsQuantError, match=r"'blocks.0.ffn.net.2.weight' holds 1 NaN"):
        make(model, tmp_path / "out")
    good = save_transformer(tmp_path / "good", "wan")
    make(good, tmp_path / "done")
    with pytest.raises(MsQuantError, match="exists and it was made with scheme = 'W8A8_MXFP8'"):
        make(good, tmp_path / "done", "W4A4_MXFP4")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scheme": "W8A8"}, "scheme W8A8: no vllm-omni checkpoint .* expected one of W8A8_MXFP8"),
        ({"scheme": "W9"}, "scheme 'W9' is unknown"),
        ({"exclude": ("block.*",)}, r"pattern 'block.\*' matches no linear of a block"),
        ({"exclude": ("*",)}, "no linear is left to quantize"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of bfloat16, float16"),
        ({"scheme": "W4A4_MXFP4_DUALSCALE"}, "64 inputs, expected a multiple of 512"),
        (
            {"scheme": "W4A4_MXFP4_DUALSCALE", "scheme_options": {"dual_block_size": 64}},
            "dual_block_size is 64, expected 512",
        ),
        ({"scheme_options": {"group_size": 32}}, "takes no group_size"),
    ],
)
def test_options_that_do_not_go_are_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = save_transformer(tmp_path / "m", "wan")
    with pytest.raises(MsQuantError, match=sentence):
        make(model, tmp_path / "out", **options)


def test_undivided_linears_may_stay_float(tmp_path: Path) -> None:
    """As of Wan2.1-1.3B, whose MLP has 8960 values."""
    tensors = tensors_of("wan", scale=8, blocks=1)
    model = save_transformer(tmp_path / "m", "wan", tensors, 8, 1)
    config = json.loads((model / "config.json").read_text())
    tensors["blocks.0.ffn.net.2.weight"] = np.ones((512, 992), np.float32)
    tensors["blocks.0.ffn.net.0.proj.weight"] = np.ones((992, 512), np.float32)
    tensors["blocks.0.ffn.net.0.proj.bias"] = np.ones(992, np.float32)
    (model / "config.json").write_text(json.dumps({**config, "ffn_dim": 992}))
    save_tensors(model / "diffusion_pytorch_model.safetensors", tensors)
    result = make(model, tmp_path / "out", "W4A4_MXFP4_DUALSCALE", float_undivided=True)
    assert result["float_linears"] == {"blocks.*.ffn.net.2": "1, 992 inputs are no multiple of 512"}


def test_directories_that_are_something_else_are_refused(tmp_path: Path) -> None:
    pipe = save_pipeline(tmp_path / "pipe", transformer="wan")
    config, index = pipe / "transformer" / "config.json", pipe / "model_index.json"
    texts = config.read_text(), index.read_text()

    def refused(sentence: str) -> None:
        with pytest.raises(MsQuantError, match=sentence):
            make(pipe, tmp_path / "out")
        config.write_text(texts[0])
        index.write_text(texts[1])

    value = json.loads(texts[0])
    config.write_text(json.dumps({**value, "_class_name": "UNet2DConditionModel"}))
    refused("_class_name is 'UNet2DConditionModel', expected one of WanTransformer3DModel")
    config.write_text(json.dumps({**value, "quantization_config": {"quant_method": "fp8"}}))
    refused("has a quantization_config .'fp8'., expected a float model")
    config.write_text(json.dumps({**value, "num_layers": None}))
    refused("num_layers is None, expected a positive number")
    pairs = json.loads(texts[1])
    index.write_text(json.dumps({**pairs, "text_encoder": ["transformers", "UMT5EncoderModel"]}))
    refused("text_encoder: no such directory, expected the UMT5EncoderModel")
    del pairs["transformer"]
    index.write_text(json.dumps(pairs))
    refused("expected a transformer of one of the classes")
    (pipe / "vae" / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("vae/config.json: is a Git LFS pointer")
