"""Descriptions that map each tensor's full name to a scheme or ``FLOAT``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ms_quant.checkpoint import kv_cache
from ms_quant.checkpoint.flavour import Kinds
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.schemes import held_by


def kinds(
    flavour: str,
    floats: Collection[str],
    config: ModelConfig,
    description: Mapping[str, Any],
    where: Path,
) -> Kinds:
    """What each linear is, if all of its tensors and those that runtimes fuse it with agree.

    Args:
        flavour: name of the flavour.
        floats: suffixes that are called ``FLOAT`` although the linear is quantized.
        config: the model.
        description: as stored.
        where: its file.
    """
    modules: dict[str, str] = {}
    problems = list(_module_problems(flavour, floats, description, where, modules))
    problems += _group_problems(config, modules, where)
    return modules, problems


def _module_problems(
    flavour: str,
    floats: Collection[str],
    description: Mapping[str, Any],
    where: Path,
    modules: dict[str, str],
) -> Iterator[str]:
    known = ("FLOAT", *held_by(flavour))
    for key, value in description.items():
        module, _, suffix = key.rpartition(".")
        if not module or suffix in kv_cache.SUFFIXES:
            continue
        if value not in known:
            yield f"{where}: {key} is {value!r:.80}, expected one of {', '.join(known)}"
        elif suffix not in floats and modules.setdefault(module, value) != value:
            yield f"{where}: tensors of {module} are {modules[module]} and {value}, expected one"


def _group_problems(config: ModelConfig, modules: Mapping[str, str], where: Path) -> Iterator[str]:
    for index in range(config.num_layers):
        for group in config.family.groups:
            names = [f"{block_prefix(index)}{member}" for member in group.members]
            for name in names:
                if name not in modules:
                    yield f"{where}: has no entry for {name}.weight"
            found = {modules.get(name) for name in names} - {None}
            if len(found) > 1:
                listed = ", ".join(f"{name} {modules.get(name)}" for name in names)
                yield f"{where}: {listed}; expected one scheme, the runtime fuses them"
