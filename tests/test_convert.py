"""Checkpoints moved between formats: the same bytes there and back, or a reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

from ms_quant.errors import MsQuantError
from ms_quant.files.atomic import write_json
from ms_quant.files.sealed import seal
from ms_quant.formats.opening import open_model
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.options import split_options
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.schemes.table import SCHEMES
from ms_quant.verify.checkpoint import verify_checkpoint

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CALIBRATED = {"samples": 2, "seq_len": 16}


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, calib_text: Path) -> Callable[..., Any]:
    def run(scheme: str, format: str, model: dict | None = None, **options: Any) -> Path:
        source = tiny_model(**{"family": "qwen2", "layers": 2, **SHAPE, **(model or {})})
        settings = {name: options.pop(name, "") for name in ("smoothing_target", "kv_cache")}
        dtype, algorithm = options.pop("dtype", None), options.pop("algorithm", "minmax")
        choices = {**split_options(options), "formats": (format,), **settings}
        static = SCHEMES[scheme].needs_calibration or algorithm != "minmax"
        data = {"calib": calib_text, **CALIBRATED} if static or "C8" in settings.values() else {}
        request = QuantizeOptions(
            source,
            tmp_path / "one",
            scheme,
            algorithm,
            **choices,
            dtype=dtype,
            shard_bytes=60_000,
            exclude=("*.1.self_attn.o_proj",),
            **data,
        )
        run_job(request)
        return request.output

    return run


def dividing(linear: QuantizedLinear) -> QuantizedLinear:
    """Whether a runtime divides or multiplies goes with the format, not with the numbers."""
    if not isinstance(linear.activation, StaticActivation):
        return linear
    return replace(linear, activation=replace(linear.static, multiplied_in=None))


def assert_same_linears(one: Path, other: Path) -> None:
    ours, theirs = open_model(one), open_model(other)
    for path in ours.plan.quantized():
        first, second = dividing(ours.linear(path)), dividing(theirs.linear(path))
        x = np.random.default_rng(0).standard_normal((3, first.weight.shape[1]), np.float32)
        np.testing.assert_array_equal(first.weight, second.weight)
        if first.bias is None or not hasattr(first.activation, "folds_bias"):
            np.testing.assert_array_equal(first.forward(x), second.forward(x))
        else:  # a bias in whole steps, or in float
            np.testing.assert_allclose(first.forward(x), second.forward(x), atol=0.05)


ROUNDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("W8A8", "golden-stick", "ascend", {}),
    ("W8A8", "golden-stick", "mindie-sd", {"dtype": "float16"}),
    ("W8A8", "golden-stick", "ascend", {"smoothing_target": "norm", "algorithm": "smoothquant"}),
    ("W8A8", "ascend", "golden-stick", {"algorithm": "gptq"}),
    ("W8A8", "ascend", "mindie-sd", {"dtype": "float16"}),
    ("W8A8", "ascend", "mindie-sd", {"algorithm": "smoothquant"}),
    ("W8A8", "compressed-tensors", "ascend", {}),
    ("W8A8", "compressed-tensors", "golden-stick", {"algorithm": "histogram"}),
    ("W8A8", "compressed-tensors", "mindie-sd", {}),
    ("W8A8_DYNAMIC", "golden-stick", "ascend", {}),
    ("W8A8_DYNAMIC", "golden-stick", "compressed-tensors", {"algorithm": "clip"}),
    ("W8A8_DYNAMIC", "ascend", "mindie-sd", {"dtype": "float16"}),
    ("W8A16", "ascend", "compressed-tensors", {}),
    ("W8A16", "ascend", "compressed-tensors", {"symmetric": False}),
    ("W8A16", "compressed-tensors", "mindie-sd", {"dtype": "float16"}),
    ("W4A16", "compressed-tensors", "mindie-sd", {"group_size": 0}),
    ("W8A8FP8_DYNAMIC", "compressed-tensors", "ascend", {}),
    ("W8A8FP8_DYNAMIC", "ascend", "compressed-tensors", {}),
    ("W8A8FP8_DYNAMIC", "ascend", "compressed-tensors", {"dtype": "float16"}),
    ("W4A4_DYNAMIC", "mindie-sd", "ascend", {"model": {"family": "qwen3"}}),
    ("W8A8_MXFP8", "ascend", "mindie-sd", {"model": {"family": "llama", "biases": True}}),
    ("W8A8_MXFP8", "mindie-sd", "ascend", {"model": {"family": "llama", "biases": True}}),
    ("W4A4_MXFP4", "ascend", "mindie-sd", {"rule": "mxfp4_cann0"}),
]


@pytest.mark.parametrize(("scheme", "one", "other", "options"), ROUNDS)
def test_there_and_back(make, tmp_path, file_contents, scheme, one, other, options):
    first = make(scheme, one, **options)
    result = convert_checkpoint(first, tmp_path / "two", other)
    assert result.format == other and not result.finished_before
    assert verify_checkpoint(tmp_path / "two", tmp_path / "model").problems == ()
    assert_same_linears(first, tmp_path / "two")
    convert_checkpoint(tmp_path / "two", tmp_path / "three", one)
    assert file_contents(tmp_path / "three") == file_contents(first)
    again = convert_checkpoint(first, tmp_path / "two", other)
    assert again.finished_before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["ascend", "golden-stick"])
def test_scales_that_only_a_product_tells_are_proved(make, tmp_path, format, dtype):
    """The quotient of the product is one of a few neighbours; each gives the same outputs."""
    first = make("W8A8", format, dtype=dtype, model={"seed": 3})
    try:
        convert_checkpoint(first, tmp_path / "two", "compressed-tensors")
    except MsQuantError as error:
        assert "is not input_scale times scales" in str(error)
        return
    assert verify_checkpoint(tmp_path / "two", tmp_path / "model").problems == ()


@pytest.mark.parametrize(("one", "other"), [("golden-stick", "ascend"), ("ascend", "mindie-sd")])
def test_what_is_converted_is_what_would_have_been_made(make, tmp_path, file_contents, one, other):
    """Where both formats hold scales in one type, nothing tells how a checkpoint came to be."""
    first = make("W8A8_DYNAMIC", one)
    convert_checkpoint(first, tmp_path / "two", other)
    found = file_contents(tmp_path / "two")
    request = QuantizeOptions(
        tmp_path / "model",
        tmp_path / "made",
        "W8A8_DYNAMIC",
        formats=(other,),
        shard_bytes=60_000,
        exclude=("*.1.self_attn.o_proj",),
    )
    run_job(request)
    assert found == file_contents(tmp_path / "made")


@pytest.mark.parametrize(
    ("made", "other", "message"),
    [
        (("W8A8", "golden-stick", {}), "compressed-tensors", r"deq_scale: is not input_scale tim"),
        (("W8A8", "golden-stick", {"algorithm": "smoothquant"}), "ascend", r"0\.qkv: its smoothin"),
        (("W8A8", "mindie-sd", {"algorithm": "smoothquant"}), "ascend", r"is in the mul-scale; sm"),
        (("W8A8_DYNAMIC", "golden-stick", {"dtype": "float16"}), "ascend", r"not exact in float16"),
        (("W8A16", "ascend", {}), "golden-stick", r"W8A16: no golden-stick checkpoint can hold it"),
        (
            ("W8A16", "ascend", {"symmetric": False}),
            "mindie-sd",
            r"hold it only with group_siz",
        ),
        (("W8A16", "ascend", {"kv_cache": "C8"}), "compressed-tensors", r"no place for keys and v"),
        (("W8A16", "ascend", {}), "ascend", r"is of format ascend already, expected another"),
        (("W8A16", "ascend", {}), "gguf", r"format 'gguf' is unknown, expected one of golden-st"),
        (("W4A4_DYNAMIC", "ascend", {}), "mindie-sd", r"q_proj: MindIE-SD drops the bias of a W4"),
        (
            ("W4A4_DYNAMIC", "ascend", {"model": {"family": "qwen3"}}),
            "mindie-sd",
            r"weight_scale: \d+ of 64 values are not exact in bfloat16, which the other format st",
        ),
        (
            ("W8A8_MXFP8", "ascend", {}),
            "mindie-sd",
            r"0\.self_attn\.o_proj: MindIE-SD fails on a W8A8_MXFP8 linear without a bias in",
        ),
        (
            ("W8A8_DYNAMIC", "ascend", {"algorithm": "smoothquant"}),
            "golden-stick",
            r"bias: \d+ of \d+ values are not exact in bfloat16, which the other format stores",
        ),
    ],
)
def test_what_cannot_be_held_is_said(make, tmp_path, made, other, message):
    scheme, format, options = made
    first = make(scheme, format, **options)
    with pytest.raises(MsQuantError, match=message):
        convert_checkpoint(first, tmp_path / "two", other)
    left = {path.name for path in tmp_path.iterdir()} - {"calib.txt"}
    assert left == {"model", "one"}


def test_a_mixture_and_a_cache(make, tmp_path, file_contents):
    """Shards may be of another size; then only the names differ."""
    first = make("W8A8_DYNAMIC", "ascend")
    convert_checkpoint(first, tmp_path / "two", "compressed-tensors", shard_bytes=1 << 30)
    assert (tmp_path / "two" / "model-00001-of-00001.safetensors").exists()
    assert verify_checkpoint(tmp_path / "two", tmp_path / "model").problems == ()


def test_a_damaged_checkpoint_is_not_converted(make, tmp_path):
    first = make("W8A8", "golden-stick")
    path = first / "quantization_description.json"
    content = json.loads(path.read_text())
    content["model.norm.weight"] = "W8A8"
    path.write_text(json.dumps(content))
    with pytest.raises(MsQuantError, match=r"quantization_description\.json: "):
        convert_checkpoint(first, tmp_path / "two", "ascend")
    (first / "ms_quant.json").unlink()  # as if others had made it
    with pytest.raises(MsQuantError, match=r"model\.norm\.weight is 'W8A8', expected 'FLOAT'"):
        convert_checkpoint(first, tmp_path / "two", "ascend")


def test_a_flipped_byte_is_not_given_a_new_hash(make, tmp_path):
    first = make("W8A8_DYNAMIC", "golden-stick")
    path = sorted(first.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MsQuantError, match=r"sha256 differs"):
        convert_checkpoint(first, tmp_path / "two", "ascend")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm_options": [1]}, r"algorithm_options is \[1\], expected options by algorithm"),
        ({"algorithm_options": {"gptq": 5}}, r"algorithm_options is .* expected options by"),
        ({"algorithm": 5}, r"algorithm is 5, expected one of minmax"),
        ({"shard_bytes": "x"}, r"shard_bytes is 'x', expected a positive number"),
        ({"shard_bytes": [1]}, r"shard_bytes is \[1\], expected a positive number"),
        ({"fold": "there"}, r"fold is 'there', expected one of input-scale"),
        ({"mixed": 3, "scheme": "W8A16"}, r"scheme is 'W8A16', expected 'W8A8_DYNAMIC'"),
    ],
)
def test_a_record_that_is_none(make, tmp_path, changes, message):
    first = make("W8A8_DYNAMIC", "golden-stick")
    path = first / "ms_quant.json"
    content = json.loads(path.read_text())
    content["record"] |= changes
    content.pop("sha256")
    write_json(path, seal(content))
    with pytest.raises(MsQuantError, match=message):
        convert_checkpoint(first, tmp_path / "two", "ascend")
    assert not (tmp_path / "two").exists()
