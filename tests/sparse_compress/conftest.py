"""Small W8A8SC checkpoints, each made once for all tests, and means to damage a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_quant.files.atomic import sha256_file, write_json
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.sealed import seal
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.job.output_directory import RECORD
from ms_quant.models.config import read_json
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run

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


Tensors = dict[str, np.ndarray]


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
        write_file(path, plans, lambda plan: tensors[plan.name], metadata)

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
            made_before[key] = Made(base / "out", source, request, run(request).as_json())
        return made_before[key]

    return one


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[Made], Damage]:
    """A copy of a checkpoint to damage."""

    def copy(made: Made) -> Damage:
        return Damage(Path(shutil.copytree(made.output, tmp_path / "damaged")))

    return copy


class PlainModels:
    """Small directories as msModelSlim writes them, of no known model."""

    LINEARS: ClassVar = {
        "visual.blocks.0.proj": (128, 320),
        "mixer.0.in": (256, 576),
        "mixer.0.out": (320, 512),
    }
    NARROW = "mixer.0.gate"  # too few rows for the hardware

    @staticmethod
    def sparse(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
        weight = np.rint(rng.standard_normal((n, k)) * 4).clip(-127, 127)
        return (weight * (rng.random((n, k)) < 0.5)).astype(np.int8)

    @staticmethod
    def w8a8s() -> tuple[Tensors, dict[str, Any]]:
        """Tensors and description: three int8 linears, a narrow one, and what is float or odd."""
        rng = np.random.default_rng(0)
        tensors: Tensors = {}
        types: dict[str, Any] = {"model_quant_type": "W8A8S", "metadata": {}, "group_size": 0}
        for path, (n, k) in {**PlainModels.LINEARS, PlainModels.NARROW: (64, 320)}.items():
            tensors |= {
                f"{path}.weight": PlainModels.sparse(rng, n, k),
                f"{path}.deq_scale": rng.integers(1 << 28, 1 << 29, n, np.int64),
                f"{path}.quant_bias": rng.integers(-999, 999, n, np.int32),
                f"{path}.input_scale": rng.random(1).astype(np.float16),
                f"{path}.input_offset": np.array([-3], np.float16),
            }
        types |= dict.fromkeys(tensors, "W8A8S")
        floats: Tensors = {
            "mixer.0.in.bias": rng.standard_normal(256).astype(np.float32),
            "embed.weight": rng.standard_normal((50, 320)).astype(np.float16),
            "norm.weight": rng.standard_normal(320).astype(ml_dtypes.bfloat16),
            "scalar": np.array(2.5, np.float32),
            "empty.weight": np.zeros((3, 0), np.float16),
        }
        types |= dict.fromkeys(["attn.quant_type"], "FAKQuant") | dict.fromkeys(floats, "FLOAT")
        return {**tensors, **floats, "rotation.matrix": np.eye(3, dtype=np.float32)}, types

    @staticmethod
    def w16a16s() -> tuple[Tensors, dict[str, Any]]:
        """The same linears as sparse float16."""
        rng = np.random.default_rng(1)
        tensors: Tensors = {}
        for path, (n, k) in PlainModels.LINEARS.items():
            weight = rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.3)
            tensors[f"{path}.weight"] = np.round(weight * 4).astype(np.float16)
            tensors[f"{path}.bias"] = rng.standard_normal(n).astype(np.float16)
        types: dict[str, Any] = {"model_quant_type": "W16A16S", **dict.fromkeys(tensors, "W16A16S")}
        return {**tensors, "norm.weight": np.ones(5, np.float16)}, {**types, "norm.weight": "FLOAT"}

    @staticmethod
    def write(
        directory: Path, tensors: Tensors, types: Mapping[str, Any], layout: str = "v0"
    ) -> Path:
        """Writes ``v0``, ``v1`` (sharded, with an index) or ``v1-single`` files, and companions."""
        directory.mkdir()
        kind = str(types.get("model_quant_type", "W8A8S")).lower()
        named: dict[str, list[str]] = {f"quant_model_weight_{kind}.safetensors": list(tensors)}
        description = f"quant_model_description_{kind}.json"
        if layout != "v0":
            description, types = "quant_model_description.json", {**types, "version": "1.0.0"}
            named = {"quant_model_weights.safetensors": list(tensors)}
        if layout == "v1":
            names = sorted(tensors)
            halves = names[::2], names[1::2]
            files = [f"quant_model_weights-0000{i}-of-00002.safetensors" for i in (1, 2)]
            named = dict(zip(files, halves, strict=True))
            shard_of = {name: file for file, part in named.items() for name in part}
            index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
            (directory / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
        for file, part in named.items():
            save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        (directory / description).write_text(json.dumps(types))
        (directory / "config.json").write_text('{"model_type": "unheard-of"}')
        (directory / "modeling_odd.py").write_text("# code")
        (directory / "README.md").write_text("is not copied")
        (directory / "optional").mkdir()
        save_file({"q": np.eye(2, dtype=np.float32)}, directory / "optional" / "quarot.safetensors")
        return directory

    @staticmethod
    def description_of(directory: Path) -> dict[str, Any]:
        (path,) = directory.glob("quant_model_description*.json")
        return json.loads(path.read_text())

    @staticmethod
    def tensors_of(directory: Path) -> Tensors:
        found: Tensors = {}
        for path in sorted(directory.glob("*.safetensors")):
            found |= load_file(path)
        return found

    @staticmethod
    def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes a description in place."""
        (path,) = directory.glob("quant_model_description*.json")
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def plain_models() -> type[PlainModels]:
    """Makes and reads directories as msModelSlim writes them."""
    return PlainModels
