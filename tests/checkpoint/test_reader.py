"""Checkpoint directories: where tensors are found, what is refused, and the fingerprint."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint, fingerprint
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.models.weights import check_model


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_file(path, plans, lambda plan: arrays[plan.name])


def index(directory: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


A = np.arange(4, dtype=np.float32)
B = np.arange(4, 8, dtype=np.float32)


def two_shards(directory: Path) -> None:
    save(directory / "m-1.safetensors", {"a": A})
    save(directory / "m-2.safetensors", {"b": B})
    index(directory, {"a": "m-1.safetensors", "b": "m-2.safetensors"})


def test_single_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"b": B, "a": A})
    save(tmp_path / "adapter.safetensors", {"c": A})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ["a", "b"]
    assert checkpoint.files() == [tmp_path / "model.safetensors"]
    assert checkpoint.info("a").shape == (4,)
    np.testing.assert_array_equal(checkpoint.read("b"), B)


def test_index_opens_only_the_shard_it_needs(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "m-2.safetensors").write_bytes(b"broken")
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("a"), A)
    with pytest.raises(MsQuantError, match="truncated"):
        checkpoint.read("b")


def test_index_of_another_name(tmp_path: Path) -> None:
    save(tmp_path / "q.safetensors", {"a": A})
    index(tmp_path, {"a": "q.safetensors"}, "quant_weights.safetensors.index.json")
    index(tmp_path, {"a": "pytorch_model.bin"}, "pytorch_model.bin.index.json")
    assert Checkpoint(tmp_path).names == ["a"]


def test_two_indexes(tmp_path: Path) -> None:
    for name in ("x.index.json", "y.index.json"):
        index(tmp_path, {"a": "m.safetensors"}, name)
    with pytest.raises(MsQuantError, match=r"indexes x\.index\.json, y\.index\.json, expected one"):
        Checkpoint(tmp_path)


def test_all_files_without_an_index(tmp_path: Path) -> None:
    save(tmp_path / "p1.safetensors", {"a": A})
    save(tmp_path / "p2.safetensors", {"b": B})
    (tmp_path / ".p3.safetensors").write_bytes(b"hidden files are not read")
    assert Checkpoint(tmp_path).names == ["a", "b"]


def test_symlinked_shards_of_a_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save(blobs / "0123abcd", {"a": A})
    (snapshot / "m-1.safetensors").symlink_to("../../blobs/0123abcd")
    index(snapshot, {"a": "m-1.safetensors"})
    np.testing.assert_array_equal(Checkpoint(snapshot).read("a"), A)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(MsQuantError, match="no such model directory"):
        Checkpoint(tmp_path / "none")


def test_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(MsQuantError, match=r"found no \.safetensors file.*pickle.*not read"):
        Checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(MsQuantError, match=r"m-2\.safetensors: no such file"):
        Checkpoint(tmp_path)


def test_tensor_absent_from_its_shard(tmp_path: Path) -> None:
    two_shards(tmp_path)
    index(tmp_path, {"a": "m-1.safetensors", "c": "m-1.safetensors", "b": "m-2.safetensors"})
    with pytest.raises(MsQuantError, match=r"m-1\.safetensors: has no tensor 'c', expected it"):
        Checkpoint(tmp_path).read("a")


def test_tensor_in_two_indexed_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save(tmp_path / "m-2.safetensors", {"a": A, "b": B})
    with pytest.raises(MsQuantError, match=r"m-2.safetensors: holds tensor 'a', .* m-1\."):
        Checkpoint(tmp_path).read("b")


def test_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    save(tmp_path / "p1.safetensors", {"a": A})
    save(tmp_path / "p2.safetensors", {"a": A})
    with pytest.raises(MsQuantError, match=r"p2\.safetensors: holds tensor 'a', .* only in"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "d\\x.safetensors", 3])
def test_index_that_leaves_the_directory(tmp_path: Path, shard: Any) -> None:
    index(tmp_path, {"a": shard})
    with pytest.raises(MsQuantError, match="without a path"):
        Checkpoint(tmp_path)


def test_index_of_pickle_files(tmp_path: Path) -> None:
    index(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(MsQuantError, match="pickle files are not read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    index(tmp_path, weight_map)
    with pytest.raises(MsQuantError, match="weight_map"):
        Checkpoint(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": A})
    with pytest.raises(MsQuantError, match="has no tensor 'z'"):
        Checkpoint(tmp_path).read("z")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_read_float32(tmp_path: Path, dtype: Any) -> None:
    save(tmp_path / "model.safetensors", {"a": A.astype(dtype)})
    array = Checkpoint(tmp_path).read_float32("a")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, A)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, np.nan, np.inf, -np.inf], ml_dtypes.bfloat16),
        ([1.0, 1e300, -1e300, np.nan], np.float64),  # finite, but not in float32
    ],
)
def test_read_float32_refuses_what_is_not_finite(tmp_path: Path, values: Any, dtype: Any) -> None:
    save(tmp_path / "model.safetensors", {"a": np.array(values, np.float64).astype(dtype)})
    with pytest.raises(MsQuantError, match=r"model\.safetensors: tensor 'a' holds 3 NaN .* of 4"):
        Checkpoint(tmp_path).read_float32("a")


def test_read_float32_refuses_integers(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": A.astype(np.int8)})
    with pytest.raises(MsQuantError, match="dtype I8, expected a float dtype"):
        Checkpoint(tmp_path).read_float32("a")


@pytest.mark.parametrize("elements", [1, 3, 6, 7, 1000])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_float32_chunks(tmp_path: Path, elements: int, dtype: Any) -> None:
    array = np.arange(30, dtype=np.float32).reshape(10, 3)
    save(tmp_path / "model.safetensors", {"a": array.astype(dtype)})
    chunks = list(Checkpoint(tmp_path).float32_chunks("a", elements))
    assert [start for start, _ in chunks] == list(range(0, 10, max(1, elements // 3)))
    assert all(part.dtype == np.float32 for _, part in chunks)
    np.testing.assert_array_equal(np.concatenate([part for _, part in chunks]), array)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_read_float32_of_unusual_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path / "model.safetensors", {"a": np.full(shape, 2, np.float16)})
    array = Checkpoint(tmp_path).read_float32("a")
    assert (array.dtype, array.shape) == (np.float32, shape)
    assert (array == 2).all()


def test_chunks_count_what_is_not_finite_over_all_of_them(tmp_path: Path) -> None:
    array = np.array([[np.nan], [1], [np.inf], [2]], np.float32)
    save(tmp_path / "model.safetensors", {"a": array})
    with pytest.raises(MsQuantError, match=r"tensor 'a' holds 2 NaN or infinite values of 4"):
        list(Checkpoint(tmp_path).float32_chunks("a", 1))


def test_read_float32_holds_little_besides_the_result(tmp_path: Path) -> None:
    array = np.zeros((1 << 12, 1 << 12), ml_dtypes.bfloat16)
    save(tmp_path / "model.safetensors", {"a": array})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.info("a")
    tracemalloc.start()
    try:
        checkpoint.read_float32("a")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 64 MiB, and one piece as bfloat16, as float32 and as the result of isfinite, twice over
    assert peak < (64 + 2 * 7 * 4) << 20


def tiny_config(tied: bool = False) -> ModelConfig:
    return parse_config(
        {
            "model_type": "qwen3",
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 16,
            "tie_word_embeddings": tied,
        }
    )


def model(tmp_path: Path, config: ModelConfig, **changes: np.ndarray | None) -> Checkpoint:
    arrays: dict[str, np.ndarray | None] = {
        name: np.zeros(shape, ml_dtypes.bfloat16)
        for name, shape in config.parameter_shapes().items()
    }
    arrays |= changes
    save(tmp_path / "model.safetensors", {k: v for k, v in arrays.items() if v is not None})
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_check_model_accepts(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(tied)
    check_model(model(tmp_path, config), config)


def test_check_model_accepts_known_extras(tmp_path: Path) -> None:
    config = tiny_config(tied=True)
    extras: dict[str, np.ndarray] = {
        "lm_head.weight": np.zeros((16, 8), np.float16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    check_model(model(tmp_path, config, **extras), config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, r"1 of \d+ tensors are missing, expected 'model.norm.weight'"),
        ("model.norm.weight", np.zeros(7, np.float32), r"shape \[7\], expected \[8\]"),
        ("model.norm.weight", np.zeros(8, np.int8), "dtype I8, expected one of F32, F16, BF16"),
        ("model.norm.weight", np.zeros(8, np.float64), "dtype F64, expected one of"),
        ("model.extra", np.zeros(8, np.float32), "'model.extra' is not a tensor of a qwen3 model"),
        (
            "model.layers.2.input_layernorm.weight",
            np.zeros(8, np.float32),
            "not a tensor of a qwen3 model of 2 layers",
        ),
    ],
)
def test_check_model_refuses(
    tmp_path: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    config = tiny_config()
    with pytest.raises(MsQuantError, match=message):
        check_model(model(tmp_path, config, **{name: value}), config)


def test_fingerprint_ignores_times_and_sees_changes(tmp_path: Path) -> None:
    big = np.zeros(1 << 18, np.float32)
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path / "model.safetensors", {"a": big})
    first = fingerprint(Checkpoint(tmp_path))
    assert json.loads(json.dumps(first)) == first
    os.utime(tmp_path / "model.safetensors", (0, 0))
    assert fingerprint(Checkpoint(tmp_path)) == first
    for place in (0, -1):
        changed = big.copy()
        changed[place] = 1
        save(tmp_path / "model.safetensors", {"a": changed})
        assert fingerprint(Checkpoint(tmp_path)) != first
    save(tmp_path / "model.safetensors", {"b": big})
    assert fingerprint(Checkpoint(tmp_path)) != first
    save(tmp_path / "model.safetensors", {"a": big})
    assert fingerprint(Checkpoint(tmp_path)) == first
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(Checkpoint(tmp_path)) != first


def test_fingerprint_of_small_shards(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": A})
    first = fingerprint(Checkpoint(tmp_path))
    assert first["config_sha256"] is None
    save(tmp_path / "model.safetensors", {"a": B})
    assert fingerprint(Checkpoint(tmp_path)) != first
    save(tmp_path / "model.safetensors", {})
    fingerprint(Checkpoint(tmp_path))
