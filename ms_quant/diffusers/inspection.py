"""What a directory of diffusers holds, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ms_quant.diffusers.component import ENTRY, Component, open_component
from ms_quant.diffusers.directory import open_directory
from ms_quant.diffusers.methods import FORMAT
from ms_quant.formats.inspection import stored_as


def inspect_directory(path: Path) -> dict[str, Any]:
    """Format, sizes and how each linear of the transformers' blocks is stored.

    Raises:
        MsQuantError: it has no transformer that is known, or files are malformed.
    """
    directory = open_directory(path)
    parts = [open_component(directory.path / name, name) for name in directory.transformers]
    by_dtype: Counter[str] = Counter()
    tensors = [part.checkpoint.info(name) for part in parts for name in part.checkpoint.names]
    for info in tensors:
        by_dtype[info.code] += info.stop - info.start
    files = [file for part in parts for file in part.checkpoint.files()]
    methods = dict.fromkeys(_method(part) for part in parts)
    return {
        "checkpoint": str(directory.path),
        "format": "diffusers, float" if set(methods) == {"float"} else FORMAT,
        "method": ", ".join(methods),
        "transformers": {part.name or ".": part.family.name for part in parts},
        "files": len(files),
        "tensors": len(tensors),
        "bytes": sum(file.stat().st_size for file in files),
        **{f"{code}_bytes": count for code, count in sorted(by_dtype.items())},
        "linears": [row for part in parts for row in _linears(part, len(parts) > 1)],
    }


def _method(part: Component) -> str:
    entry = part.config.get(ENTRY)
    return str(entry.get("quant_method", "?")) if isinstance(entry, dict) else "float"


def _linears(part: Component, several: bool) -> Iterator[dict[str, Any]]:
    for path, shape in part.shapes.items():
        name = f"{path}.weight"
        info = part.checkpoint.info(name) if name in part.checkpoint else None
        found = None if info is None else (info.code, info.shape)
        held = stored_as(found, shape)
        if _method(part).startswith("mxfp4") and held == "F8_E4M3":
            held = "F8_E4M3, values of float4 e2m1"
        start = f"{part.name}/" if several else ""
        yield {"name": f"{start}{path}", "stored_as": held, "shape": list(shape)}
