"""One transformer on disk: its config, its tensors, and which of them are linears of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ms_quant.diffusers.directory import CONFIG, class_of
from ms_quant.diffusers.families import FAMILIES
from ms_quant.diffusers.family import Family, Stack, size_of
from ms_quant.errors import BadFileError, UnsupportedError, short
from ms_quant.files.reader import MODEL_CODES, Checkpoint, check_tensor
from ms_quant.files.strict_json import read_json
from ms_quant.models.block_spec import LinearGroup, LinearSpec

WEIGHTS = "diffusion_pytorch_model"
SINGLE = f"{WEIGHTS}.safetensors"
INDEX = f"{WEIGHTS}.safetensors.index.json"
ENTRY = "quantization_config"
MOST_NAMED = 3
FLOATS = (*MODEL_CODES, "F64")  # tables of positions are made in float64


@dataclass(frozen=True)
class Component:
    """A transformer.

    Attributes:
        name: its directory in the pipeline; "" where it stands alone.
        directory: where it is.
        config: the content of its ``config.json``.
        family: what it is made of.
        checkpoint: its tensors.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    family: Family
    checkpoint: Checkpoint

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG

    @cached_property
    def _blocks(self) -> list[tuple[Stack, str]]:
        return list(self.family.blocks(self.config, str(self.config_path)))

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears that can be quantized, those that the runtime fuses together."""
        return tuple(self._groups(""))

    @cached_property
    def kept(self) -> dict[str, str]:
        """Path of a linear of a block to why it stays float."""
        reasons = dict.fromkeys(stack.kept for stack, _ in self._blocks if stack.kept)
        return {p: why for why in reasons for g in self._groups(why) for p in g.linears}

    def _groups(self, kept: str) -> Iterator[LinearGroup]:
        sizes = self.family.sizes(self.config, str(self.config_path))
        for stack, block in self._blocks:
            for group in stack.groups_of(self.config) if stack.kept == kept else ():
                linears = {
                    f"{block}.{path}": LinearSpec(size_of(out, sizes), size_of(into, sizes))
                    for path, (out, into) in group.items()
                }
                first = next(iter(linears))
                fused = self.family.fused_name(tuple(linears)) or self.family.runtime_name(first)
                yield LinearGroup(first, first, linears, fused)

    @cached_property
    def all_groups(self) -> tuple[LinearGroup, ...]:
        """The linears of blocks, those that stay float in any case among them."""
        return (
            *self.groups,
            *(g for why in dict.fromkeys(self.kept.values()) for g in self._groups(why)),
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Path of each linear of a block to (out, in)."""
        return {p: spec.shape for group in self.all_groups for p, spec in group.linears.items()}

    def required(self) -> Iterator[str]:
        """Modules and tensors that the model has."""
        yield from self.family.floats
        yield from self.shapes
        for stack, block in self._blocks:
            yield from (f"{block}.{path}" for path in stack.floats)

    def optional(self) -> Iterator[str]:
        """Modules and tensors that it may have."""
        yield from self.family.optional
        for stack, block in self._blocks:
            yield from (f"{block}.{path}" for path in stack.optional)

    def float_linears(self, quantized: Mapping[str, Any]) -> list[str]:
        """Paths of all weights of two dimensions but the quantized ones."""
        return [
            name.removesuffix(".weight")
            for name in self.checkpoint.names
            if name.endswith(".weight")
            and len(self.checkpoint.info(name).shape) == 2
            and name.removesuffix(".weight") not in quantized
        ]

    def check_names(self, further: Iterable[str] = ()) -> None:
        """Refuses a model that lacks a tensor or has one that is not known.

        Args:
            further: names of the tensors of quantized linears.

        Raises:
            MsQuantError: names the tensors.
        """
        names, known = set(self.checkpoint.names), set(further)
        for path in self.required():
            if not names & {path, f"{path}.weight"}:
                raise BadFileError(
                    f"{self.directory}: has no tensor {f'{path}.weight'!r}, expected it of a "
                    f"{self.family.name}"
                )
        for path in [*self.required(), *self.optional()]:
            known |= {path, f"{path}.weight", f"{path}.bias"}
        if names - known:
            found = sorted(names - known)
            more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            listed = ", ".join(map(repr, found[:MOST_NAMED]))
            raise BadFileError(
                f"{self.checkpoint.place(found[0]).partition(': tensor')[0]}: holds {listed}"
                f"{more}, expected only the tensors of a {self.family.name}"
            )


def open_component(directory: Path, name: str = "") -> Component:
    """A transformer, float or quantized; its headers are read.

    Raises:
        MsQuantError: the class is not known, or the files are malformed.
    """
    config = read_json(directory / CONFIG)
    family = FAMILIES[class_of(directory)]
    pickles = sorted(directory.glob(f"{WEIGHTS}*.bin"))
    if pickles and not list(directory.glob(f"{WEIGHTS}*.safetensors")):
        raise BadFileError(
            f"{pickles[0]}: is a pickle file, which is not read, expected {SINGLE}: "
            "save_pretrained(safe_serialization=True) writes it"
        )
    return Component(name, directory, config, family, Checkpoint(directory, WEIGHTS))


def open_float_component(directory: Path, name: str = "") -> Component:
    """A transformer in float.

    Raises:
        MsQuantError: it is quantized, lacks a tensor, has one too many, or one of another shape.
    """
    found = open_component(directory, name)
    if found.config.get(ENTRY) is not None:
        entry = found.config[ENTRY]
        method = entry.get("quant_method", entry.get("method")) if isinstance(entry, dict) else None
        raise UnsupportedError(
            f"{found.config_path}: has a {ENTRY} ({short(method or entry)}), expected a float "
            "model: a quantized one is not quantized again"
        )
    found.check_names()
    for path, shape in found.shapes.items():
        check_tensor(found.checkpoint, f"{path}.weight", shape)
    for tensor in found.checkpoint.names:
        code = found.checkpoint.info(tensor).code
        if code not in FLOATS:
            raise BadFileError(
                f"{found.checkpoint.place(tensor)} has dtype {code}, expected one of "
                f"{', '.join(FLOATS)}"
            )
    return found
