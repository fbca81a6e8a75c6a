"""Descriptions that map each tensor's full name to a scheme or ``FLOAT``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ms_quant.errors import BadFileError, short
from ms_quant.formats import kv_cache
from ms_quant.formats.float_types import why_float
from ms_quant.formats.format import Kinds, Leeway
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.schemes.support import held_by


def kinds(
    format: str,
    floats: Collection[str],
    config: ModelConfig,
    description: Mapping[str, Any],
    where: Path,
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Kinds:
    """What each linear is, if all of its tensors and those that runtimes fuse it with agree.

    Args:
        format: name of the format.
        floats: suffixes whose entries do not tell what the linear is.
        config: the model.
        description: as stored.
        where: its file.
        aliases: other names of schemes.
    """
    modules: dict[str, str] = {}
    description = {
        key: aliases.get(value, value) if isinstance(value, str) else value
        for key, value in description.items()
    }
    problems = list(_module_problems(format, floats, description, where, modules))
    problems += _group_problems(config, modules, where)
    return modules, problems


def _module_problems(
    format: str,
    floats: Collection[str],
    description: Mapping[str, Any],
    where: Path,
    modules: dict[str, str],
) -> Iterator[str]:
    known = ("FLOAT", *held_by(format))
    for key, value in description.items():
        module, _, suffix = key.rpartition(".")
        if not module or suffix in kv_cache.SUFFIXES:
            continue
        if suffix in floats and isinstance(value, str):
            continue  # compared with what it should be, later
        if value not in known:
            yield f"{where}: {key} is {short(value)}, expected one of {', '.join(known)}"
        elif modules.setdefault(module, value) != value:
            yield f"{where}: tensors of {module} are {modules[module]} and {value}, expected one"


def _group_problems(config: ModelConfig, modules: Mapping[str, str], where: Path) -> Iterator[str]:
    for index in range(config.num_blocks):
        block = config.block(index)
        for path in block.linears:
            found = modules.get(name := f"{block_prefix(index)}{path}", "FLOAT")
            if block.group_of(path) is None and found != "FLOAT":
                yield f"{where}: {name} is {found}, expected FLOAT: {why_float(block, path)}"
        for group in block.groups:
            names = [f"{block_prefix(index)}{member}" for member in group.members]
            for name in names:
                if name not in modules:
                    yield f"{where}: has no entry for {name}.weight"
            kinds = {modules.get(name) for name in names} - {None}
            if len(kinds) > 1:
                listed = ", ".join(f"{name} {modules.get(name)}" for name in names)
                yield f"{where}: {listed}; expected one scheme, the runtime fuses them"


def tensor_entries(
    found: Mapping[str, Any], made: Mapping[str, Any], where: Path, leeway: Leeway
) -> tuple[list[str], list[str]]:
    """What is missing of the entries of tensors in a description by others, and what is odd.

    Args:
        found: the description, as stored.
        made: what we would write.
        where: its file.
        leeway: what may differ.

    Raises:
        MsQuantError: an entry is of no tensor, or says what it is not.
    """
    defects, notes = [], []
    for key in (key for key in sorted({*made, *found}) if "." in key):
        suffix, value = key.rpartition(".")[2], found.get(key)
        if key not in found:
            defects.append(f"{where}: does not name {key!r}, expected {made[key]!r}")
        elif key not in made and suffix not in leeway.extra:
            raise BadFileError(f"{where}: names {key!r}, expected only the model's tensors")
        elif key in made and key in found and value != made[key]:
            if isinstance(value, str) and leeway.aliases.get(value) == made[key]:
                notes.append(f"{where}: calls {made[key]} {value}")
            elif suffix == "bias":
                notes.append(f"{where}: {key} is {short(value)}, the other tensors {made[key]}")
            else:
                raise BadFileError(f"{where}: {key} is {short(value)}, expected {made[key]!r}")
    return defects, list(dict.fromkeys(notes))
