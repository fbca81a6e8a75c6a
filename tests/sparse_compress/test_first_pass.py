"""``sparse-compress run`` reads its whole source before it works, whatever its goal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run

LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"target_ratio": 0.5}])
def test_nan_in_the_last_block_is_found_first(
    goal: dict[str, Any], tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[LAST].reshape(-1)[7] = np.nan

    model = tiny_model(hidden_size=320, intermediate_size=320, head_dim=80, change=spoil)
    options = SparseOptions(model, tmp_path / "out", calib_text, 1, samples=2, seq_len=8, **goal)
    steps: list[str] = []
    with pytest.raises(MsQuantError, match=f"'{LAST}' holds 1 NaN or infinite values"):
        run(options, lambda step, part: steps.append(step))
    assert set(steps) <= {"read"}
    assert sorted(path.name for path in tmp_path.glob("out*")) == []
