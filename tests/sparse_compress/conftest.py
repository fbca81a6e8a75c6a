"""Small W8A8SC checkpoints, each made once for all tests, and means to damage a copy of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_quant.checkpoint.atomic import sha256_file, write_json
from ms_quant.checkpoint.finish import RECORD, seal
from ms_quant.checkpoint.safetensors_file import open_file
from ms_quant.checkpoint.writer import TensorPlan, write_file
from ms_quant.models.config import read_json
from sparse_compress.request import SparseOptions
from sparse_compress.run import run

# Inside the UNZIP limits at TP2. At TP4 o_proj's 192 input channels on each rank are too few.
DIMENSIONS = {
    "hidden_size": 320,
    "intermediate_size": 1280,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
CALIBRATION = {"samples": 4, "seq_len": 32}
VOCAB = 310  # not a multiple of 64


def cut_vocabulary(tensors: dict[str, np.ndarray]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:VOCAB]


@dataclass(frozen=True)
class Made:
    """A finished checkpoint, what it was made from and what ``run`` said."""

    output: Path
    source: Path
    options: SparseOptions
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Damage:
    """Changes to a checkpoint. ``reseal`` makes its record agree with the files again."""

    directory: Path

    def edit(self, name: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Rewrites one safetensors file; ``change`` edits its tensors in place."""
        path = self.directory / name
        tensors, metadata = load_file(path), open_file(path).metadata
        change(tensors)
        plans = [TensorPlan(key, array.dtype, array.shape) for key, array in tensors.items()]
        path.unlink()
        write_file(path, plans, tensors.__getitem__, metadata)

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrites one JSON file; ``change`` edits it in place."""
        value = read_json(self.directory / name)
        change(value)
        write_json(self.directory / name, value)

    def reseal(self) -> None:
        """Lists the files as they are now."""
        value = read_json(self.directory / RECORD)
        del value["sha256"]
        value["files"] = {
            path.relative_to(self.directory).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name != RECORD
        }
        write_json(self.directory / RECORD, seal(value))


@pytest.fixture(scope="session")
def made_before() -> dict[str, Made]:
    return {}


@pytest.fixture
def make(
    tiny_model: Callable[..., Path],
    calib_text: Path,
    made_before: dict[str, Made],
    tmp_path_factory: pytest.TempPathFactory,
    blocking_mindspore: None,
) -> Callable[..., Made]:
    """``make(model={...}, tp=2, ...)`` runs the compression of a tiny model, or finds it done."""

    def one(model: Mapping[str, Any] | None = None, **options: Any) -> Made:
        key = repr((sorted((model or {}).items()), sorted(options.items())))
        if key not in made_before:
            base = tmp_path_factory.mktemp("sparse")
            keys = {"layers": 1, "vocab_size": VOCAB, "change": cut_vocabulary, **DIMENSIONS}
            made_at = tiny_model(f"source{len(made_before)}", **{**keys, **(model or {})})
            source = Path(shutil.move(made_at, base / "source"))
            text = Path(shutil.copy(calib_text, base))
            request = SparseOptions(source, base / "out", text, **{**CALIBRATION, **options})
            made_before[key] = Made(base / "out", source, request, run(request))
        return made_before[key]

    return one


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[Made], Damage]:
    """A copy of a checkpoint to damage."""

    def copy(made: Made) -> Damage:
        return Damage(Path(shutil.copytree(made.output, tmp_path / "damaged")))

    return copy
