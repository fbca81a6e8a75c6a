"""Finished checkpoints as evaluation and generation see them, whatever their format.

A format is read by a class with the attributes of :class:`ServedModel`. Other packages add
theirs under the entry point group ``ms_quant.checkpoint_readers``: a function that takes the
directory and returns a ``ServedModel``, or None when the directory is not of its format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.floats import round_chunks, round_finite
from ms_quant.files.reader import FloatTensors
from ms_quant.files.writer import Array
from ms_quant.formats import kv_cache
from ms_quant.formats.checks import format_of
from ms_quant.formats.float_model import open_float
from ms_quant.formats.golden_stick.format import static_linear
from ms_quant.formats.plugins import first_answer
from ms_quant.formats.registry import is_quantized
from ms_quant.formats.source_kind import model_directory
from ms_quant.formats.structure import read_structure
from ms_quant.job.directory import JobDirectory
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix, parse_linear
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.plan import Plan
from ms_quant.quantization.divided import as_divided

__all__ = [
    "FloatModel",
    "JobModel",
    "QuantizedModel",
    "ServedModel",
    "open_model",
    "static_linear",
]


class ServedModel(Protocol):
    """Attributes:
    config: the model's shape.
    format: what to call the checkpoint.
    phased: whether some linears tell prefill and decode apart.
    """

    config: ModelConfig
    format: str
    phased: bool

    def tensor(self, name: str) -> np.ndarray:
        """A float tensor by its Hugging Face name, float32."""

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The same in pieces of bounded size: (first row, float32 rows)."""

    def linear(self, path: str) -> QuantizedLinear | None:
        """The quantized linear at a path, with its bias; None when it is float."""

    def cache_scales(self, index: int) -> dict[str, np.ndarray] | None:
        """Static scales of a block's cache, by the paths of what it has in int8, keys before
        values; None when in float."""


class FloatModel:
    """A Hugging Face checkpoint."""

    format, phased = "float", False
    checkpoint: FloatTensors

    def __init__(self, directory: Path):
        self.config, self.checkpoint = open_float(directory)

    def tensor(self, name: str) -> np.ndarray:
        return self.checkpoint.read_float32(name)

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        return self.checkpoint.float32_chunks(name)

    def linear(self, path: str) -> QuantizedLinear | None:
        return None

    def cache_scales(self, index: int) -> dict[str, np.ndarray] | None:
        return None


class JobNumbers:
    """The numbers of a finished job and of the float model that it was made from.

    Args:
        plan: what was done.
        job: the finished job.
        checkpoint: the float model, as the job has read it.
    """

    def __init__(self, plan: Plan, job: JobDirectory, checkpoint: FloatTensors):
        self.plan, self.job = plan, job
        self.checkpoint = as_divided(checkpoint, plan.config, job.ranges(), str(job.directory))
        self._names = set(self.checkpoint.names)

    def linear(self, path: str, with_codes: bool = True) -> QuantizedLinear:
        linear, name = parse_linear(path), f"{path}.bias"
        bias = self.read(name) if name in self._names else None
        found = self.job.linear(linear.block, linear.inner, with_codes)
        return replace(found, bias=bias, input_dtype=self.plan.dtype)

    def read(self, name: str) -> np.ndarray:
        """A float tensor in float32."""
        changed = self.job.changed_tensor(name)
        return self.checkpoint.read_float32(name) if changed is None else changed

    def floats(self, name: str, dtype: np.dtype) -> Array:
        changed = self.job.changed_tensor(name)
        if changed is not None:
            return round_finite(changed, dtype, name)
        return round_chunks(self.checkpoint, name, dtype)

    def cache_scale(self, path: str) -> np.ndarray:
        linear = parse_linear(path)
        return self.job.cache_scale(linear.block, linear.inner)


class JobModel(FloatModel):
    """The blocks of a finished job in the float model that they were made from.

    Float tensors are those that a checkpoint of the plan's format would hold, in its types.

    Args:
        plan: what was done.
        job: the finished job.
        checkpoint: the float model, as the job has read it.
    """

    def __init__(self, plan: Plan, job: JobDirectory, checkpoint: FloatTensors):
        self.config = plan.config
        self.numbers = JobNumbers(plan, job, checkpoint)
        self.checkpoint = self.numbers.checkpoint
        self.format, self.phased = plan.scheme_name, plan.phased
        self._quantized = frozenset(plan.quantized())
        self._types = {}
        for tensor in format_of(plan).tensor_plans(plan):
            self._types[tensor.source or tensor.name] = tensor.dtype

    def tensor(self, name: str) -> np.ndarray:
        return self._rounded(name, self.numbers.read(name))

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        for start, part in super().chunks(name):
            yield start, self._rounded(name, part)

    def _rounded(self, name: str, array: np.ndarray) -> np.ndarray:
        return round_finite(array, self._types[name], name).astype(np.float32)

    def linear(self, path: str) -> QuantizedLinear | None:
        if path not in self._quantized:
            return None
        linear, name = self.numbers.linear(path), f"{path}.bias"
        return linear if linear.bias is None else replace(linear, bias=self.tensor(name))

    def cache_scales(self, index: int) -> dict[str, np.ndarray] | None:
        prefix, cached = block_prefix(index), self.numbers.plan.cached(index)
        return {path: self.numbers.cache_scale(prefix + path) for path in cached} or None


class QuantizedModel:
    """A checkpoint of one of ``FORMATS``. What it reads it checks: a defect is an error."""

    def __init__(self, directory: Path):
        structure, problems = read_structure(directory)
        if structure is None or problems:
            raise BadFileError(problems[0])
        self.plan, self.row, self.structure = structure.plan, structure.format, structure
        self.config, self.phased = structure.plan.config, structure.plan.phased
        self.checkpoint = structure.checkpoint
        self._quantized = frozenset(self.plan.quantized())
        self._floats = frozenset(self.config.parameter_shapes())
        kinds = [self.plan.kv_cache, *(layer.scheme.name for layer in self.plan.distinct)]
        found = "+".join(sorted(filter(None, kinds))) if self._quantized else "FLOAT"
        self.format = f"{self.row.name} {found}"

    def stored_name(self, name: str) -> str:
        """The name in the files of a float tensor of the model."""
        path, _, suffix = name.rpartition(".")
        if suffix == "bias" and path in self._quantized:
            return self.row.bias_name(self.plan.quantized_layer(path), path)
        return name

    def tensor(self, name: str) -> np.ndarray:
        return self.checkpoint.read_float32(self.stored_name(name))

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        return self.checkpoint.float32_chunks(self.stored_name(name))

    def linear(self, path: str) -> QuantizedLinear | None:
        if path not in self._quantized:
            return None
        name = f"{path}.bias"
        bias = self.tensor(name) if name in self._floats else None
        found = parse_linear(path)
        block = self.config.block(found.block)
        group = block.group_of(found.inner)
        assert group is not None
        layer, spec = self.plan.layer(found.block, group), block.linears[found.inner]
        return self.row.read_linear(layer, group, spec, self.checkpoint, path, bias)

    def cache_scales(self, index: int) -> dict[str, np.ndarray] | None:
        prefix, cached = block_prefix(index), self.plan.cached(index)
        scales = {path: kv_cache.read_scale(self.checkpoint, prefix + path) for path in cached}
        return scales or None


def open_model(directory: str | PathLike[str]) -> ServedModel:
    """Opens a float checkpoint or a finished one of any known format, tensor by tensor.

    Args:
        directory: the checkpoint.

    Returns:
        ServedModel: its config and format, and what reads its float tensors and quantized linears.

    Raises:
        MsQuantError: the directory does not exist or is of no known format.

    Examples:
        >>> import ms_quant
        >>> model = ms_quant.open_model("Qwen3-8B")
        >>> model.format, model.config.num_layers
        ('float', 2)
        >>> model.tensor("model.norm.weight").dtype
        dtype('float32')
    """
    directory = model_directory(Path(directory))
    model: ServedModel | None = first_answer("ms_quant.checkpoint_readers", directory)
    if model is not None:
        return model
    if is_quantized(directory):
        return QuantizedModel(directory)
    return FloatModel(directory)
