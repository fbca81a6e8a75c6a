"""W8A8S directories of known models for the ranks of a runtime: the same files that run writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ms_quant.errors import MsQuantError
from sparse_compress.cli import app
from sparse_compress.msmodelslim.compress import check, compress
from sparse_compress.msmodelslim.decompress import check as check_coded
from sparse_compress.msmodelslim.decompress import decompress as run_decompression
from sparse_compress.pipeline.info import info
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.verify.checkpoint import verify

WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8s.safetensors", "quant_model_description_w8a8s.json"
LAYER = "model.layers.0"
KEY = f"{LAYER}.self_attn.k_proj"
RANKS = [("vllm-mindspore", 1), ("vllm-mindspore", 2), ("vllm-ascend", 1), ("vllm-ascend", 2)]
Make = Callable[..., Any]


def decompress(coded: Path, output: Path) -> dict[str, Any]:
    return run_decompression(check_coded(coded, output, 2))


Tensors = dict[str, np.ndarray]


def unchanged(tensors: Tensors) -> None:
    pass


@pytest.fixture
def made_for(make: Make) -> Make:
    def one(target: str, tp: int, **model: Any) -> Any:
        return make({"vocab_size": 320, "change": unchanged, **model}, tp=tp, target=target)

    return one


@pytest.fixture
def plain(made_for: Make, tmp_path: Path) -> Callable[..., Path]:
    """A W8A8S directory; ``change`` edits its tensors and description."""

    def one(change: Callable[[Tensors, dict[str, Any]], Any] | None = None, **model: Any) -> Path:
        directory = tmp_path / "plain"
        decompress(made_for("msmodelslim", 1, **model).output, directory)
        if change is not None:
            tensors = load_file(directory / WEIGHTS)
            types = json.loads((directory / DESCRIPTION).read_text())
            change(tensors, types)
            (directory / WEIGHTS).unlink()
            save_file(tensors, directory / WEIGHTS)
            (directory / DESCRIPTION).write_text(json.dumps(types))
        return directory

    return one


@pytest.mark.parametrize(("target", "tp"), RANKS)
def test_the_files_are_those_that_run_writes(
    made_for: Make, plain: Make, tmp_path: Path, file_contents: Make, target: str, tp: int
) -> None:
    source, output = plain(), tmp_path / "out"
    result = compress(check(source, output, 2, target, tp))
    assert (result.summary.format, result.summary.target) == (f"W8A8SC TP{tp}", target)
    ours, theirs = file_contents(output), file_contents(made_for(target, tp).output)
    own = {"ms_quant.json", "proof/block-00000.proof"}
    assert ours.keys() | own == theirs.keys()
    for name in ours.keys() - own:
        assert ours[name] == theirs[name], name
    assert len(info(output)["rows"]) == 4 * tp
    found = verify(output, source)
    assert found.problems == () and found.checked["compared"] == 7
    decompress(output, tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_a_folded_bias_comes_out_again(made_for: Make, plain: Make, tmp_path: Path) -> None:
    source, output = plain(family="qwen2"), tmp_path / "out"
    compress(check(source, output, 2, "vllm-mindspore", 2))
    assert verify(output, source).problems == ()
    ours = open_w8a8sc(output).linear(KEY)
    theirs = open_w8a8sc(made_for("vllm-mindspore", 2, family="qwen2").output).linear(KEY)
    # Half a step of folding, and two roundings to float16.
    most = 0.5 * theirs.deq_scale + np.abs(theirs.bias) * 2.0**-10
    assert ours.bias.any() and (np.abs(ours.bias - theirs.bias) <= most).all()


def test_floats_and_tied_heads(plain: Make, tmp_path: Path) -> None:
    source, output = plain(tied=True), tmp_path / "out"
    compress(check(source, output, 2, "vllm-mindspore", 2))
    assert verify(output, source).problems == ()


def test_a_group_that_is_float_stays_so(plain: Make, tmp_path: Path) -> None:
    path = f"{LAYER}.self_attn.o_proj"

    def change(tensors: Tensors, types: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(path)]:
            del tensors[name], types[name]
        tensors[f"{path}.weight"] = np.ones((320, 768), np.float16)
        types[f"{path}.weight"] = "FLOAT"

    source, output = plain(change), tmp_path / "out"
    result = compress(check(source, output, 2, "vllm-ascend", 2))
    assert result.summary.uncompressed == {path: f"is float in {DESCRIPTION}"}
    assert verify(output, source).problems == ()


def test_an_interrupted_one_goes_on(plain: Make, tmp_path: Path, file_contents: Make) -> None:
    source = plain()
    compress(check(source, tmp_path / "whole", 1, "vllm-ascend", 2))

    def stop(step: str, part: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(check(source, tmp_path / "out", 2, "vllm-ascend", 2), stop)
    compress(check(source, tmp_path / "out", 2, "vllm-ascend", 2))
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "whole")
    assert compress(check(source, tmp_path / "out", 2, "vllm-ascend", 2)).finished_before


def put(name: str, array: Any, place: int = 0) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, types: tensors[name].__setitem__(place, array)


def make_float(tensors: Tensors, types: dict[str, Any]) -> None:
    for suffix in ("deq_scale", "quant_bias", "input_scale", "input_offset"):
        del tensors[f"{KEY}.{suffix}"], types[f"{KEY}.{suffix}"]
    tensors[f"{KEY}.weight"] = np.ones((128, 320), np.float16)
    types[f"{KEY}.weight"] = "FLOAT"


def add(tensors: Tensors, types: dict[str, Any]) -> None:
    tensors["visual.weight"], types["visual.weight"] = np.ones(3, np.float16), "FLOAT"


def single(tensors: Tensors, types: dict[str, Any]) -> None:
    tensors[f"{KEY}.input_scale"] = tensors[f"{KEY}.input_scale"].astype("f4") * (1 + 2**-14)


REFUSED: list[tuple[Any, str, int, str]] = [
    (put(f"{KEY}.input_scale", 0.5), "vllm-ascend", 2, "q_proj and model.layers.0.self_attn.k_pr"),
    (put(f"{KEY}.input_offset", 9), "vllm-ascend", 2, "expected one input_scale and input_offset"),
    (make_float, "vllm-mindspore", 2, "expected one type in the description: the runtime fuses"),
    (put(f"{KEY}.input_scale", 0), "vllm-ascend", 2, "k_proj.input_scale' is 0, expected a normal"),
    (single, "vllm-ascend", 2, "expected a normal float16"),
    (put(f"{KEY}.input_offset", 0.5), "vllm-ascend", 2, "input_offset' is 0.5, expected an int8"),
    (add, "vllm-ascend", 2, "'visual.weight' is not a tensor of a W8A8S qwen3 model of 1 layers"),
    (None, "vllm-ascend", 4, "tp is 4, expected a divisor of num_key_value_heads, which is 2"),
    (None, "vllm-mindspore", 5, "tp is 5, expected a divisor of num_attention_heads, which is 12"),
    (None, "vllm-mindspore", 4, "o_proj: k = 192 input channels; a compressed linear needs more"),
    (None, "msmodelslim", 2, "target msmodelslim is not split over ranks, tp is 2, expected 1"),
    (None, "mindie", 1, "target mindie cannot hold family qwen3"),
    (None, "x", 1, "target 'x' is unknown, expected one of vllm-mindspore"),
    (
        lambda tensors, types: tensors.update({"model.norm.weight": np.ones(3, np.float16)}),
        "vllm-ascend",
        2,
        "tensor 'model.norm.weight' has shape [3], expected [320]",
    ),
    (
        lambda tensors, types: tensors.update({f"{KEY}.input_scale": np.ones(2, np.float16)}),
        "vllm-ascend",
        2,
        "k_proj.input_scale' is F16 [2], expected F16 or F32 [1]",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_ranks_cannot_hold_is_refused_before_any_work(
    plain: Make, tmp_path: Path, number: int
) -> None:
    change, target, tp, message = REFUSED[number]
    source = plain(change)
    with pytest.raises(MsQuantError) as caught:
        check(source, tmp_path / "out", 2, target, tp)
    assert message in str(caught.value), str(caught.value)
    assert list(tmp_path.glob("out*")) == []


def test_a_bias_that_the_model_has_not_is_refused(plain: Make, tmp_path: Path) -> None:
    source = plain(put(f"{KEY}.quant_bias", 77777, 5))
    with pytest.raises(MsQuantError, match=r"k_proj\.quant_bias': 1 of 128 values differ from -in"):
        compress(check(source, tmp_path / "out", 2, "vllm-ascend", 2))
    assert list(tmp_path.glob("out*")) == []


def test_a_changed_source_or_tile_is_found(plain: Make, tmp_path: Path, damage: Make) -> None:
    source, output = plain(), tmp_path / "out"
    compress(check(source, output, 2, "vllm-ascend", 2))
    tensors = load_file(source / WEIGHTS)
    name = f"{LAYER}.mlp.up_proj"
    tensors[f"{name}.weight"][0, :2] += 1
    weight = tensors[f"{name}.weight"].astype(np.int64)
    offset = int(tensors[f"{name}.input_offset"][0])
    tensors[f"{name}.quant_bias"] = (-offset * weight.sum(axis=1)).astype(np.int32)
    tensors["model.norm.weight"][3] += 1
    (source / WEIGHTS).unlink()
    save_file(tensors, source / WEIGHTS)
    problems = verify(output, source).problems
    assert list(problems) == [
        f"{name}.weight: 2 of 409600 values differ from {source}",
        "model.norm.weight: 1 of 320 values differ from the source's as float16",
    ]
    path = output / "model-rank-1-part-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert any("was changed" in problem for problem in verify(output).problems)
    shutil.rmtree(output)


def test_the_command(plain: Make, tmp_path: Path) -> None:
    source, output = plain(), tmp_path / "out"
    arguments = ["compress", str(source), "-o", str(output), "--target=vllm-ascend", "--tp=2"]
    done = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    plan = json.loads(done.stdout)
    assert (plan["target"], len(plan["compressed"])) == ("vllm-ascend", 4) and not output.exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    done = CliRunner().invoke(app, ["verify", str(output), "--source", str(source), "--json"])
    assert json.loads(done.stdout)["checked"]["tiles"] > 0
