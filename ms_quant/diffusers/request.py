"""A request to quantize a directory of diffusers, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.diffusers.component import INDEX, SINGLE, WEIGHTS, Component, open_float_component
from ms_quant.diffusers.directory import CONFIG, DiffusersDirectory, open_directory
from ms_quant.diffusers.methods import ASCEND, DEFAULT_SCHEME, FORMAT, Storage, storage_of
from ms_quant.diffusers.plan import Choice, ComponentPlan, check_patterns, plan_component
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.files.atomic import free_space_check
from ms_quant.files.hub_cache import refuse_cached_place
from ms_quant.files.reader import fingerprint
from ms_quant.files.writer import TensorPlan, plan_shards, shard_names
from ms_quant.formats.ascend.format import DESCRIPTION
from ms_quant.job.output_directory import OutputDirectory
from ms_quant.numerics.storage import DTYPES

RUN_TYPES = ("bfloat16", "float16")
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class DiffusersOptions:
    """What a user asks.

    Attributes:
        model: the directory.
        output: the directory to make.
        scheme: name of the scheme.
        scheme_options: options of its weights.
        exclude: glob patterns of linears that stay float, by whole fused groups.
        float_undivided: leave linears float that the method cannot compute.
        dtype: type of what stays float; None keeps what is stored.
        shard_bytes: largest data size of an output file.
        any_environment: take a finished output of another version of this package.
    """

    model: Path
    output: Path
    scheme: str = DEFAULT_SCHEME
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    float_undivided: bool = False
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    any_environment: bool = False


@dataclass(frozen=True)
class CheckedDiffusers:
    """A request that can be done.

    Attributes:
        options: the request.
        source: the directory.
        storage: how linears are held.
        plans: what each transformer becomes, by its name.
        notes: what to know, one sentence each.
    """

    options: DiffusersOptions
    source: DiffusersDirectory
    storage: Storage
    plans: Mapping[str, ComponentPlan]
    notes: tuple[str, ...]

    @cached_property
    def shards(self) -> dict[str, dict[str, list[TensorPlan]]]:
        """The weight files of each transformer, by their names."""
        return {n: named_shards(p, self.options.shard_bytes) for n, p in self.plans.items()}

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides the output."""
        options = self.options
        return {
            "format": FORMAT,
            "scheme": options.scheme,
            "algorithm": "minmax",
            **({"scheme_options": dict(options.scheme_options)} if options.scheme_options else {}),
            "method": self.storage.method.name,
            "dtype": options.dtype or "as stored",
            "run_dtype": self.storage.layer.dtype.name,
            "exclude": list(options.exclude),
            "float_undivided": options.float_undivided,
            "shard_bytes": options.shard_bytes,
            "source": {n: fingerprint(p.component.checkpoint) for n, p in self.plans.items()},
            "copied": self.source.copied_bytes(),
            "environment": {"ms_quant": __version__},
        }

    @property
    def made(self) -> list[str]:
        """The paths of all files of the output but its record."""
        inside = {n: [CONFIG, INDEX, *shards] for n, shards in self.shards.items()}
        ours = [inside_path(name, file) for name, files in inside.items() for file in files]
        return [DESCRIPTION, *ours, *self.source.copied]

    def output(self) -> OutputDirectory:
        """The directory that is made."""
        options = self.options
        return OutputDirectory(options.output, self.record, options.any_environment, made=self.made)

    @property
    def bytes(self) -> int:
        """How large the output will be."""
        copied = sum(self.source.copied_bytes().values())
        return copied + sum(plan.bytes for plan in self.plans.values())

    def as_json(self) -> dict[str, Any]:
        """What is or would be made."""
        plans = self.plans.values()
        return {
            "output": str(self.options.output),
            "format": FORMAT,
            "method": self.storage.method.name,
            "scheme": self.options.scheme,
            "transformers": {
                name
                or ".": f"{plan.component.family.name}: {len(plan.linears)} linears quantized, "
                f"{len(plan.floats)} of its blocks float"
                for name, plan in self.plans.items()
            },
            "quantized_linears": sum(len(plan.linears) for plan in plans),
            "float_linears": {k: v for plan in plans for k, v in plan.condensed().items()},
            "copied_files": len(self.source.copied),
            "served_by": served_by(self.plans),
            "source_bytes": _source_bytes(self),
            "output_bytes": self.bytes,
        }


def served_by(plans: Mapping[str, ComponentPlan]) -> list[str]:
    """Who serves the output."""
    native = all(plan.component.family.native for plan in plans.values())
    return ["vllm-omni (the checkpoint says how)"] if native else []


def inside_path(name: str, file: str) -> str:
    """The path of a transformer's file in the output."""
    return f"{name}/{file}" if name else file


def named_shards(plan: ComponentPlan, shard_bytes: int) -> dict[str, list[TensorPlan]]:
    """The weight files of a transformer: one, or several with an index."""
    shards = plan_shards(plan.tensors, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else shard_names(WEIGHTS, len(shards))
    return dict(zip(names, shards, strict=True))


def check_request(options: DiffusersOptions) -> CheckedDiffusers:
    """Checks a request against the files and the disk.

    Raises:
        MsQuantError: anything that would make the work fail later.
    """
    refuse_cached_place(options.output)
    source = open_directory(options.model)
    inside = options.output.resolve()
    for name in source.transformers:
        if inside.is_relative_to((source.path / name).resolve()):
            raise BadArgumentError(
                f"{options.output}: lies in the model, expected a directory apart from it"
            )
    components = {n: open_float_component(source.path / n, n) for n in source.transformers}
    storage = storage_of(options.scheme, options.scheme_options, run_type(options, components))
    check_patterns(options.exclude, list(components.values()))
    kept = None if options.dtype is None else _dtype(options.dtype)
    choice = Choice(options.exclude, options.float_undivided, kept)
    plans = {n: plan_component(part, storage, choice) for n, part in components.items()}
    _refuse_two_descriptions(plans, storage)
    checked = CheckedDiffusers(options, source, storage, plans, tuple(_notes(plans)))
    output = checked.output()
    if not output.finished:
        free_space_check(output.partial, checked.bytes - output.bytes_present())
    return checked


def run_type(options: DiffusersOptions, components: Mapping[str, Component]) -> np.dtype:
    """What the runtime computes in: as was asked, or float16 where all linears are."""
    if options.dtype is not None:
        return _dtype(options.dtype)
    codes = {
        part.checkpoint.info(f"{path}.weight").code
        for part in components.values()
        for path in part.shapes
    }
    return DTYPES["float16" if codes == {"F16"} else "bfloat16"]


def _dtype(name: str) -> np.dtype:
    if name not in RUN_TYPES:
        raise BadArgumentError(f"dtype is {name!r}, expected one of {', '.join(RUN_TYPES)}")
    return DTYPES[name]


def _refuse_two_descriptions(plans: Mapping[str, ComponentPlan], storage: Storage) -> None:
    """The runtime reads one description, beside the components, for all transformers."""
    if storage.method.name != ASCEND:
        return
    first, *others = plans.items()
    for name, plan in others:
        if plan.description() != first[1].description():
            raise UnsupportedError(
                f"{name}: other linears would be quantized than in {first[0]}, expected the same: "
                f"the runtime reads one {DESCRIPTION} for both; a mxfp8 or mxfp4 checkpoint may "
                "differ"
            )


def _notes(plans: Mapping[str, ComponentPlan]) -> list[str]:
    notes = []
    for plan in plans.values():
        family = plan.component.family
        if not family.native:
            notes.append(
                f"vllm-omni 0.30 has no network of its own for {family.name}, and its adapter for "
                "diffusers takes no such checkpoint: nothing is known to serve it yet"
            )
        for why in dict.fromkeys(plan.component.kept.values()):
            notes.append(f"{why}: they stay float")
    return list(dict.fromkeys(notes))


def _source_bytes(checked: CheckedDiffusers) -> int:
    files = [f for plan in checked.plans.values() for f in plan.component.checkpoint.files()]
    return sum(checked.source.copied_bytes().values()) + sum(file.stat().st_size for file in files)
