"""The structure of a quantized checkpoint, from its JSON files and headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import PLAIN, get_algorithms
from ms_quant.errors import BadFileError, MsQuantError, short
from ms_quant.files.reader import Checkpoint
from ms_quant.files.strict_json import read_json
from ms_quant.files.writer import TensorPlan
from ms_quant.formats import kv_cache
from ms_quant.formats.checks import check_shapes
from ms_quant.formats.float_model import open_text, with_outputs
from ms_quant.formats.float_types import router_dtype
from ms_quant.formats.format import CheckpointFormat, Leeway
from ms_quant.formats.registry import FORMATS
from ms_quant.formats.row_order import in_model_order
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.models.text_part import house_name, renamed
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan, recorded_layer
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.schemes.storage import SmoothingTarget
from ms_quant.schemes.support import store
from ms_quant.schemes.table import SCHEMES, get_scheme

MAX_DESCRIPTION_BYTES = 256 << 20
PROVENANCE = "provenance"
"""The entry of a record that says where numbers come from that others have made."""


@dataclass(frozen=True)
class Structure:
    """Attributes:
    format: what the files hold.
    checkpoint: the tensors, their rows in the order of the model.
    plan: what a consistent description stands for.
    expected: every tensor that there should be, by name.
    defects: what a runtime will not forgive although it can be read, one sentence each.
    notes: what is otherwise than we write it, and means the same, one sentence each.
    """

    format: CheckpointFormat
    checkpoint: Checkpoint
    plan: Plan
    expected: dict[str, TensorPlan]
    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_structure(directory: Path) -> tuple[Structure | None, list[str]]:
    """Reads and checks the structure of a quantized checkpoint.

    Args:
        directory: the checkpoint.

    Returns:
        The structure, None where the description contradicts itself, and the problems: one
        sentence for each entry and tensor that is missing, unknown or of a wrong type or shape.

    Raises:
        MsQuantError: the directory holds another kind of checkpoint, or a file cannot be read.
    """
    format, where = check_kind(directory)
    config = load_config(directory, format.entry)
    description = read_json(where, MAX_DESCRIPTION_BYTES)
    if format.entry:
        description = description[format.entry]
    try:
        config, checkpoint = open_text(config, directory, Checkpoint)
        if config.inner:
            description = renamed(description, house_name)
        kinds, problems = format.kinds(config, description, where)
        if problems:
            return None, problems
        config = with_outputs(config, checkpoint)
        plan = _plan_of(format, config, kinds, description, checkpoint)
        checkpoint = in_model_order(format, plan, checkpoint)
        expected = {tensor.name: tensor for tensor in format.tensor_plans(plan)}
        structure = Structure(format, checkpoint, plan, expected)
        made = format.description(plan)
        if not is_ours(directory) and format.leeway.description is not None:
            defects, notes = format.leeway.description(description, made, where)
            structure = replace(structure, defects=defects, notes=notes)
        else:
            problems += _entry_problems(description, made, where, exact=bool(format.entry))
    except MsQuantError as error:
        text = str(error)
        return None, [text if text.startswith(f"{where}: ") else f"{where}: {text}"]
    problems += _tensor_problems(structure)
    return structure, problems


def check_kind(directory: Path) -> tuple[CheckpointFormat, Path]:
    """The format of a checkpoint and the file that describes it.

    Raises:
        MsQuantError: it has none; says what the directory is instead.
    """
    if not directory.is_dir():
        raise BadFileError(f"{directory}: no such model directory")
    expected = " or ".join(f"{row.title} with {row.shown}" for row in FORMATS.values())
    found = [(row, path) for row in FORMATS.values() for path in row.find(directory)]
    sparse = directory / "quant_model_description_w8a8sc.json"
    if sparse.exists() or (len(found) == 1 and _is_compressed(found[0][1])):
        raise BadFileError(
            f"{directory}: is a W8A8SC checkpoint, expected {expected}; "
            "sparse-compress verify proves it"
        )
    if len(found) == 1:
        return found[0]
    if not found and (directory / "config.json").is_file():
        raise BadFileError(f"{directory}: is a float checkpoint, expected {expected}")
    raise BadFileError(
        f"{directory}: has the descriptions {[path.name for _, path in found]}, expected exactly "
        f"one of {', '.join(row.shown for row in FORMATS.values())}"
    )


def _is_compressed(path: Path) -> bool:
    """Whether a description is of W8A8SC, which shares a file name with another format."""
    return read_json(path, MAX_DESCRIPTION_BYTES).get("model_quant_type") == "W8A8SC"


def _entry_problems(
    found: Mapping[str, Any], expected: Mapping[str, Any], where: Path, exact: bool
) -> Iterator[str]:
    """What is missing, wrong or too much; of names without dots only if ``exact`` is asked for."""
    for key in sorted({*found, *expected}):
        if key not in found:
            yield f"{where}: does not name {key!r}"
        elif key in expected and not _same(found[key], expected[key]):
            place, one, other = _first_difference(found[key], expected[key], key)
            yield f"{where}: {place} is {short(one)}, expected {short(other)}"
        elif key not in expected and ("." in key or exact):
            yield f"{where}: names {key!r}, expected only the model's tensors"


def _first_difference(found: Any, expected: Any, where: str) -> tuple[str, Any, Any]:
    """The place of the first value that differs, and both."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in dict.fromkeys([*expected, *found]):
            if key not in found or key not in expected:
                return f"{where}.{key}", found.get(key), expected.get(key)
            if not _same(found[key], expected[key]):
                return _first_difference(found[key], expected[key], f"{where}.{key}")
    return where, found, expected


def _same(one: Any, other: Any) -> bool:
    """Unlike Python, 32 and 32.0 are two."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _plan_of(
    format: CheckpointFormat,
    config: ModelConfig,
    kinds: Mapping[str, str],
    description: Mapping[str, Any],
    checkpoint: Checkpoint,
) -> Plan:
    """The plan that a consistent description stands for.

    Raises:
        MsQuantError: an option of the scheme has no such value, or a linear no such shape.
    """
    record, dtype = _record(checkpoint.directory), DTYPES[config.dtype]
    ours, foreign = is_ours(checkpoint.directory), is_foreign(checkpoint.directory)
    options_of = format.scheme_options(config, description, checkpoint)
    layers: dict[GroupId, LayerPlan | None] = {}
    made: dict[str, LayerPlan] = {}
    for found, group in all_groups(config):
        member = group.members[0]
        first = f"{block_prefix(found.block)}{member}"
        if kinds[first] == "FLOAT":
            layers[found] = None
            continue
        said = recorded_layer(record, str(found))
        told = options_of(first, config.block(found.block).linears[member])
        options = {"fold": said.get("fold"), **_options(said), **told}
        key = f"{kinds[first]} {sorted(options.items())!r} {said.get('scale_dtype')}"
        if key not in made:
            made[key] = _layer(format, kinds[first], options, dtype, said.get("scale_dtype"))
        layer = made[key]
        if not ours:
            storage = format.leeway.stored(layer.scheme, layer.storage, checkpoint, first)
            key = f"{key} {storage.scale_type}"
            layer = made.setdefault(key, replace(layer, storage=storage))
        if foreign and not layer.foreign:
            key = f"{key} foreign"
            layer = made.setdefault(
                key, replace(layer, storage=replace(layer.storage, foreign=True))
            )
        layers[found] = layer
    cache, float_caches = "", frozenset[int]()
    if format.holds_cache:
        cache, float_caches = kv_cache.described(config, description, record)
    plan = Plan(
        config,
        format.name,
        layers,
        dtype,
        kv_cache=cache,
        foreign=foreign,
        router_dtype=router_dtype(config, checkpoint),
        float_caches=float_caches,
    )
    for index in range(config.num_blocks):
        for group in plan.groups(index):
            check_shapes(plan, index, group)
    return plan


def _layer(
    format: CheckpointFormat,
    name: str,
    options: Mapping[str, Any],
    dtype: np.dtype,
    scales: str | None,
) -> LayerPlan:
    """What a group is, as far as one can tell: algorithms leave no trace but what they add."""
    chosen = {key: value for key, value in options.items() if key in SCHEMES[name].options}
    target = _target(options.get("fold"))
    scheme, storage = store(get_scheme(name, **chosen), dtype, format.name, target)
    settings = {key: value for key, value in options.items() if key.startswith(scheme.algorithm)}
    algorithms = get_algorithms(PLAIN, scheme, settings if scheme.algorithm else {})
    if scales == dtype.name:
        storage = storage.narrowed()
    elif scales == "float32":
        storage = storage.widened()
    return LayerPlan(scheme, storage, algorithms)


def _target(value: Any) -> SmoothingTarget | None:
    """Where smoothing went, of a record.

    Raises:
        MsQuantError: there is no such place.
    """
    if value is None:
        return None
    if value not in [target.value for target in SmoothingTarget]:
        known = ", ".join(target.value for target in SmoothingTarget)
        raise BadFileError(f"fold is {value!r:.80}, expected one of {known}")
    return SmoothingTarget(value)


def is_ours(directory: Path) -> bool:
    """Whether a checkpoint has our record, so that its files are as we write them."""
    return (directory / RECORD).exists()


def is_foreign(directory: Path) -> bool:
    """Whether others made the numbers of a checkpoint, whoever wrote its files."""
    return not is_ours(directory) or PROVENANCE in _record(directory)


def _record(directory: Path) -> Mapping[str, Any]:
    """What was done, where the files say so."""
    path = directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES).get("record") if path.exists() else None
    return record if isinstance(record, Mapping) else {}


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded options of a group's scheme; what files tell themselves goes first."""
    options = record.get("scheme_options")
    return dict(options) if isinstance(options, Mapping) else {}


def _tensor_problems(structure: Structure) -> Iterator[str]:
    checkpoint, expected = structure.checkpoint, structure.expected
    leeway = Leeway() if is_ours(checkpoint.directory) else structure.format.leeway
    quantized, names = set(structure.plan.quantized()), set(checkpoint.names)
    caches = kv_cache.entries(structure.plan)
    for name, tensor in expected.items():
        suffix = name.rpartition(".")[2]
        if tensor.part is None and name not in caches:
            suffix = ""  # a float tensor of the model
        if name not in names:
            yield (
                f"{checkpoint.directory}: tensor {name!r} is missing, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
            continue
        info = checkpoint.info(name)
        if info.shape == tensor.shape and info.dtype.name in leeway.types.get(suffix, ()):
            continue
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"{checkpoint.file_of(name).path}: tensor {name!r} is {info.dtype} "
                f"{list(info.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
    for name in sorted(names - set(expected)):
        path, _, suffix = name.rpartition(".")
        if path in quantized and suffix in leeway.extra:
            continue
        yield f"{checkpoint.file_of(name).path}: unknown tensor {name!r}, expected none"
