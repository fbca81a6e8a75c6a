"""The tensors of a quantized linear in the compressed-tensors format, written and read.

docs/compressed_tensors_format.md states them. What is read is checked: a tensor that contradicts
the plan or that holds what no writer makes is an error, as ``verify`` reads every linear this way.
"""

from __future__ import annotations

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.ascend.codes import E4M3, no_nan
from ms_quant.formats.compressed_tensors.config import FLOAT8, PACKED, format_of
from ms_quant.formats.format import Part, Tensors
from ms_quant.models.block_spec import LinearGroup, LinearSpec
from ms_quant.numerics.activation import Activation, StaticActivation, StaticInt8
from ms_quant.numerics.float8_blocks import by_block, by_row
from ms_quant.numerics.grid import AffineFormat, AffineGrid, WeightFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.pack import WORD_BITS, pack_words, unpack_words
from ms_quant.numerics.storage import DTYPES
from ms_quant.plan.layer import LayerPlan

INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
WITH_CODES = frozenset({"weight", "weight_packed"})


def parts(layer: LayerPlan, shape: tuple[int, int]) -> dict[str, Part]:
    """Suffix to tensor of a linear of shape (out, in), without its bias."""
    scheme, format = layer.scheme, format_of(layer.scheme)
    stored = layer.storage.scale_dtype
    if format == FLOAT8:
        return _float8(scheme.weight, stored, shape)
    weight, (rows, columns) = scheme.weight, shape
    assert isinstance(weight, AffineFormat)
    groups = columns // weight.group_size if weight.group_size else 1
    result = _packed_codes(weight.bits, shape) if format == PACKED else {}
    if format != PACKED:
        result["weight"] = Part(INT8, shape, lambda x: x.weight)
    result["weight_scale"] = Part(stored, (rows, groups), lambda x: _grid(x).scale.astype(stored))
    if not weight.symmetric:
        words = rows * weight.bits // WORD_BITS
        result["weight_zero_point"] = Part(
            INT32, (words, groups), lambda x: _packed_zero_point(_grid(x))
        )
    if isinstance(scheme.activation, StaticInt8):
        result |= _static(scheme.activation, layer.dtype)
    return result


def _static(activation: StaticInt8, dtype: np.dtype) -> dict[str, Part]:
    result = {"input_scale": Part(dtype, (1,), lambda x: x.static.input_scale[:1].astype(dtype))}
    if not activation.symmetric:
        result["input_zero_point"] = Part(INT8, (1,), lambda x: np.array([x.static.offset], INT8))
    return result


def _float8(weight: WeightFormat, stored: np.dtype, shape: tuple[int, int]) -> dict[str, Part]:
    """E4M3 codes, and scales of rows or, one for each, of blocks."""
    rows, columns = shape
    step = getattr(weight, "row_block", 1)
    scales = (-(-rows // step), -(-columns // weight.group_size) if weight.group_size else 1)
    return {
        "weight": Part(E4M3, shape, lambda x: x.weight.view(E4M3)),
        "weight_scale": Part(
            stored,
            scales,
            lambda x: by_block(x.grid.arrays()["weight_scale"], step).astype(stored),
        ),
    }


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

    def __init__(self, checkpoint: Checkpoint, path: str, expected: Tensors, foreign: bool):
        self.checkpoint, self.path, self.expected = checkpoint, path, expected
        self.foreign = foreign

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

    def check_zeros(self, *suffixes: str) -> None:
        """Zero points that old versions of the library store although they are symmetric.

        Raises:
            MsQuantError: one is not 0.
        """
        for suffix in suffixes:
            name = f"{self.path}.{suffix}"
            if suffix not in self.expected and name in self.checkpoint:
                array = self.checkpoint.read(name)
                wrong = int(np.count_nonzero(array))
                if array.dtype.kind not in "iu" or wrong:
                    raise MsQuantError(
                        f"{name}: {wrong} of {array.size} values are not 0, expected whole zeros: "
                        "the description says symmetric"
                    )

    def _check(self, suffix: str) -> None:
        name, (dtype, shape) = f"{self.path}.{suffix}", self.expected[suffix]
        found = self.checkpoint.info(name)
        if self.foreign and suffix == "input_scale" and found.dtype.name in DTYPES:
            dtype = found.dtype
        if (found.dtype, found.shape) != (dtype, shape):
            raise MsQuantError(
                f"{name}: is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
            )


def read_linear(
    layer: LayerPlan,
    group: LinearGroup,
    spec: LinearSpec,
    checkpoint: Checkpoint,
    path: str,
    bias: np.ndarray | None,
) -> QuantizedLinear:
    """The linear at a path, with its bias.

    Raises:
        MsQuantError: names the tensor that is wrong.
    """
    shape = spec.shape
    expected = {key: (part.dtype, part.shape) for key, part in parts(layer, shape).items()}
    source, weight = _Source(checkpoint, path, expected, layer.foreign), layer.scheme.weight
    source.check_zeros("weight_zero_point", "input_zero_point")
    arrays = {"weight_scale": source.scale("weight_scale")}
    if not isinstance(weight, AffineFormat):
        codes = no_nan(source("weight"), shape[1], f"{path}.weight")
        arrays["weight_scale"] = by_row(
            arrays["weight_scale"], shape[0], getattr(weight, "row_block", 1)
        )
        return QuantizedLinear(
            codes, weight.grid(arrays), bias, layer.scheme.activation.fit(None, None)
        )
    if not weight.symmetric:
        words = source("weight_zero_point").T
        arrays["weight_zero_point"] = unpack_words(words, path, weight.bits).T
    codes = _codes(source, weight.bits, shape)
    return QuantizedLinear(codes, weight.grid(arrays), bias, _activation(layer, source, shape[1]))


def _codes(source: _Source, bits: int, shape: tuple[int, int]) -> np.ndarray:
    if "weight" in source.expected:
        return source("weight")
    said = source("weight_shape").tolist()
    if said != list(shape):
        raise MsQuantError(f"{source.path}.weight_shape: is {said}, expected {list(shape)}")
    return unpack_words(source("weight_packed"), f"{source.path}.weight_packed", bits)


def _activation(layer: LayerPlan, source: _Source, columns: int) -> Activation:
    format = layer.scheme.activation
    if format.dynamic:
        return format.fit(None, None)
    step = source.scale("input_scale")[0]
    zero_point = int(source("input_zero_point")[0]) if "input_zero_point" in source.expected else 0
    vector = np.full(columns, step, np.float32)
    return StaticActivation(step, zero_point, vector)  # the runtime adds the float bias
