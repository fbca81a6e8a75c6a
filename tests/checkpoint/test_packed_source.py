"""Packed integers of compressed-tensors, read as the float model that they stand for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from encoded import KIMI, edit_config, packed

from ms_quant.errors import MsQuantError
from ms_quant.files.first_pass import read_source
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.float_model import model_notes, open_float
from ms_quant.formats.float_source import open_source
from ms_quant.pipeline.convert import convert_checkpoint

Tensors = dict[str, np.ndarray]
BF16 = np.dtype(ml_dtypes.bfloat16)
OTHERS = Path(__file__).parents[1] / "golden" / "others"
EXPERT = "model.layers.1.mlp.experts.0.down_proj"
P, S, SHAPE = (f"{EXPERT}.weight_{part}" for part in ("packed", "scale", "shape"))


def tensors_of(rows: int = 5, columns: int = 96, seed: int = 0) -> tuple[Tensors, np.ndarray]:
    """An expert's stored tensors, and its weight."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (rows, columns))
    scale = np.exp(rng.standard_normal((rows, columns // 32))).astype(BF16)
    weight = codes.astype("f4") * scale.astype("f4").repeat(32, axis=1)
    return {P: packed(codes), S: scale, SHAPE: np.array([rows, columns])}, weight


@pytest.fixture
def make(tmp_path: Path, save_tensors: Callable[[Path, Tensors], None]) -> Callable[..., Any]:
    def run(tensors: Tensors, entry: dict[str, Any] = KIMI) -> Checkpoint:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
        save_tensors(tmp_path / "model.safetensors", tensors)
        return open_source(tmp_path)

    return run


@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (1, 32), (300, 64)])
def test_experts_are_what_their_codes_and_scales_say(
    rows: int, columns: int, make: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    tensors, weight = tensors_of(rows, columns)
    gate = np.ones((4, 4), BF16)
    checkpoint = make({**tensors, "model.layers.1.mlp.gate.weight": gate})
    name = f"{EXPERT}.weight"
    assert checkpoint.names == [name, "model.layers.1.mlp.gate.weight"]
    assert checkpoint.info(name).shape == weight.shape
    np.testing.assert_array_equal(checkpoint.read_float32(name), weight)
    parts = [part for _, part in checkpoint.float32_chunks(name, 2 * columns)]
    assert all(len(part) <= 2 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), weight)
    (_, last), *_ = checkpoint.float_chunks(name, slice(rows - 1, rows))
    np.testing.assert_array_equal(last, weight[-1:])
    assert set(read_source(checkpoint, tmp_path).digests) == {*tensors, checkpoint.names[1]}


def test_a_checkpoint_of_llm_compressor_is_what_the_library_decompresses(tmp_path: Path) -> None:
    source, copy = OTHERS / "llm_compressor_w4a16", tmp_path / "float"
    convert_checkpoint(source, copy, "float")
    expected = json.loads((source / "expected.json").read_text())["weights"]
    checkpoint = open_float(copy).checkpoint
    found = {
        path: hashlib.sha256(checkpoint.read(f"{path}.weight").tobytes()).hexdigest()
        for path in expected
    }
    assert found == expected and "quantization_config" not in (copy / "config.json").read_text()
    notes = model_notes(*open_float(source))
    assert notes[0].startswith(f"{source}: 7 weights are stored as int4 in groups of 32; they are")


def test_zero_points_of_old_versions_are_zero(
    make: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    tensors, weight = tensors_of()
    zeros = {f"{EXPERT}.weight_zero_point": np.zeros((5, 3), np.int8)}
    checkpoint = make({**tensors, **zeros})
    np.testing.assert_array_equal(checkpoint.read_float32(f"{EXPERT}.weight"), weight)
    zeros[f"{EXPERT}.weight_zero_point"][2, 1] = 1
    checkpoint = make({**tensors, **zeros})
    with pytest.raises(MsQuantError, match="weight_zero_point' holds 1 values that are not 0"):
        read_source(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(S), f"'{P}' and no '{S}', expected both"),
        (lambda t: t.pop(SHAPE), f"'{P}' and no '{SHAPE}', expected both"),
        (lambda t: t.pop(P), f"'{S}' and no '{P}', expected both"),
        (lambda t: t.update({P: t[P].astype(np.int64)}), rf"'{P}' is I64 \[5, 12\], expected I32"),
        (
            lambda t: t.update({S: t[S][:, :2]}),
            rf"'{S}' is BF16 \[5, 2\], expected .* \[5, 3\]",
        ),
        (lambda t: t.update({P: t[P][:, :11]}), f"'{P}' has 88 inputs, expected a multiple of"),
        (
            lambda t: t.update({f"{EXPERT}.weight": np.ones((5, 96), BF16)}),
            f"'{EXPERT}.weight', expected it only as '{P}'",
        ),
    ],
)
def test_what_headers_show_is_refused_at_once(
    change: Callable[[Tensors], object], message: str, make: Callable[..., Checkpoint]
) -> None:
    tensors, _ = tensors_of()
    change(tensors)
    with pytest.raises(MsQuantError, match=rf"^.*\.safetensors: .*{message}"):
        make(tensors)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_a_scale_that_is_no_positive_number_is_named(
    value: float, make: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    tensors, _ = tensors_of()
    tensors[S][4, 2] = value
    checkpoint = make(tensors)
    with pytest.raises(MsQuantError, match=f"'{S}' holds 1 scales of 15"):
        checkpoint.read_float32(f"{EXPERT}.weight")
    message = "" if np.isfinite(value) else "|1 NaN or infinite values of 15"
    with pytest.raises(MsQuantError, match=f"'{S}' holds (1 scales of 15{message})"):
        read_source(checkpoint, tmp_path)


def test_another_shape_than_the_words_have_is_named(
    make: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    tensors, _ = tensors_of()
    tensors[SHAPE] = np.array([5, 95])
    checkpoint = make(tensors)
    with pytest.raises(MsQuantError, match=rf"'{SHAPE}' is \[5, 95\], expected \[5, 96\]"):
        checkpoint.read_float32(f"{EXPERT}.weight")
    with pytest.raises(MsQuantError, match=rf"'{SHAPE}' is \[5, 95\]"):
        read_source(checkpoint, tmp_path)


def weights(change: dict[str, Any]) -> dict[str, Any]:
    group = KIMI["config_groups"]["group_0"]
    return {
        **KIMI,
        "config_groups": {"group_0": {**group, "weights": {**group["weights"], **change}}},
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**KIMI, "format": "int-quantized"},
            "format is 'int-quantized', expected 'pack-quantized'",
        ),
        ({**KIMI, "ignore": ["re:.*experts.*"]}, f"ignores '{EXPERT}', expected not to"),
        (weights({"symmetric": False}), f"'{EXPERT}' is W4A16, expected symmetric packed weights"),
        (weights({"actorder": "group"}), "actorder is 'group', expected null"),
        (weights({"num_bits": 3}), "num_bits is 3, expected 8 or 4"),
    ],
)
def test_other_encodings_are_refused(
    entry: dict[str, Any], message: str, make: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(MsQuantError, match=rf"config\.json: .*{message}"):
        make(tensors_of()[0], entry)


@pytest.mark.parametrize("name", ["llm_compressor_fp8_block", "llm_compressor_w8a8"])
def test_what_is_no_encoding_of_a_float_model_is_refused(name: str) -> None:
    with pytest.raises(MsQuantError, match=r"format is .*, expected 'pack-quantized' of a model"):
        open_float(OTHERS / name)


def test_the_ignored_linears_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(OTHERS / "llm_compressor_w4a16", source)
    edit_config(source, lambda c: c["quantization_config"]["ignore"].append("re:.*visual.*"))
    assert open_float(source).checkpoint.info("lm_head.weight").code == "BF16"
