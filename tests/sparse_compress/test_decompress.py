"""Checkpoints of ranks merged into one W8A8S directory with the model's own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_quant.errors import MsQuantError
from sparse_compress.msmodelslim.compress import check, compress
from sparse_compress.msmodelslim.decompress import check as check_coded
from sparse_compress.msmodelslim.decompress import decompress as run_decompression
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.verify.checkpoint import verify

WEIGHTS, CODED = "quant_model_weight_w8a8s.safetensors", "quant_model_weight_w8a8sc.safetensors"
DESCRIPTION = "quant_model_description_w8a8s.json"
LAYER = "model.layers.0"
RANKS = [("vllm-mindspore", 1), ("vllm-mindspore", 2), ("vllm-ascend", 1), ("vllm-ascend", 2)]
Make = Callable[..., Any]


def decompress(coded: Path, output: Path) -> dict[str, Any]:
    return run_decompression(check_coded(coded, output, 2))


def unchanged(tensors: dict[str, np.ndarray]) -> None:
    pass


@pytest.fixture
def make_for(make: Make) -> Make:
    def one(target: str, tp: int, model: dict[str, Any] | None = None, **options: Any) -> Any:
        keys = {"vocab_size": 320, "change": unchanged, **(model or {})}
        return make(keys, tp=tp, target=target, **options)

    return one


def same(first: Path, second: Path) -> None:
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize(("target", "tp"), RANKS)
def test_every_target_gives_the_same_directory(
    make_for: Make, tmp_path: Path, target: str, tp: int
) -> None:
    decompress(make_for("msmodelslim", 1).output, tmp_path / "whole")
    result = decompress(make_for(target, tp).output, tmp_path / "merged")
    assert result.summary.format == "W8A8S"
    same(tmp_path / "merged" / WEIGHTS, tmp_path / "whole" / WEIGHTS)
    ours, theirs = (
        json.loads((tmp_path / name / DESCRIPTION).read_text()) for name in ("merged", "whole")
    )
    assert ours == theirs
    for name in ("config.json", "tokenizer.json"):
        copy = (tmp_path / "merged" / name).read_bytes()
        assert copy == (make_for(target, tp).output / name).read_bytes()
    assert verify(tmp_path / "merged", tmp_path / "whole").problems == ()


def test_compressed_again_it_is_what_run_wrote(make_for: Make, tmp_path: Path) -> None:
    made = make_for("msmodelslim", 1)
    decompress(made.output, tmp_path / "plain")
    compress(check(tmp_path / "plain", tmp_path / "again"))
    same(tmp_path / "again" / CODED, made.output / CODED)
    model = open_w8a8sc(tmp_path / "again")
    assert model is not None and model.format == "W8A8SC TP1"
    assert model.linear(f"{LAYER}.mlp.down_proj") is not None


@pytest.mark.parametrize("model", [{"tied": True}, {}], ids=["tied", "padded"])
def test_tied_and_padded_tables_are_as_run_writes_them(
    make: Make, tmp_path: Path, model: dict[str, Any]
) -> None:
    ranks = make(model, tp=2, target="vllm-mindspore")
    whole = make(model, tp=1, target="msmodelslim")
    decompress(ranks.output, tmp_path / "merged")
    decompress(whole.output, tmp_path / "whole")
    same(tmp_path / "merged" / WEIGHTS, tmp_path / "whole" / WEIGHTS)


def test_biases_are_folded_in(make_for: Make, tmp_path: Path) -> None:
    made = make_for("vllm-mindspore", 2, {"family": "qwen2"})
    decompress(made.output, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / WEIGHTS)
    name = f"{LAYER}.self_attn.k_proj"
    bias = load_file(made.source / "model.safetensors")[f"{name}.bias"].astype(np.float16)
    deq = tensors[f"{name}.deq_scale"].astype(np.int32).view(np.float32).astype(np.float64)
    sums = tensors[f"{name}.weight"].astype(np.int64).sum(axis=1)
    plain = -int(tensors[f"{name}.input_offset"][0]) * sums
    np.testing.assert_array_equal(tensors[f"{name}.quant_bias"] - plain, np.rint(bias / deq))
    assert f"{name}.bias" not in tensors and f"{name}.bias" not in json.loads(
        (tmp_path / "merged" / DESCRIPTION).read_text()
    )


def test_an_uncompressed_linear_stays_float(make_for: Make, tmp_path: Path) -> None:
    made = make_for("vllm-ascend", 2, exclude=("*.o_proj",))
    decompress(made.output, tmp_path / "merged")
    name = f"{LAYER}.self_attn.o_proj.weight"
    found = load_file(tmp_path / "merged" / WEIGHTS)[name]
    expected = load_file(made.source / "model.safetensors")[name].astype(np.float16)
    np.testing.assert_array_equal(found, expected)
    assert json.loads((tmp_path / "merged" / DESCRIPTION).read_text())[name] == "FLOAT"


def test_a_smoothing_vector_is_never_dropped(make_for: Make, tmp_path: Path) -> None:
    made = make_for("vllm-mindspore", 2, algorithm="smoothquant")
    message = r"self_attn\.qkv_proj\.input_scale differs between channels, as smoothing makes it"
    with pytest.raises(MsQuantError, match=message):
        decompress(made.output, tmp_path / "merged")
    assert list(tmp_path.glob("merged*")) == []


def test_a_wrong_tile_is_named(make_for: Make, damage: Make, tmp_path: Path) -> None:
    copy = damage(make_for("vllm-ascend", 2))

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.mlp.down_proj.weight"].view(np.uint8)[4] ^= 1

    copy.edit("model-rank-1-part-0.safetensors", change)
    with pytest.raises(MsQuantError, match=r"rank-1-part-0.*down_proj\.weight': tile 0, engine 0"):
        decompress(copy.directory, tmp_path / "merged")
    assert list(tmp_path.glob("merged*")) == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="expected one quant_model_description"):
        decompress(tmp_path, tmp_path.parent / "merged")
    with pytest.raises(MsQuantError, match="x: no such directory"):
        decompress(tmp_path / "x", tmp_path / "merged")
