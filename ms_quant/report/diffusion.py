"""What a directory of diffusers says of itself: a pipeline for vllm-omni, or a float one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ms_quant.diffusers.component import Component, open_component
from ms_quant.diffusers.directory import open_directory
from ms_quant.diffusers.inspection import inspect_directory
from ms_quant.diffusers.plan import ComponentPlan
from ms_quant.diffusers.stored import read_stored
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.report.checkpoint import read_record, source_bytes
from ms_quant.report.records import FLOAT, Facts, FloatWeights, Group

_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


def diffusion_facts(path: Path) -> Facts:
    """Reads the headers and descriptions of its transformers.

    Raises:
        MsQuantError: it has no transformer that is known, or files are malformed.
    """
    found, directory = inspect_directory(path), open_directory(path)
    parts = [open_component(directory.path / name, name) for name in directory.transformers]
    try:
        plans = read_stored(path).plans
    except UnsupportedError:
        plans = {}
    groups = [group for part in parts for group in _groups(part, plans.get(part.name), parts)]
    weights, record = _weights(parts), read_record(directory.path)
    quantized = {
        f"{_start(part, parts)}{path}" for part in parts if part.name in plans
        for path in plans[part.name].linears
    }  # fmt: skip
    total = sum(_bytes(part) for part in parts)
    return Facts(
        place=path,
        format=found["format"],
        model=", ".join(dict.fromkeys(part.family.name for part in parts)),
        groups=groups,
        record=record,
        output_bytes=total,
        float_bytes=total - sum(group.bytes or 0 for group in groups),
        source_bytes=source_bytes(record),
        stored=lambda name: weights(name) if name in quantized else None,
        linears={
            f"{_start(part, parts)}{next(iter(group.linears))}": [
                f"{_start(part, parts)}{linear}" for linear in group.linears
            ]
            for part in parts
            for group in part.all_groups
        },
    )


def diffusion_weights(directory: Path, facts: Facts) -> FloatWeights:
    """Opens the float pipeline that one is compared with.

    Raises:
        MsQuantError: it is not float, or another one.
    """
    found = diffusion_facts(directory)
    if any(group.quantized for group in found.groups):
        raise BadArgumentError(
            f"--against {directory}: is a {found.format} directory, expected the float one"
        )
    if [(g.path, g.weights) for g in found.groups] != [(g.path, g.weights) for g in facts.groups]:
        raise BadArgumentError(
            f"--against {directory}: is another model than {facts.place}: its transformers have "
            "other linears"
        )
    opened = open_directory(directory)
    parts = [open_component(opened.path / name, name) for name in opened.transformers]
    return FloatWeights(directory, found.output_bytes or 0, _weights(parts))


def _weights(parts: list[Component]) -> Callable[[str], np.ndarray]:
    """What reads the stored weight of a linear."""
    places = {
        f"{_start(part, parts)}{path}": (part, path) for part in parts for path in part.shapes
    }

    def read(name: str) -> np.ndarray:
        part, path = places[name]
        found: np.ndarray = part.checkpoint.read(f"{path}.weight")
        return found

    return read


def _groups(part: Component, plan: ComponentPlan | None, parts: list[Component]) -> Iterator[Group]:
    start, sizes = _start(part, parts), _sizes(part)
    linears: Mapping[str, object] = plan.linears if plan is not None else {}
    for group in part.all_groups:
        first = next(iter(group.linears))
        index = _INDEX.search(first)
        scheme = FLOAT if plan is None or first not in linears else plan.storage.layer.scheme.name
        yield Group(
            path=f"{start}{first}",
            block=int(index[1]) if index else None,
            kind=f"{start}{_INDEX.sub(_without_number, first)}",
            scheme=scheme,
            weights=sum(linear.size for linear in group.linears.values()),
            bytes=sum(sizes.get(path, 0) for path in group.linears),
            worst=f"{start}{first}",
            first=f"{start}{first}",
        )


def _without_number(found: re.Match[str]) -> str:
    return found[0].replace(found[1], "*")


def _start(part: Component, parts: list[Component]) -> str:
    return f"{part.name}/" if len(parts) > 1 else ""


def _sizes(part: Component) -> dict[str, int]:
    """Path of a linear to the bytes of its tensors."""
    sizes: dict[str, int] = {}
    for name in part.checkpoint.names:
        path, info = name.rpartition(".")[0], part.checkpoint.info(name)
        sizes[path] = sizes.get(path, 0) + info.stop - info.start
    return sizes


def _bytes(part: Component) -> int:
    return sum(_sizes(part).values())
