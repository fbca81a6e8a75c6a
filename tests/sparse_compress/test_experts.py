"""A model with experts is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from routed_models import DEEPSEEK, QWEN, save_routed

from ms_quant.errors import MsQuantError
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run


@pytest.mark.parametrize("raw", [DEEPSEEK, QWEN], ids=["deepseek", "qwen"])
def test_experts_are_not_compressed(raw: dict, tmp_path: Path, calib_text: Path) -> None:
    model = save_routed(tmp_path / "model", raw)
    with pytest.raises(MsQuantError, match=r"has routed experts \(mlp\.experts\.0\.gate_proj\)"):
        run(SparseOptions(model, tmp_path / "out", calib_text, tp=2, samples=4, seq_len=32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]
