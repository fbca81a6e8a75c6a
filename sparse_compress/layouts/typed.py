"""Descriptions that give each tensor a type by its name, as msModelSlim began them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from sparse_compress.layouts.base import MAX_DESCRIPTION_BYTES, Layout, Target

CODED, PARAMETER, FLOAT = "W8A8SC", "W8A8S", "FLOAT"
CODED_SUFFIXES = ("weight", "index", "info")
KIND_KEY = "model_quant_type"


def describe(layout: Layout) -> dict[str, Any]:
    """The description of a checkpoint.

    Returns:
        JSON: a type for each tensor by its stored name, and for the weight of each linear in a
        fused one, by which a runtime looks types up.
    """
    result: dict[str, Any] = {KIND_KEY: CODED}
    for name in layout.tensors():
        path, _, suffix = name.rpartition(".")
        if path in layout.compressed:
            result[name] = CODED if suffix in CODED_SUFFIXES else PARAMETER
        else:
            result[name] = FLOAT
    for index, group, fused in layout.linears():
        for member in group.members:
            result[f"{block_prefix(index)}{member}.weight"] = result[f"{fused}.weight"]
    return result


def kind_of(path: Path) -> Any:
    """What a description says that the model is; None where there is none or it does not say."""
    return read_json(path, MAX_DESCRIPTION_BYTES).get(KIND_KEY) if path.exists() else None


def read_layout(path: Path, config: ModelConfig, tp: int, target: Target) -> Layout:
    """The layout that a description states.

    Args:
        path: the description.
        config: the model.
        tp: how many ranks there are.
        target: whom it is for.

    Raises:
        MsQuantError: an entry is missing, unknown or of another type.
    """
    value = read_json(path, MAX_DESCRIPTION_BYTES)
    fused = (name for _, _, name in target.linears(config))
    compressed = frozenset(name for name in fused if value.get(f"{name}.weight") == CODED)
    layout = Layout(config, tp, compressed, target)
    expected = target.describe(layout, lambda rank, name: 0)
    for key in sorted({*expected, *value}):
        if value.get(key) != expected.get(key):
            raise BadFileError(
                f"{path}: {key} is {value.get(key)!r:.80}, expected {expected.get(key)!r}"
            )
    return layout
