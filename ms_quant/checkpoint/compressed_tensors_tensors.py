"""The tensors of a quantized linear in the compressed-tensors flavour, written and read.

docs/compressed_tensors_format.md states them. What is read is checked: a tensor that contradicts
the plan or that holds what no writer makes is an error, as ``verify`` reads every linear this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ms_quant.checkpoint.compressed_tensors_config import PACKED, format_of
from ms_quant.checkpoint.flavour import Part, Tensors
from ms_quant.errors import MsQuantError
from ms_quant.models.families import LinearGroup
from ms_quant.numerics.activation import Activation, StaticActivation, StaticInt8
from ms_quant.numerics.grid import AffineFormat, AffineGrid
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.pack import WORD_BITS, pack_words, unpack_words

if TYPE_CHECKING:
    from ms_quant.checkpoint.reader import Checkpoint
    from ms_quant.plan import Plan

INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
WITH_CODES = frozenset({"weight", "weight_packed"})


def parts(plan: Plan, shape: tuple[int, int]) -> dict[str, Part]:
    """Suffix to tensor of a linear of shape (out, in), without its bias."""
    scheme, (rows, columns) = plan.scheme, shape
    weight, packed = scheme.weight, format_of(scheme) == PACKED
    assert isinstance(weight, AffineFormat)
    groups = columns // weight.group_size if weight.group_size else 1
    stored = scheme.scale_dtype(plan.dtype)
    result = _packed_codes(weight.bits, shape) if packed else {}
    if not packed:
        result["weight"] = Part(INT8, shape, lambda x: x.weight)
    result["weight_scale"] = Part(stored, (rows, groups), lambda x: _grid(x).scale.astype(stored))
    if not weight.symmetric:
        words = rows * weight.bits // WORD_BITS
        result["weight_zero_point"] = Part(
            INT32, (words, groups), lambda x: _packed_zero_point(_grid(x))
        )
    if isinstance(scheme.activation, StaticInt8):
        result["input_scale"] = Part(
            plan.dtype, (1,), lambda x: x.static.input_scale[:1].astype(plan.dtype)
        )
        result["input_zero_point"] = Part(INT8, (1,), lambda x: np.array([x.static.offset], INT8))
    return result


def _packed_codes(bits: int, shape: tuple[int, int]) -> dict[str, Part]:
    rows, columns = shape
    words = (rows, columns * bits // WORD_BITS)
    return {
        "weight_packed": Part(INT32, words, lambda x: pack_words(x.weight, "weight", bits)),
        "weight_shape": Part(INT64, (2,), lambda x: np.array(x.weight.shape, INT64)),
    }


def _packed_zero_point(grid: AffineGrid) -> np.ndarray:
    """Packed along the outputs."""
    words = pack_words(grid.zero_point.T, "weight_zero_point", grid.format.bits)
    return np.ascontiguousarray(words.T)


def _grid(linear: QuantizedLinear) -> AffineGrid:
    assert isinstance(linear.grid, AffineGrid)
    return linear.grid


class _Source:
    """The tensors of one linear, by suffix, of the types and shapes that they should have."""

    def __init__(self, checkpoint: Checkpoint, path: str, expected: Tensors):
        self.checkpoint, self.path, self.expected = checkpoint, path, expected

    def __call__(self, suffix: str) -> np.ndarray:
        self._check(suffix)
        return self.checkpoint.read(f"{self.path}.{suffix}")

    def scale(self, suffix: str) -> np.ndarray:
        """Positive finite float32."""
        self._check(suffix)
        array = self.checkpoint.read_float32(f"{self.path}.{suffix}")
        wrong = int(np.count_nonzero(array <= 0))
        if wrong:
            raise MsQuantError(
                f"{self.path}.{suffix}: {wrong} scales are not positive, expected all to be"
            )
        return array

    def _check(self, suffix: str) -> None:
        name, (dtype, shape) = f"{self.path}.{suffix}", self.expected[suffix]
        found = self.checkpoint.info(name)
        if (found.dtype, found.shape) != (dtype, shape):
            raise MsQuantError(
                f"{name}: is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
            )


def read_linear(
    plan: Plan, group: LinearGroup, checkpoint: Checkpoint, path: str, bias: np.ndarray | None
) -> QuantizedLinear:
    """The linear at a path, with its bias.

    Raises:
        MsQuantError: names the tensor that is wrong.
    """
    shape = plan.config.linear_shapes()[path.split(".", 3)[3]]
    expected = {key: (part.dtype, part.shape) for key, part in parts(plan, shape).items()}
    source, weight = _Source(checkpoint, path, expected), plan.scheme.weight
    assert isinstance(weight, AffineFormat)
    arrays = {"weight_scale": source.scale("weight_scale")}
    if not weight.symmetric:
        words = source("weight_zero_point").T
        arrays["weight_zero_point"] = unpack_words(words, path, weight.bits).T
    codes = _codes(source, weight.bits, shape)
    return QuantizedLinear(codes, weight.grid(arrays), bias, _activation(plan, source, shape[1]))


def _codes(source: _Source, bits: int, shape: tuple[int, int]) -> np.ndarray:
    if "weight" in source.expected:
        return source("weight")
    said = source("weight_shape").tolist()
    if said != list(shape):
        raise MsQuantError(f"{source.path}.weight_shape: is {said}, expected {list(shape)}")
    return unpack_words(source("weight_packed"), f"{source.path}.weight_packed", bits)


def _activation(plan: Plan, source: _Source, columns: int) -> Activation:
    format = plan.scheme.activation
    if format.dynamic:
        return format.fit(None, None)
    step, zero_point = source.scale("input_scale")[0], source("input_zero_point")[0]
    vector = np.full(columns, step, np.float32)
    return StaticActivation(step, int(zero_point), vector)  # the runtime adds the float bias
