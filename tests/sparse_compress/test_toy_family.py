"""Blocks that differ: each has its own layout on the ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_family

from ms_quant.models import families
from ms_quant.models.config import parse_config
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.verify.checkpoint import verify

CONFIG: dict[str, Any] = {
    **toy_family.CONFIG,
    "hidden_size": 320,
    "intermediate_size": 1280,
    "moe_intermediate_size": 640,
    "num_attention_heads": 12,
    "head_dim": 64,
}


@pytest.mark.parametrize("algorithm", ["minmax", "smoothquant"])
def test_every_expert_is_compressed(
    algorithm: str,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    calib_text: Path,
    save_tensors: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)
    source = tmp_path / "toy"
    source.mkdir()
    for path in tiny_model("texts").glob("tokenizer*"):
        shutil.copy(path, source)
    (source / "config.json").write_text(json.dumps(CONFIG))
    tensors = toy_family.tensors_of(parse_config(CONFIG))
    save_tensors(source / "model.safetensors", tensors)
    output = tmp_path / "out"
    run(SparseOptions(source, output, calib_text, tp=2, algorithm=algorithm, samples=4, seq_len=32))
    assert verify(output, source).problems == ()
    model = open_w8a8sc(output)
    assert model is not None
    router = "model.layers.1.mlp.gate"
    assert model.linear("model.layers.1.mlp.experts.1.down_proj") is not None
    exact = tensors[f"{router}.weight"].astype(np.float16)
    np.testing.assert_array_equal(model.tensor(f"{router}.weight"), exact)
