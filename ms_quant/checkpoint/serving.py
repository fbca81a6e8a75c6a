"""Finished checkpoints as evaluation and generation see them, whatever their flavour.

A flavour is read by a class with the attributes of :class:`ServedModel`. Other packages add
theirs under the entry point group ``ms_quant.checkpoint_readers``: a function that takes the
directory and returns a ``ServedModel``, or None when the directory is not of its flavour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import numpy as np

from ms_quant.checkpoint import golden_stick
from ms_quant.checkpoint.job import JobDirectory
from ms_quant.checkpoint.reader import Checkpoint, FloatTensors, check_model
from ms_quant.checkpoint.structure import read_structure
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.plan import Plan


class ServedModel(Protocol):
    """Attributes:
    config: the model's shape.
    flavour: what to call the checkpoint.
    """

    config: ModelConfig
    flavour: str

    def tensor(self, name: str) -> np.ndarray:
        """A float tensor by its Hugging Face name, float32."""

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The same in pieces of bounded size: (first row, float32 rows)."""

    def linear(self, path: str) -> QuantizedLinear | None:
        """The int8 linear at a path, with its bias; None when it is float."""


class FloatModel:
    """A Hugging Face checkpoint."""

    flavour = "float"
    checkpoint: FloatTensors

    def __init__(self, directory: Path):
        self.config = load_config(directory)
        checkpoint = Checkpoint(directory)
        check_model(checkpoint, self.config)
        self.checkpoint = checkpoint

    def tensor(self, name: str) -> np.ndarray:
        return self.checkpoint.read_float32(name)

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        return self.checkpoint.float32_chunks(name)

    def linear(self, path: str) -> QuantizedLinear | None:
        return None


class JobModel(FloatModel):
    """The blocks of a finished job in the float model that they were made from.

    Args:
        plan: what was done.
        job: the finished job.
        checkpoint: the float model, as the job has read it.
    """

    def __init__(self, plan: Plan, job: JobDirectory, checkpoint: FloatTensors):
        self.config, self.checkpoint = plan.config, checkpoint
        self.flavour, self.job = plan.scheme.name, job
        self._quantized = frozenset(plan.quantized())

    def tensor(self, name: str) -> np.ndarray:
        found = self.job.changed_tensor(name)
        return super().tensor(name) if found is None else found

    def linear(self, path: str) -> QuantizedLinear | None:
        if path not in self._quantized:
            return None
        _, _, index, member = path.split(".", 3)
        bias = f"{path}.bias"
        found = self.tensor(bias) if bias in self.checkpoint.names else None
        return replace(self.job.linear(int(index), member), bias=found)


class GoldenStickModel:
    """A golden-stick checkpoint. What it reads it checks: a wrong quant_bias is an error."""

    def __init__(self, directory: Path):
        structure, problems = read_structure(directory)
        if structure is None or problems:
            raise MsQuantError(problems[0])
        self.config = structure.plan.config
        self.checkpoint = structure.checkpoint
        self.description = structure.description
        kinds = {str(kind) for name, kind in self.description.items() if "." in name}
        self.flavour = f"golden-stick {'+'.join(sorted(kinds - {'FLOAT'})) or 'FLOAT'}"

    def tensor(self, name: str) -> np.ndarray:
        return self.checkpoint.read_float32(name)

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        return self.checkpoint.float32_chunks(name)

    def linear(self, path: str) -> QuantizedLinear | None:
        kind = self.description.get(f"{path}.weight")
        if kind == "FLOAT":
            return None
        names, bias = self.checkpoint.names, None
        if f"{path}.bias" in names:
            bias = self.checkpoint.read_float32(f"{path}.bias")
        read = self.checkpoint.read
        if kind == "W8A8_DYNAMIC":
            scale = self.checkpoint.read_float32(f"{path}.weight_scale")
            return int8_linear(read(f"{path}.weight"), scale, bias)
        return static_linear(
            path,
            read(f"{path}.weight"),
            self.checkpoint.read_float32(f"{path}.deq_scale"),
            read(f"{path}.quant_bias"),
            self.checkpoint.read_float32(f"{path}.input_scale"),
            read(f"{path}.input_offset"),
            bias,
        )


def static_linear(
    path: str,
    weight: np.ndarray,
    deq_scale: np.ndarray,
    quant_bias: np.ndarray,
    input_scale: np.ndarray,
    input_offset: np.ndarray,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """A linear from the tensors of a static checkpoint, which must agree with each other.

    The split of ``deq_scale`` into an activation and a weight scale is not stored and does not
    matter: the activation scale is taken as 1.

    Raises:
        MsQuantError: offsets differ within the tensor, or quant_bias is not what the weight and
            the offset give.
    """
    if not input_offset.size:
        raise MsQuantError(f"{path}.input_offset: is empty, expected one zero point an input")
    if (input_offset != input_offset[0]).any():
        raise MsQuantError(f"{path}.input_offset: holds different values, expected one zero point")
    activation = StaticActivation(np.float32(1), int(input_offset[0]), input_scale)
    linear = int8_linear(weight, deq_scale, bias, activation)
    wrong = int(np.count_nonzero(linear.quant_bias != quant_bias))
    if wrong:
        raise MsQuantError(
            f"{path}.quant_bias: {wrong} of {quant_bias.size} values differ from "
            "-input_offset * sum of the weight's row"
        )
    return linear


def open_model(directory: Path | str) -> ServedModel:
    """Opens a float checkpoint or a finished one of any known flavour.

    Raises:
        MsQuantError: the directory does not exist or is of no known flavour.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MsQuantError(f"{directory}: no such model directory")
    for point in sorted(entry_points(group="ms_quant.checkpoint_readers"), key=lambda p: p.name):
        opener: Callable[[Path], ServedModel | None] = point.load()
        model = opener(directory)
        if model is not None:
            return model
    if (directory / golden_stick.DESCRIPTION).exists():
        return GoldenStickModel(directory)
    return FloatModel(directory)
