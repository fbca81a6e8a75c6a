"""A quantized directory of diffusers, read back: what its files say and whether they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_quant.diffusers.component import ENTRY, Component, open_component
from ms_quant.diffusers.directory import DiffusersDirectory, open_directory
from ms_quant.diffusers.methods import ASCEND, HELD, METHODS, SCHEME_METHODS, Storage, storage_of
from ms_quant.diffusers.plan import EXCLUDED, ComponentPlan
from ms_quant.errors import BadFileError, UnsupportedError, short
from ms_quant.files.strict_json import read_json
from ms_quant.formats.ascend.format import DESCRIPTION
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics.storage import DTYPES

OPTIONAL = {"mxfp4": ("mul_scale",)}
"""What linears of a method may have beside their tensors."""


@dataclass(frozen=True)
class Stored:
    """A quantized directory.

    Attributes:
        directory: what is in it.
        record: the content of its ``ms_quant.json``; {} where others made it.
        plans: what each transformer holds, by its name.
        problems: where its files contradict each other, one sentence each.
    """

    directory: DiffusersDirectory
    record: Mapping[str, Any]
    plans: Mapping[str, ComponentPlan]
    problems: list[str]

    @property
    def method(self) -> str:
        """How its linears are held."""
        return next(iter(self.plans.values())).storage.method.name

    @property
    def asked(self) -> Mapping[str, Any]:
        """What was asked for, if the record says it."""
        found = self.record.get("record")
        return found if isinstance(found, Mapping) else {}


def read_stored(path: Path) -> Stored:
    """Reads the headers and descriptions of a quantized directory.

    Raises:
        MsQuantError: it is a float one, or malformed.
    """
    directory, problems = open_directory(path), list[str]()
    record = directory.path / RECORD
    content = read_json(record, MAX_RECORD_BYTES) if record.is_file() else {}
    parts = [open_component(directory.path / name, name) for name in directory.transformers]
    plans = {part.name: _plan(part, directory.path, content, problems) for part in parts}
    stored = Stored(directory, content, plans, problems)
    methods = {plan.storage.method.name for plan in plans.values()}
    if len(methods) > 1:
        problems.append(
            f"{directory.path}: its transformers are {' and '.join(sorted(methods))}, expected one "
            "method: vllm-omni refuses several"
        )
    return stored


def _plan(
    component: Component, root: Path, record: Mapping[str, Any], problems: list[str]
) -> ComponentPlan:
    entry = component.config.get(ENTRY)
    if entry is None:
        raise UnsupportedError(
            f"{component.config_path}: has no {ENTRY}: a float model, expected a quantized one"
        )
    method = entry.get("quant_method", entry.get("method")) if isinstance(entry, dict) else None
    if method not in METHODS:
        raise UnsupportedError(
            f"{component.config_path}: quant_method is {short(method)}, expected one of "
            f"{', '.join(METHODS)}"
        )
    quantized, floats = [], dict(component.kept)
    for group in component.all_groups:
        found = [p for p in group.linears if f"{p}.weight_scale" in component.checkpoint]
        if len(found) == len(group.linears):
            quantized.append(group)
            continue
        floats |= {p: component.kept.get(p, EXCLUDED) for p in group.linears}
        if found:
            others = ", ".join(sorted(set(group.linears) - set(found)))
            problems.append(
                f"{component.directory}: {', '.join(found)} quantized and {others} float, expected "
                "one of the two: the runtime fuses them"
            )
    storage = _storage(component, root, str(method), quantized, record)
    plan = ComponentPlan(component, storage, tuple(quantized), floats)
    problems += table_problems(plan)
    problems += entry_problems(plan, entry, root)
    return plan


def _storage(
    component: Component,
    root: Path,
    method: str,
    quantized: list[LinearGroup],
    record: Mapping[str, Any],
) -> Storage:
    asked = record.get("record")
    asked = asked if isinstance(asked, Mapping) else {}
    dtype = DTYPES.get(str(asked.get("run_dtype")), DTYPES["bfloat16"])
    options = asked.get("scheme_options", {})
    if method != ASCEND:
        scheme = next(name for name, held in SCHEME_METHODS.items() if held.name == method)
        return storage_of(scheme, options if asked.get("scheme") == scheme else {}, dtype)
    description = read_json(root / DESCRIPTION, MAX_RECORD_BYTES)
    kinds = {str(description.get(f"{p}.weight")) for g in quantized for p in g.linears}
    if len(kinds) != 1 or not kinds <= set(HELD):
        raise BadFileError(
            f"{root / DESCRIPTION}: the quantized linears of {component.directory.name} are "
            f"{', '.join(sorted(kinds)) or 'missing'}, expected all of one of {', '.join(HELD)}"
        )
    scheme = kinds.pop()
    return storage_of(scheme, options if asked.get("scheme") == scheme else {}, dtype)


def table_problems(plan: ComponentPlan) -> Iterator[str]:
    """Tensors that are missing, one too many, or of another type or shape."""
    component, checkpoint = plan.component, plan.component.checkpoint
    expected = {tensor.name: tensor for tensor in plan.tensors}
    further = OPTIONAL.get(plan.storage.method.name, ())
    parts = {f"{path}.{part}" for path in plan.linears for part in further}
    try:
        component.check_names({**expected, **dict.fromkeys(parts)})
    except BadFileError as error:
        yield str(error)
    for name, tensor in expected.items():
        if tensor.part is None:
            path = name.removesuffix(".weight")
            wanted = component.shapes.get(path, tensor.shape)
            if name.endswith(".weight") and tensor.shape != wanted:
                yield f"{name}: shape {list(tensor.shape)}, expected {list(wanted)}"
            continue
        if name not in checkpoint:
            yield f"{component.directory}: has no tensor {name!r}, expected it of {tensor.part[0]}"
            continue
        info = checkpoint.info(name)
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"{checkpoint.place(name)} is {info.dtype} {list(info.shape)}, expected "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def entry_problems(plan: ComponentPlan, entry: Mapping[str, Any], root: Path) -> Iterator[str]:
    """What ``quantization_config`` or the description says against the tensors."""
    method, where = plan.storage.method, str(plan.component.config_path)
    if method.name == ASCEND:
        found, path = read_json(root / DESCRIPTION, MAX_RECORD_BYTES), root / DESCRIPTION
        for key, kind in plan.description().items():
            if key.endswith(".weight") and found.get(key) != kind:
                yield f"{path}: {key} is {short(found.get(key))}, expected {kind!r}"
        return
    if entry.get(method.flag) is not True:
        yield (
            f"{where}: {method.flag} is {short(entry.get(method.flag))}, expected true: vllm-omni "
            "would quantize the codes again"
        )
    ignored = entry.get("ignored_layers", entry.get("modules_to_not_convert", []))
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        yield f"{where}: ignored_layers is {short(ignored)}, expected names"
        return
    for group in plan.component.all_groups:
        yield from _ignored_problems(plan, group, set(ignored), where)


def _ignored_problems(
    plan: ComponentPlan, group: LinearGroup, ignored: set[str], where: str
) -> Iterator[str]:
    """vllm-omni asks by its own name of a linear, or of one that it fuses by those of its parts."""
    runtime = plan.component.family.runtime_name
    single = len(group.linears) == 1
    asked = {runtime(path) for path in group.linears}
    left_out = group.fused in ignored or asked <= ignored
    quantized = bool(plan.linears.keys() & set(group.linears))
    if quantized and (left_out or asked & ignored):
        yield f"{where}: ignored_layers names {group.fused}, which is quantized, expected it not"
    elif not quantized and not left_out and not set(group.linears) & set(plan.component.kept):
        yield (
            f"{where}: ignored_layers does not name {group.fused}, which is float, expected "
            f"{'it' if single else 'it and its parts'}: vllm-omni would ask for its codes"
        )
