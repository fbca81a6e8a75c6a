"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ms_quant.files.companion_files import companion_files
from ms_quant.files.encoded import EncodedCheckpoint
from ms_quant.files.reader import Checkpoint
from ms_quant.files.safetensors_file import open_file
from ms_quant.formats.opening import FloatModel, QuantizedModel, ServedModel, open_model
from ms_quant.formats.source_kind import model_directory
from ms_quant.models.names import block_prefix
from ms_quant.schemes.table import FLOAT_CACHE, STATIC_CACHE


def inspect_checkpoint(directory: Path) -> dict[str, Any]:
    """CheckpointFormat, sizes and how each linear is stored.

    Args:
        directory: a float, golden-stick, ascend or W8A8SC checkpoint.

    Raises:
        MsQuantError: the directory is none of them.
    """
    directory = model_directory(directory)
    model = open_model(directory)
    beside = {directory / name for name in companion_files(directory)}  # a module after the model
    paths = sorted(set(directory.rglob("*.safetensors")) - beside)
    files = [path for path in paths if path.is_file()]
    if isinstance(model, FloatModel):  # whose files may have other names
        assert isinstance(model.checkpoint, Checkpoint)
        tensors = [*model.checkpoint.stored().items()]
    else:
        tensors = [place for file in map(open_file, files) for place in file.tensors.items()]
    by_dtype: Counter[str] = Counter()
    for _, info in tensors:
        by_dtype[info.code] += info.stop - info.start
    stored = {name: (info.code, info.shape) for name, info in tensors}
    weights = _weight_names(model)
    linears = []
    for index in range(model.config.num_blocks):
        for path, linear in model.config.block(index).linears.items():
            shape = linear.shape
            name = f"{block_prefix(index)}{path}"
            found = stored.get(weights.get(name, f"{name}.weight"))
            linears.append(
                {"name": name, "stored_as": stored_as(found, shape), "shape": list(shape)}
            )
    return {
        "checkpoint": str(directory),
        "format": model.format,
        "model_type": model.config.model_type,
        "blocks": model.config.num_layers,
        "kv_cache": cache_name(model),
        "files": len(files),
        "tensors": len(tensors),
        "bytes": sum(path.stat().st_size for path in files),
        **{f"{code}_bytes": count for code, count in sorted(by_dtype.items())},
        "linears": linears,
    }


def _weight_names(model: ServedModel) -> dict[str, str]:
    """Path of a linear of codes to their full name."""
    if isinstance(model, FloatModel) and isinstance(model.checkpoint, EncodedCheckpoint):
        encodings = model.checkpoint.encodings
        return {name.removesuffix(".weight"): e.parts[0] for name, e in encodings.items()}
    if not isinstance(model, QuantizedModel):
        return {}
    tensors = model.row.tensor_plans(model.plan)
    parts = [(tensor.name, *tensor.part) for tensor in tensors if tensor.part is not None]
    return {path: name for name, path, part in parts if part.endswith(("weight", "weight_packed"))}


def cache_name(model: ServedModel) -> str:
    """How a checkpoint says that keys and values are cached."""
    scales = (model.cache_scales(index) for index in range(model.config.num_layers))
    return STATIC_CACHE if any(scales) else FLOAT_CACHE


def stored_as(found: tuple[str, tuple[int, ...]] | None, shape: tuple[int, int]) -> str:
    """The type of what is stored of a weight, and how codes of four bits are packed in it."""
    if found is None:
        return "fused and sliced, see sparse-compress info"
    (code, stored), (out, into) = found, shape
    if code == "I32":
        return f"I32, {into // stored[1]} inputs each"
    if stored == (out, into // 2):
        return f"{code}, pairs of inputs"
    return f"{code}, pairs of outputs" if stored == (out // 2, into) else code
