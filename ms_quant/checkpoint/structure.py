"""The structure of a quantized checkpoint, from its JSON files and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_quant.algorithms import PLAIN, get_chain
from ms_quant.checkpoint import kv_cache
from ms_quant.checkpoint.finish import MAX_RECORD_BYTES, RECORD
from ms_quant.checkpoint.flavour import Flavour
from ms_quant.checkpoint.flavours import FLAVOURS, find_flavour
from ms_quant.checkpoint.reader import Checkpoint
from ms_quant.checkpoint.writer import TensorPlan
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix, load_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan import Plan, Way, check_shapes, plan_of_ways, recorded_way
from ms_quant.schemes import SCHEMES, STATIC_CACHE, get_scheme
from ms_quant.spec import Fold
from ms_quant.strict_json import read_json

DESCRIPTION_ENDINGS = (
    "quantization_description.json",
    "quant_model_description.json",
    "quant_model_description_w8a8sc.json",
)
MAX_DESCRIPTION_BYTES = 256 << 20


@dataclass(frozen=True)
class Structure:
    """Attributes:
    flavour: what the files hold.
    checkpoint: the tensors.
    description: tensor name to scheme, as stored.
    plan: what a consistent description stands for.
    expected: every tensor that there should be, by name.
    """

    flavour: Flavour
    checkpoint: Checkpoint
    description: dict[str, Any]
    plan: Plan
    expected: dict[str, TensorPlan]


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
    flavour = check_kind(directory)
    config = load_config(directory)
    where = directory / flavour.document
    description = read_json(where, MAX_DESCRIPTION_BYTES)
    checkpoint = Checkpoint(directory)
    problems = list(_description_problems(flavour, config, description, where))
    if problems:
        return None, problems
    try:
        plan = _plan_of(flavour, config, description, checkpoint)
        expected = {tensor.name: tensor for tensor in flavour.tensor_plans(plan)}
    except MsQuantError as error:
        return None, [f"{where}: {error}"]
    problems += _tensor_problems(checkpoint, expected)
    problems += _entry_problems(description, flavour.description(plan), where)
    return Structure(flavour, checkpoint, description, plan, expected), problems


def check_kind(directory: Path) -> Flavour:
    """The flavour of a checkpoint, by the names of its files.

    Raises:
        MsQuantError: it has none; says what the directory is instead.
    """
    if not directory.is_dir():
        raise MsQuantError(f"{directory}: no such model directory")
    found = sorted(p.name for p in directory.glob("*.json") if p.name.endswith(DESCRIPTION_ENDINGS))
    compressed = len(found) == 1 and _is_compressed(directory / found[0])
    flavour = find_flavour(directory)
    if flavour is not None and found == [flavour.document] and not compressed:
        return flavour
    known = FLAVOURS.values()
    expected = " or ".join(f"{row.title} with {row.document}" for row in known)
    if compressed:
        raise MsQuantError(
            f"{directory}: is a W8A8SC checkpoint, expected {expected}; "
            "sparse-compress verify proves it"
        )
    if not found and (directory / "config.json").is_file():
        raise MsQuantError(f"{directory}: is a float checkpoint, expected {expected}")
    raise MsQuantError(
        f"{directory}: has the descriptions {found}, expected exactly one of "
        f"{[row.document for row in known]}"
    )


def _is_compressed(path: Path) -> bool:
    """Whether a description is of W8A8SC, which shares a file name with another flavour."""
    if path.name == "quant_model_description_w8a8sc.json":
        return True
    return read_json(path, MAX_DESCRIPTION_BYTES).get("model_quant_type") == "W8A8SC"


def _description_problems(
    flavour: Flavour, config: ModelConfig, description: Mapping[str, Any], where: Path
) -> Iterator[str]:
    known = ("FLOAT", *_held(flavour))
    modules: dict[str, str] = {}
    for key, value in description.items():
        if "." not in key or key.rpartition(".")[2] in kv_cache.SUFFIXES:
            continue
        if value not in known:
            yield f"{where}: {key} is {value!r:.80}, expected one of {', '.join(known)}"
            continue
        module, _, suffix = key.rpartition(".")
        if suffix in flavour.floats:
            continue
        if modules.setdefault(module, value) != value:
            yield f"{where}: tensors of {module} are {modules[module]} and {value}, expected one"
    yield from _group_problems(config, modules, where)


def _group_problems(config: ModelConfig, modules: Mapping[str, str], where: Path) -> Iterator[str]:
    for index in range(config.num_layers):
        for group in config.family.groups:
            names = [f"{block_prefix(index)}{member}" for member in group.members]
            for name in names:
                if name not in modules:
                    yield f"{where}: has no entry for {name}.weight"
            kinds = {modules.get(name) for name in names} - {None}
            if len(kinds) > 1:
                listed = ", ".join(f"{name} {modules.get(name)}" for name in names)
                yield f"{where}: {listed}; expected one scheme, the runtime fuses them"


def _entry_problems(
    found: Mapping[str, Any], expected: Mapping[str, str], where: Path
) -> Iterator[str]:
    for key in sorted({*found, *expected}):
        if key not in found:
            yield f"{where}: does not name {key!r}"
        elif key in expected and not _same(found[key], expected[key]):
            yield f"{where}: {key} is {found[key]!r}, expected {expected[key]!r}"
        elif key not in expected and "." in key:
            yield f"{where}: names {key!r}, expected only the model's tensors"


def _same(one: Any, other: Any) -> bool:
    """Unlike Python, 32 and 32.0 are two."""
    return type(one) is type(other) and one == other


def _plan_of(
    flavour: Flavour, config: ModelConfig, description: Mapping[str, Any], checkpoint: Checkpoint
) -> Plan:
    """The plan that a consistent description stands for.

    Raises:
        MsQuantError: an option of the scheme has no such value, or a linear no such shape.
    """
    record = _record(checkpoint.directory)
    fold, ways, floats = _fold(record.get("fold")), {}, set()
    for index in range(config.num_layers):
        for group in config.family.groups:
            path = f"{block_prefix(index)}{group.name}"
            name = description.get(f"{block_prefix(index)}{group.members[0]}.weight")
            if name == "FLOAT":
                floats.add(path)
                continue
            first = f"{block_prefix(index)}{group.members[0]}"
            told = flavour.scheme_options(config, description, checkpoint, first)
            ways[path] = _way(flavour, str(name), fold, {**_options(record, path), **told})
    if not ways:
        ways = {"": _way(flavour, _held(flavour)[0], fold, {})}
    cache = description.get("kv_cache_type", "") if flavour.holds_cache else ""
    if cache not in ("", STATIC_CACHE):
        raise MsQuantError(f"kv_cache_type is {cache!r:.80}, expected {STATIC_CACHE!r}")
    plan = plan_of_ways(config, ways, DTYPES[config.dtype], frozenset(floats), cache)
    for index in range(config.num_layers):
        for group in plan.groups(index):
            check_shapes(plan, index, group)
    return plan


def _way(flavour: Flavour, name: str, fold: Fold | None, options: Mapping[str, Any]) -> Way:
    """What a group is, as far as one can tell: algorithms leave no trace but what they add."""
    chosen = {key: value for key, value in options.items() if key in SCHEMES[name].options}
    scheme = get_scheme(name, flavour.name, fold, **chosen)
    settings = {key: value for key, value in options.items() if key.startswith(scheme.algorithm)}
    return scheme, get_chain(PLAIN, scheme, settings if scheme.algorithm else {})


def _held(flavour: Flavour) -> list[str]:
    """The schemes that a flavour holds."""
    rows = SCHEMES.values()
    return [row.name for row in rows if flavour.name in {held.flavour for held in row.held}]


def _fold(value: Any) -> Fold | None:
    """Where smoothing went, of a record.

    Raises:
        MsQuantError: there is no such place.
    """
    if value is None:
        return None
    if value not in [fold.value for fold in Fold]:
        known = ", ".join(fold.value for fold in Fold)
        raise MsQuantError(f"fold is {value!r:.80}, expected one of {known}")
    return Fold(value)


def _record(directory: Path) -> Mapping[str, Any]:
    """What was done, where the files say so."""
    path = directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES).get("record") if path.exists() else None
    return record if isinstance(record, Mapping) else {}


def _options(record: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The recorded options of a group's scheme; what files tell themselves goes first."""
    options = recorded_way(record, path).get("scheme_options")
    return dict(options) if isinstance(options, Mapping) else {}


def _tensor_problems(checkpoint: Checkpoint, expected: Mapping[str, TensorPlan]) -> Iterator[str]:
    names = set(checkpoint.names)
    for name, tensor in expected.items():
        if name not in names:
            yield (
                f"{checkpoint.directory}: tensor {name!r} is missing, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
            continue
        info = checkpoint.info(name)
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"{checkpoint.file_of(name).path}: tensor {name!r} is {info.dtype} "
                f"{list(info.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
    for name in sorted(names - set(expected)):
        yield f"{checkpoint.file_of(name).path}: unknown tensor {name!r}, expected none"
