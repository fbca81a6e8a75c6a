"""The compressed-tensors format, as vLLM reads it and LLM Compressor writes it.

docs/compressed_tensors_format.md states what its files hold. Its description is the entry
``quantization_config`` of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import TensorPlan
from ms_quant.formats.compressed_tensors.config import (
    CLASSIFIER,
    KEY,
    NAME,
    PACKED,
    format_of,
    quantization_config,
    read_schemes,
)
from ms_quant.formats.compressed_tensors.tensors import WITH_CODES, parts, read_linear
from ms_quant.formats.float_types import why_float
from ms_quant.formats.format import CheckpointFormat, Kinds, Leeway, Options, Tensors
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.pack import WORD_BITS
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import Storage
from ms_quant.schemes.support import held_by, store
from ms_quant.schemes.table import SCHEMES

FLOAT_NAMES = frozenset(DTYPES)
STORED = frozenset(
    {"weight_scale", "weight_zero_point", "act_scale", "input_scale", "input_offset"}
)


def check(layer: LayerPlan, group: LinearGroup, spec: LinearSpec, name: str) -> None:
    """Refuses a linear that cannot be stored.

    Raises:
        MsQuantError: no format holds the scheme, or the shape does not fill words; names the
            weight.
    """
    weight = layer.scheme.weight
    if format_of(layer.scheme) != PACKED:
        return
    assert isinstance(weight, AffineFormat)
    multiple, (rows, columns) = WORD_BITS // weight.bits, spec.shape
    if columns % multiple:
        raise BadFileError(
            f"{name}: {columns} inputs, expected a multiple of {multiple} to pack codes of "
            f"{weight.bits} bits in words"
        )
    if rows % multiple and not weight.symmetric:
        raise BadFileError(
            f"{name}: {rows} outputs, expected a multiple of {multiple} to pack zero points of "
            f"{weight.bits} bits in words"
        )


def why_not_run(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> str:
    """Why vLLM fails on a linear, or ""."""
    if group.routed and not layer.scheme.activation.dynamic:
        return (
            f"is {layer.scheme.name}, expected W8A8_DYNAMIC: vLLM's int8 experts have inputs "
            "scaled per token"
        )
    return ""


def linear_plan(layer: LayerPlan, group: LinearGroup, spec: LinearSpec) -> Tensors:
    return {key: (part.dtype, part.shape) for key, part in parts(layer, spec.shape).items()}


def linear_tensor(
    layer: LayerPlan, group: LinearGroup, linear: QuantizedLinear, suffix: str
) -> np.ndarray:
    """One tensor of a quantized linear, as stored.

    Raises:
        MsQuantError: the linear has what no tensor holds.
    """
    homeless = linear.arrays().keys() - STORED - {"weight"}
    if homeless:
        raise UnsupportedError(f"the {NAME} format has no place for {min(homeless)} of a linear")
    rows, columns = linear.weight.shape
    return parts(layer, (rows, columns))[suffix].make(linear)


def describe(plan: Plan, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """``quantization_config``; linears of one scheme are one group, in model order."""
    groups: dict[int, tuple[Scheme, list[str]]] = {}
    first: dict[int, int] = {}  # a layer plan to the first of its scheme
    for found, group in all_groups(plan.config):
        layer = plan.layers[found]
        if layer is None:
            continue
        if id(layer) not in first:
            same = (key for key, (scheme, _) in groups.items() if scheme == layer.scheme)
            first[id(layer)] = next(same, id(layer))
        _, members = groups.setdefault(first[id(layer)], (layer.scheme, []))
        members += [f"{block_prefix(found.block)}{member}" for member in group.members]
    floats = [*plan.float_linears(), *([CLASSIFIER] if plan.config.labels else [])]
    nothing = [(store(SCHEMES[held_by(NAME)[0]], plan.dtype, NAME)[0], list[str]())]
    return quantization_config([*groups.values()] or nothing, floats)


def find(directory: Path) -> list[Path]:
    """config.json, if it says so."""
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    found = config.get(KEY)
    return [path] if isinstance(found, Mapping) and found.get("quant_method") == NAME else []


def kinds(config: ModelConfig, description: Mapping[str, Any], where: Path) -> Kinds:
    """What each linear is; those that runtimes fuse must agree, which they do not check."""
    schemes = read_schemes(description, _linears(config))
    found = {path: scheme.name if scheme else "FLOAT" for path, scheme in schemes.items()}
    problems = []
    for index in range(config.num_blocks):
        block = config.block(index)
        problems += [
            f"{where}: {KEY}: {path} is a target, expected it in ignore: {why_float(block, member)}"
            for member, spec in block.linears.items()
            if block.group_of(member) is None
            and spec.out_features != config.vocab_size  # which runtimes never quantize
            and schemes[path := f"{block_prefix(index)}{member}"]
        ]
        for group in block.groups:
            first, *others = (f"{block_prefix(index)}{member}" for member in group.members)
            problems += [
                f"{where}: {KEY}: {first} and {other} differ, expected one scheme for both: the "
                "runtime fuses them"
                for other in others
                if schemes[other] != schemes[first]
            ]
    return found, problems


def _linears(config: ModelConfig) -> list[str]:
    return [
        f"{block_prefix(block.index)}{m}" for block in config.stored_blocks for m in block.linears
    ]


def scheme_options(
    config: ModelConfig, description: Mapping[str, Any], checkpoint: Checkpoint
) -> Options:
    schemes = read_schemes(description, _linears(config))

    def options(path: str, spec: LinearSpec) -> dict[str, Any]:
        scheme = schemes[path]
        return {} if scheme is None else scheme.chosen

    return options


def stored(scheme: Scheme, storage: Storage, checkpoint: Checkpoint, path: str) -> Storage:
    """Scales are of the type that the tensors of a linear have."""
    name = f"{path}.weight_scale"
    wide = name in checkpoint and checkpoint.info(name).dtype.name == "float32"
    return storage.widened() if wide else storage


LEEWAY = Leeway(
    types={"input_scale": FLOAT_NAMES, "bias": FLOAT_NAMES},
    extra=frozenset({"weight_zero_point", "input_zero_point"}),
    stored=stored,
    # Reading it has compared what decides numbers.
    description=lambda found, made, where: ([], []),
)
FORMAT = CheckpointFormat(
    leeway=LEEWAY,
    name=NAME,
    shown=f"{KEY} in config.json",
    find=find,
    document=lambda plan: "config.json",
    weights="model",
    entry=KEY,
    linear_plan=linear_plan,
    linear_tensor=linear_tensor,
    read_linear=read_linear,
    describe=describe,
    kinds=kinds,
    scheme_options=scheme_options,
    check=check,
    why_not_run=why_not_run,
    with_codes=WITH_CODES,
)
