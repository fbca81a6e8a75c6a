"""Commands on a model in FP8: what they do with the float32 model that it stands for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from encoded import (
    KIMI,
    Tensors,
    as_float,
    edit_config,
    make_twins,
    maker,
    pack_experts,
)
from killed import KILLED_AT_RENAME
from routed_models import DEEPSEEK, save_routed

from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.files.float8_source import Float8Blocks
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.companions import model_config
from ms_quant.formats.float_model import open_float
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import open_model
from ms_quant.models.config import load_config
from ms_quant.pipeline import float_copy
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.verify.checkpoint import verify_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
CALIBRATED = {"samples": 2, "seq_len": 16}
Q = "model.layers.0.self_attn.q_proj"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}

Twins = Callable[..., tuple[Path, Path]]


@pytest.fixture
def twins(
    tiny_model: Callable[..., Path],
    load_tensors: Callable[[Path], Tensors],
    save_tensors: Callable[[Path, Tensors], None],
) -> Twins:
    """A tiny model in FP8, and the float32 tensors that it stands for."""

    def make(model: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Path]:
        return make_twins(tiny_model(**(model or {})), load_tensors, save_tensors, **options)

    return make


def weight_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


STORED = [
    {"scale": "F32"},
    {"scale": "BF16", "apart": True},
    {"scale": "F8_E8M0", "suffix": "scale"},
    {"scale": "U8", "apart": True, "block": (128, 128)},
    {"scale": "F32", "powers": True, "block": (1, 3)},
]


@pytest.mark.parametrize("options", STORED)
@pytest.mark.parametrize("model", [{}, {"family": "llama", "biases": True, "shards": 3}])
def test_the_output_is_that_of_the_float32_model(
    model: dict[str, Any], options: dict[str, Any], twins: Twins, tmp_path: Path
) -> None:
    outputs = []
    for source in twins(model, **options):
        output = tmp_path / f"{source.name}-out"
        run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC", exclude=("*o_proj",)))
        outputs.append(output)
        found = verify_checkpoint(output, source)
        assert found.problems == () and found.made_again == found.quantized
    assert weight_files(outputs[0]) == weight_files(outputs[1])
    assert "quantization_config" not in json.loads((outputs[0] / "config.json").read_text())
    names = Checkpoint(outputs[0]).names
    assert not [name for name in names if name.endswith(("_scale_inv", ".scale"))]
    kept = Checkpoint(outputs[0]).info("model.layers.0.self_attn.o_proj.weight")
    assert kept.code == "BF16"


JOBS: list[tuple[str, str, dict[str, Any]]] = [
    ("W8A8", "osl", {}),
    ("W8A8_DYNAMIC", "quarot", {}),
    ("W4A16", "gptq", {"formats": ("compressed-tensors",), "scheme_options": {"group_size": 32}}),
]


@pytest.mark.parametrize(("scheme", "algorithm", "more"), JOBS)
def test_calibrated_outputs_are_those_of_the_float32_model(
    scheme: str,
    algorithm: str,
    more: dict[str, Any],
    twins: Twins,
    calib_text: Path,
    tmp_path: Path,
) -> None:
    outputs = []
    for source in twins(WIDE):
        output = tmp_path / f"{source.name}-out"
        data = {} if algorithm == "quarot" else {"calib": calib_text, **CALIBRATED}
        run_job(QuantizeOptions(source, output, scheme, algorithm, **data, **more))
        assert verify_checkpoint(output, source).problems == ()
        outputs.append(output)
    assert weight_files(outputs[0]) == weight_files(outputs[1])


def test_evaluation_and_generation_are_those_of_the_float32_model(
    twins: Twins, calib_text: Path
) -> None:
    results = []
    for source in twins():
        model = open_model(source)
        windows = eval_windows(calib_text, source, 16, 4, print)
        found = perplexity(model, windows).loss
        tokens = list(Generator(model).generate(np.arange(5, 8), 6))
        results.append((found, tokens))
    assert results[0] == results[1]


def test_float_tensors_are_not_decoded_to_see_that_they_fit(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run of a large model would take minutes; its scales bound its weights."""
    source, _ = twins()
    monkeypatch.setattr(Float8Blocks, "rows", lambda *_: pytest.fail("decoded"))
    options = QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC", exclude=("*o_proj",))
    for dtype in ("bfloat16", "float16"):
        prepare(replace(options, dtype=dtype))


def test_a_float_tensor_that_does_not_fit_is_refused_before_work(
    twins: Twins, load_tensors: Callable[[Path], Tensors], tmp_path: Path, save_tensors: Any
) -> None:
    source, _ = twins()
    tensors = load_tensors(source)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[f"{name}_scale_inv"][0, 0] = 1e6
    save_tensors(source / "model.safetensors", tensors)
    options = QuantizeOptions(
        source, tmp_path / "out", "W8A8_DYNAMIC", dtype="float16", exclude=("*o_proj",)
    )
    with pytest.raises(MsQuantError, match=rf"'{name}': .* does not fit float16"):
        prepare(options)


def test_inspect_says_how_weights_are_stored(twins: Twins) -> None:
    source, _ = twins(scale="BF16", apart=True)
    found = inspect_checkpoint(source)
    assert found["format"] == "float" and found["files"] == 2
    assert {row["stored_as"] for row in found["linears"]} == {"F8_E4M3"}
    assert found["F8_E4M3_bytes"] == sum(np.prod(row["shape"]) for row in found["linears"])


def test_a_nan_code_ends_the_job_before_any_block(
    twins: Twins, load_tensors: Callable[[Path], Tensors], tmp_path: Path, save_tensors: Any
) -> None:
    source, _ = twins()
    tensors = load_tensors(source)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].view(np.uint8)[3, 4] = 0x7F
    save_tensors(source / "model.safetensors", tensors)
    worked: list[int] = []
    options = QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC")
    with pytest.raises(MsQuantError, match=f"'{name}' holds 1 NaN or infinite values"):
        run_job(options, lambda index, part: worked.append(index))
    assert worked == [] and not options.output.exists() and not options.job_directory.exists()


class StopError(Exception):
    pass


def stop(index: int, part: float) -> None:
    if index == 1 and part:
        raise StopError


def test_a_changed_scale_is_not_mixed_in(
    twins: Twins, load_tensors: Callable[[Path], Tensors], tmp_path: Path, save_tensors: Any
) -> None:
    source, _ = twins(apart=True)
    options = QuantizeOptions(source, tmp_path / "out", "W8A8_DYNAMIC")
    with pytest.raises(StopError):
        run_job(options, stop)
    apart = source / "model-scales.safetensors"
    scales = {k: v for k, v in load_tensors(source).items() if k.endswith("_scale_inv")}
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    scales[name][0, 0] *= 2
    save_tensors(apart, scales)
    with pytest.raises(MsQuantError, match=r"source|changed since the job was begun"):
        run_job(options)
    assert not options.output.exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_float_copy_has_each_weight_rounded_once(
    dtype: str, twins: Twins, load_tensors: Callable[[Path], Tensors], tmp_path: Path
) -> None:
    source, plain = twins({"dtype": dtype, "shards": 2}, apart=True)
    copy = tmp_path / "copy"
    made = convert_checkpoint(source, copy, "float", shard_bytes=20_000)
    assert (made.format, made.scheme, made.finished_before) == ("float", "FLOAT", False)
    stored, expected, found = map(load_tensors, (source, plain, copy))
    assert found.keys() == expected.keys() and len(weight_files(copy)) > 1
    wanted = np.dtype(np.float16) if dtype == "float16" else BF16
    for name, array in expected.items():
        encoded = stored[name].dtype == ml_dtypes.float8_e4m3fn
        exact = array.astype(wanted) if encoded else array
        assert (found[name].dtype, found[name].tobytes()) == (exact.dtype, exact.tobytes()), name
    config = json.loads((copy / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == wanted.name
    assert "quantization_config" not in json.dumps(config)
    tokenizer = (source / "tokenizer.json").read_bytes()
    assert (copy / "tokenizer.json").read_bytes() == tokenizer
    assert convert_checkpoint(source, copy, "float", shard_bytes=20_000).finished_before


def test_the_text_model_of_a_larger_one_says_nothing_of_its_encoding_either(
    twins: Twins,
) -> None:
    config = load_config(twins()[0])
    inner = {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 16}
    written = model_config(replace(config, raw={**config.raw, "text_config": inner}), BF16)
    assert written["text_config"] == {"hidden_size": 16}
    assert "quantization_config" in config.raw and "quantization_config" not in written


def test_what_is_float32_in_a_mixture_of_experts_stays_so(
    load_tensors: Callable[[Path], Tensors], tmp_path: Path
) -> None:
    model, source = save_routed(tmp_path / "model", DEEPSEEK), tmp_path / "fp8"
    maker.make_fp8_source(model, source, maker.Options(block=(24, 20), apart=True))
    convert_checkpoint(source, tmp_path / "copy", "float")
    stored, found = load_tensors(source), load_tensors(tmp_path / "copy")
    expected = as_float(stored, (24, 20))
    assert found.keys() == expected.keys() == load_tensors(model).keys()
    for name, array in expected.items():
        encoded = stored[name].dtype == ml_dtypes.float8_e4m3fn
        exact = array.astype(BF16) if encoded else array
        assert (found[name].dtype, found[name].tobytes()) == (exact.dtype, exact.tobytes()), name
    matrices = [n for n, t in stored.items() if t.ndim == 2 and t.dtype == BF16]
    ends = ("mlp.gate", "eh_proj", "head", "embed_tokens")
    assert matrices and all(
        name.endswith(tuple(f"{end}.weight" for end in ends)) for name in matrices
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert found[bias].dtype == np.float32


def test_experts_in_int4_are_read_beside_float_linears(
    load_tensors: Callable[[Path], Tensors], save_tensors: Any, tmp_path: Path
) -> None:
    source = save_routed(tmp_path / "model", DEEPSEEK)
    stored, exact = pack_experts(load_tensors(source))
    save_tensors(source / "model.safetensors", stored)
    edit_config(source, lambda c: c.update(quantization_config=KIMI))
    checkpoint = open_float(source).checkpoint
    assert checkpoint.names == sorted(exact)
    for name, array in exact.items():
        np.testing.assert_array_equal(checkpoint.read_float32(name), array.astype(np.float32))
    convert_checkpoint(source, tmp_path / "copy", "float")
    found = load_tensors(tmp_path / "copy")
    assert found.keys() == exact.keys()
    assert all(
        found[name].tobytes() == (array.astype(BF16) if ".experts." in name else array).tobytes()
        for name, array in exact.items()
    )


def test_a_float_copy_goes_on_where_it_was_killed(
    twins: Twins, tmp_path: Path, package_environment: dict[str, str]
) -> None:
    source, _ = twins()
    script = KILLED_AT_RENAME + (
        "from ms_quant.pipeline.convert import convert_checkpoint\n"
        "convert_checkpoint(model, output, 'float', shard_bytes=20_000)\n"
    )
    output = tmp_path / "copy"
    arguments = [str(source), "", str(output), "3"]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], env=package_environment)
    assert ended.returncode == -9 and not output.exists()
    left = weight_files(output.with_name("copy.partial"))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy.partial").iterdir()}
    convert_checkpoint(source, output, "float", shard_bytes=20_000)
    assert left and left.items() < weight_files(output).items()
    assert all((output / name).stat().st_mtime_ns == times[name] for name in left)


def test_a_float_copy_is_read_like_any_float_model(twins: Twins, tmp_path: Path) -> None:
    source, _ = twins(powers=True)  # whose products bfloat16 holds
    convert_checkpoint(source, tmp_path / "copy", "float")
    for model in (source, tmp_path / "copy"):
        run_job(QuantizeOptions(model, tmp_path / f"{model.name}-out", "W8A8_DYNAMIC"))
    assert weight_files(tmp_path / "fp8-out") == weight_files(tmp_path / "copy-out")


def test_a_float_copy_of_what_is_float_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(MsQuantError, match="its weights are float already, expected a model in"):
        convert_checkpoint(tiny_model(), tmp_path / "copy", "float")
    assert not (tmp_path / "copy").exists()


def test_a_float_copy_does_not_begin_on_a_full_disk(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[Path, int] = {}
    monkeypatch.setattr(float_copy, "free_spaces_check", wanted.update)
    made = convert_checkpoint(twins()[0], tmp_path / "copy", "float")
    assert wanted == {tmp_path / "copy.partial": made.tensor_bytes}


def test_a_bad_scale_leaves_no_float_copy(
    twins: Twins, load_tensors: Callable[[Path], Tensors], tmp_path: Path, save_tensors: Any
) -> None:
    source, _ = twins()
    tensors = load_tensors(source)
    tensors[f"{Q}.weight_scale_inv"][0, 0] = np.nan
    save_tensors(source / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=f"'{Q}.weight_scale_inv' holds 1 scales of"):
        convert_checkpoint(source, tmp_path / "copy", "float")
    assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.partial").exists()


def test_an_fp8_tensor_without_an_entry_is_refused(twins: Twins) -> None:
    source, _ = twins()
    edit_config(source, lambda c: c.pop("quantization_config"))
    with pytest.raises(MsQuantError, match=r"weight_scale_inv' and 14 such tensors.*FP8 in blocks"):
        open_model(source)


def test_the_names_of_a_base_model_get_their_prefix(
    twins: Twins, load_tensors: Callable[[Path], Tensors], save_tensors: Any
) -> None:
    source, plain = twins()
    shutil.rmtree(source.with_name("model"))
    for directory in (source, plain):
        tensors = load_tensors(directory)
        bare = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
        save_tensors(directory / "model.safetensors", bare)
    one, other = (open_model(directory) for directory in (source, plain))
    np.testing.assert_array_equal(one.tensor(f"{Q}.weight"), other.tensor(f"{Q}.weight"))
