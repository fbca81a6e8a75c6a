"""What writing reads and holds: only what a tensor needs, and a few rows of the large ones."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import digest, reader
from ms_quant.files.floats import round_chunks
from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.pipeline.run import QuantizeOptions, run_job


def test_a_weight_is_read_once_for_itself_and_once_for_its_bias(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocking_mindspore: None,
) -> None:
    read, reads = SafetensorsFile.read, Counter[str]()

    def counted(file: SafetensorsFile, name: str) -> np.ndarray:
        reads[f"{file.path.name} {name}"] += 1
        return read(file, name)

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    calibration: dict[str, Any] = {"calib": calib_text, "samples": 2, "seq_len": 8}
    run_job(QuantizeOptions(tiny_model(), tmp_path / "out", **calibration))
    found = {name: count for name, count in reads.items() if name.startswith("block")}
    weights = {name: count for name, count in found.items() if name.endswith(".weight")}
    assert len(weights) == 14 and set(weights.values()) == {2}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_of_writing_is_a_few_rows_of_the_embedding(
    dtype: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 200_000

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = np.ones((rows, 16), tensors[name].dtype)

    model = tiny_model(dtype=dtype, tied=True, layers=1, vocab_size=rows, change=enlarge)
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(digest, "HASHED_ELEMENTS", 1 << 14)
    tracemalloc.start()
    try:
        run_job(QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < rows * 16  # the embedding is twice to four times that


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("rows", [None, slice(3, 19), slice(5, 5)])
def test_chunks_are_the_tensor(
    step: int,
    rows: slice | None,
    tmp_path: Path,
    save_tensors: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    save_tensors(tmp_path / "model.safetensors", {"a": array})
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", step * 3)
    checkpoint = Checkpoint(tmp_path)
    chunks = [chunk for _, chunk in checkpoint.float_chunks("a", rows)]
    assert all(0 < len(chunk) <= step for chunk in chunks)
    wanted = array[rows or slice(0, 20)]
    np.testing.assert_array_equal(np.concatenate([array[:0], *chunks]), wanted)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    rounded = np.concatenate([array[:0], *round_chunks(checkpoint, "a", bfloat16, rows)])
    np.testing.assert_array_equal(rounded, wanted.astype(bfloat16))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_equal_types_keep_their_bits(
    dtype: Any, tmp_path: Path, save_tensors: Callable[..., None]
) -> None:
    array = np.array([-0.0, 1e-7, 3.0], dtype)
    save_tensors(tmp_path / "model.safetensors", {"a": array})
    (found,) = round_chunks(Checkpoint(tmp_path), "a", np.dtype(dtype))
    assert found.tobytes() == array.tobytes()


def test_all_wrong_values_are_counted(
    tmp_path: Path, save_tensors: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.ones(10, np.float16)
    array[[2, 9]] = np.nan, -np.inf
    save_tensors(tmp_path / "model.safetensors", {"a": array})
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 3)
    with pytest.raises(MsQuantError, match="'a' holds 2 NaN or infinite values of 10"):
        list(Checkpoint(tmp_path).float_chunks("a"))
