"""The proof of a rank: each violation is one sentence; and the decoded form, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_quant.errors import MsQuantError
from ms_quant.models.names import block_prefix
from ms_quant.serve.records import ServeRequest
from sparse_compress.layouts import TARGETS
from sparse_compress.layouts.partition import shard
from sparse_compress.layouts.vllm_mindspore import DESCRIPTION, TARGET
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.serve.check import check_w8a8sc
from sparse_compress.serve.parameters import (
    flat_description,
    kind_problems,
    rank_parameters,
)
from sparse_compress.serve.rank import prove_rank

LAYER = "model.layers.0"
QKV, DOWN = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.down_proj"
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COMMAND = "sparse-compress run MODEL -o OUTPUT --calib TEXT --target vllm-mindspore --tp 2"
Make = Callable[..., Any]
Tensors = dict[str, np.ndarray]


def change_file(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def of_rank_1(name: str, change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda directory: change_file(directory / "rank_1" / name, change)


def flip(name: str, at: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(np.uint8)[at] ^= 1

    return change


def flip_file(directory: Path) -> None:
    """A norm's value: nothing but the record knows it."""
    change_file(directory / "rank_1" / LAST, lambda t: t["model.norm.weight"].__iadd__(1))


def other_lengths(directory: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["rank_1"][f"{QKV}.weight.shape"] = [1 << 40]

    change_json(directory / DESCRIPTION, change)


def other_kind(directory: Path) -> None:
    change = {f"{QKV}.weight": "W8A8"}
    change_json(directory / DESCRIPTION, lambda value: value["rank_1"].update(change))


def replaced(directory: Path) -> None:
    shutil.rmtree(directory / "rank_1")
    shutil.copytree(directory / "rank_0", directory / "rank_1")


def linked(directory: Path) -> None:
    shutil.rmtree(directory / "rank_1")
    (directory / "rank_1").symlink_to("rank_0")


def twice(directory: Path) -> None:
    shutil.copy(directory / "rank_1" / LAST, directory / "rank_1" / "zz.safetensors")


def huge(directory: Path) -> None:
    change_json(directory / "config.json", lambda value: value.update(intermediate_size=1 << 44))


VIOLATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing rank": (
        lambda d: shutil.rmtree(d / "rank_1"),
        r"has \['rank_0'\], expected \['rank_0', 'rank_1'\]",
    ),
    "one rank more": (
        lambda d: shutil.copytree(d / "rank_0", d / "rank_2"),
        r"has \['rank_0', 'rank_1', 'rank_2'\], expected",
    ),
    "rank 0 in place of rank 1": (
        replaced,
        rf"tensor '\S+.weight' is int8 \[\d+\], expected int8 \[\d+\] as {DESCRIPTION} gives "
        "rank_1; all lengths are those of rank_0",
    ),
    "linked rank": (linked, "rank_1: is a symbolic link, expected the directory of a rank"),
    "a file for a rank": (
        lambda d: [shutil.rmtree(d / "rank_1"), shutil.copy(d / "rank_0" / LAST, d / "rank_1")],
        "rank_1: is no directory, expected the directory of a rank",
    ),
    "empty rank": (
        lambda d: [path.unlink() for path in (d / "rank_1").iterdir()],
        "rank_1: holds no tensors",
    ),
    "missing tensor": (
        of_rank_1(FIRST, lambda t: t.pop(f"{DOWN}.deq_scale")),
        rf"tensor '{DOWN}.deq_scale' is missing, expected int64 \[320\]",
    ),
    "unknown tensor": (
        of_rank_1(FIRST, lambda t: t.update({f"{DOWN}.beta": np.zeros(3, np.float16)})),
        rf"unknown tensor '{DOWN}.beta', expected none",
    ),
    "wrong shape": (
        of_rank_1(FIRST, lambda t: t.update({f"{QKV}.input_scale": np.ones(1, np.float16)})),
        rf"tensor '{QKV}.input_scale': found float16 \[1\], expected float16 \[320\]",
    ),
    "wrong dtype": (
        of_rank_1(FIRST, lambda t: t.update({f"{QKV}.deq_scale": np.ones(512, np.float32)})),
        rf"tensor '{QKV}.deq_scale': found float32 \[512\], expected int64 \[512\]",
    ),
    "damaged index": (
        of_rank_1(FIRST, flip(f"{QKV}.index", 0)),
        rf"tensor '{QKV}.weight': tile \d",
    ),
    "damaged weight": (
        of_rank_1(FIRST, flip(f"{QKV}.weight", 40)),
        rf"tensor '{QKV}.weight': tile \d|{QKV}.quant_bias: \d+ of 512 values differ",
    ),
    "lengths of the description": (
        other_lengths,
        rf"tensor '{QKV}.weight' is int8 \[\d+\], expected int8 \[1099511627776\]",
    ),
    "kind of the description": (
        lambda d: change_json(
            d / DESCRIPTION, lambda v: v["rank_1"].update({f"{QKV}.weight": "W8A8"})
        ),
        f"rank_1: {QKV}.weight is 'W8A8', expected 'W8A8S'",
    ),
    "device of the description": (
        lambda d: change_json(d / DESCRIPTION, lambda v: v.update(device_type="910B")),
        "device_type is '910B', expected '310P'",
    ),
    "bias on every rank": (
        of_rank_1(FIRST, lambda t: t[f"{DOWN}.quant_bias"].__iadd__(1)),
        rf"{DOWN}.quant_bias: holds 320 values that are not 0, expected zeros",
    ),
    "scales that are none": (
        of_rank_1(FIRST, lambda t: t[f"{QKV}.deq_scale"].fill(-1)),
        rf"{QKV}.deq_scale: 512 of 512 values are not the bits of a positive finite float32",
    ),
    "zero points that differ": (
        of_rank_1(FIRST, lambda t: t[f"{DOWN}.input_offset"][:1].__iadd__(1)),
        f"{DOWN}.input_offset: holds different values",
    ),
    "another file than was written": (flip_file, "sha256 differs from ms_quant.json"),
    "two files with one tensor": (twice, r"zz.safetensors: holds tensor '\S+', expected it only"),
    "a huge model": (huge, "intermediate_size is 17592186044416, expected"),
    "a path in the record": (
        lambda d: change_json(
            d / "ms_quant.json",
            lambda v: v["files"].update({"rank_1/../../x": {"bytes": 1, "sha256": ""}}),
        ),
        "differs from its own sha256",
    ),
    "quantization in config.json": (
        lambda d: change_json(d / "config.json", lambda v: v.update(compression_config={})),
        "has compression_config, expected none",
    ),
}


@pytest.fixture
def copied(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make().output, tmp_path / "copied"))


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_one_sentence(copied: Path, name: str) -> None:
    """It names the rank, the tensor, what was found and expected, and the remedy."""
    damage, pattern = VIOLATIONS[name]
    damage(copied)
    with pytest.raises(MsQuantError, match=pattern) as caught:
        prove_rank(copied, TARGET, 1, 2)
    message = str(caught.value)
    assert message.startswith("rank_1: ")
    assert message.endswith(COMMAND)
    assert "\n" not in message
    served = check_w8a8sc(ServeRequest(copied, "vllm-mindspore", 2))
    assert served is not None
    assert any(re.search(pattern, problem) for problem in served.problems)


def test_a_rank_of_its_own(copied: Path) -> None:
    """What is wrong with the other rank's files does not matter to this one."""
    flip_file(copied)
    assert prove_rank(copied, TARGET, 0, 2).number == 0


def test_another_number_of_ranks(make: Make) -> None:
    with pytest.raises(
        MsQuantError, match=r"is made for 2 ranks, expected 4 as asked for; .* --tp 4$"
    ):
        prove_rank(make().output, TARGET, 1, 4)


def test_another_target(make: Make) -> None:
    with pytest.raises(MsQuantError, match="is a W8A8SC checkpoint for vllm-mindspore, expected "):
        prove_rank(make().output, TARGETS["vllm-ascend"], 0, 2)


def test_a_plain_checkpoint(tmp_path: Path, make: Make) -> None:
    """The error says what to use instead."""
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(make().output / "config.json", plain)
    (plain / "quantization_description.json").write_text("{}")
    with pytest.raises(
        MsQuantError, match=r"golden-stick checkpoint.*without --load-format sparse"
    ):
        prove_rank(plain, TARGET, 0, 2)


def test_informative_tensors_are_allowed(copied: Path) -> None:
    shutil.rmtree(copied / "proof")
    (copied / "ms_quant.json").unlink()
    change_file(
        copied / "rank_0" / FIRST, lambda t: t.update({f"{QKV}.info": np.zeros(5, np.int64)})
    )
    rank = prove_rank(copied, TARGET, 0, 2)
    assert f"{QKV}.info" not in rank_parameters(rank, decoded=False)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_stored_form_is_what_the_files_hold(make: Make, family: str, number: int) -> None:
    made = make({"family": family})
    rank = prove_rank(made.output, TARGET, number, 2)
    stored: Tensors = {}
    for path in sorted((made.output / f"rank_{number}").iterdir()):
        stored |= load_file(path)
    found = {name: p.make() for name, p in rank_parameters(rank, decoded=False).items()}
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant"])
def test_decoded_form_is_the_merged_checkpoint(make: Make, algorithm: str, number: int) -> None:
    """Slices of what the reader of whole checkpoints gives, bit for bit."""
    made = make(algorithm=algorithm)
    rank = prove_rank(made.output, TARGET, number, 2)
    found = {name: p.make() for name, p in rank_parameters(rank, decoded=True).items()}
    whole = open_w8a8sc(made.output)
    assert whole is not None
    for group, fused in rank.compressed():
        linears = []
        for member in group.members:
            linear = whole.linear(f"{block_prefix(0)}{member}")
            assert linear is not None
            linears.append((shard(group.linears[member], 2, number), linear))
        bias = np.int32(group.parallel == "column" or number == 0)
        expected = {
            "weight": np.concatenate([x.weight[w.rows, w.columns] for w, x in linears]),
            "deq_scale": np.concatenate([x.deq_scale[w.rows] for w, x in linears]),
            "quant_bias": np.concatenate(
                [x.quant_bias[w.rows] * np.int32(bias) for w, x in linears]
            ),
            "input_scale": linears[0][1].static.input_scale[linears[0][0].columns],
        }
        assert f"{fused}.index" not in found
        for suffix, array in expected.items():
            tensor = found[f"{fused}.{suffix}"]
            dtype = np.float16 if suffix == "input_scale" else array.dtype
            assert (tensor.dtype, tensor.shape) == (dtype, array.shape), (fused, suffix)
            assert tensor.astype(array.dtype).tobytes() == array.tobytes(), (fused, suffix)


def test_kinds_of_a_model(make: Make) -> None:
    rank = prove_rank(make().output, TARGET, 1, 2)
    ours = rank_parameters(rank, decoded=True)
    theirs = {name: parameter.kind for name, parameter in ours.items()}
    assert list(kind_problems(rank, ours, theirs)) == []
    theirs["model.norm.weight"] = ("bfloat16", (320,))
    theirs["extra.weight"] = ("float16", (3, 4))
    del theirs[f"{QKV}.deq_scale"]
    assert list(kind_problems(rank, ours, theirs)) == [
        "rank_1: tensor 'model.norm.weight' is float16 [320], expected bfloat16 [320] as the model "
        "has",
        "rank_1: tensor 'extra.weight' is missing, expected float16 [3, 4] as the model has",
        f"rank_1: tensor '{QKV}.deq_scale' is float32 [512], which the model has no parameter for",
    ]


def test_tied_head(make: Make) -> None:
    """A model that holds it as a parameter of its own gets the embedding."""
    rank = prove_rank(make({"tied": True}).output, TARGET, 0, 2)
    assert "lm_head.weight" not in rank_parameters(rank, decoded=True)
    found = rank_parameters(rank, decoded=False, head=True)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_flat_description(make: Make) -> None:
    """Every module has one value, and fused ones agree."""
    rank = prove_rank(make(exclude=("*.o_proj",)).output, TARGET, 0, 2)
    found = flat_description(rank.layout)
    assert found[f"{LAYER}.self_attn.q_proj.weight"] == "W8A8"
    assert found[f"{LAYER}.self_attn.q_proj.input_offset"] == "W8A8"
    assert found[f"{LAYER}.self_attn.o_proj.weight"] == "FLOAT"
    assert f"{LAYER}.self_attn.o_proj.deq_scale" not in found
    assert found["lm_head.weight"] == found["model.norm.weight"] == "FLOAT"
    modules: dict[str, set[str]] = {}
    for name, value in found.items():
        modules.setdefault(name.rpartition(".")[0], set()).add(value)
    assert all(len(values) == 1 for values in modules.values())
