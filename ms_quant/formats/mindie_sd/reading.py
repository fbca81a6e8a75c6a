"""A quantized linear from its tensors in the mindie-sd format. What is read is checked.

Files of other writers are read, too: scales in any float type, ``deq_scale`` in both of its types,
E2M1 weights as E4M3. What is stated for static inputs is what counts, as in the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.reader import MODEL_CODES, Checkpoint
from ms_quant.formats.ascend.tensors import narrowed
from ms_quant.formats.mindie_sd.choice import check_linear
from ms_quant.formats.mindie_sd.held import FLOAT32, held_dtype
from ms_quant.formats.mindie_sd.tensors import INNER, MUL_SCALE, codes_of
from ms_quant.formats.mindie_sd.types import TYPES
from ms_quant.numerics import minifloat
from ms_quant.numerics.activation import StaticActivation, StaticInt8
from ms_quant.numerics.affine import QMAX, QMIN, SMALLEST_SCALE
from ms_quant.numerics.float_grid import DualMxFormat, MxFormat
from ms_quant.numerics.grid import Grid
from ms_quant.numerics.linear import QuantizedLinear, smooth_of, with_tensors
from ms_quant.numerics.timestep import StatedTables, Timestep, TimestepActivation
from ms_quant.numerics.timestep_linear import timestep_tables

ROUNDING = 1 / 16  # two scales in bfloat16 differ from their product by 1/128 at most


class Tensors:
    """The tensors of a file.

    Args:
        checkpoint (Checkpoint): that holds the file alone.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names = frozenset(checkpoint.names)

    def prefix(self, path: str) -> str:
        """What the names of a linear's tensors begin with: a smoothed one is wrapped."""
        return f"{path}.{INNER}" if f"{path}.{MUL_SCALE}" in self.names else f"{path}."

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none."""
        return self.checkpoint.info(name).shape if name in self.names else None

    def read(
        self, name: str, codes: Sequence[str], shape: tuple[int, ...], type: str
    ) -> np.ndarray:
        """A tensor of one of some types.

        Raises:
            MsQuantError: there is none, or it has another type or shape.
        """
        wanted = f"{' or '.join(codes)} {list(shape)} of a {type} linear"
        if name not in self.names:
            where = self.checkpoint.files()[0] if self.names else self.checkpoint.directory
            raise BadFileError(f"{where}: has no tensor {name!r}, expected {wanted}")
        info = self.checkpoint.info(name)
        if info.code not in codes or info.shape != shape:
            raise BadFileError(
                f"{self.checkpoint.place(name)} is {info.code} {list(info.shape)}, expected "
                f"{wanted}"
            )
        if info.code in MODEL_CODES:
            return self.checkpoint.read_float32(name)
        return self.checkpoint.read(name)


class _Source:
    """The tensors of one linear, by suffix, as the runtime holds them."""

    def __init__(self, tensors: Tensors, path: str, type: str, dtype: np.dtype) -> None:
        self.tensors, self.type, self.dtype = tensors, type, dtype
        self.path, self.prefix = path, tensors.prefix(path)

    def has(self, suffix: str) -> bool:
        return f"{self.prefix}{suffix}" in self.tensors.names

    def code(self, suffix: str) -> str:
        name = f"{self.prefix}{suffix}"
        return self.tensors.checkpoint.info(name).code if self.has(suffix) else ""

    def read(self, suffix: str, shape: tuple[int, ...], *codes: str) -> np.ndarray:
        return self.tensors.read(f"{self.prefix}{suffix}", codes, shape, self.type)

    def floats(self, suffix: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of any float type, rounded as the loader rounds it."""
        held = held_dtype(self.type, suffix, self.dtype)
        with np.errstate(over="ignore"):
            array = self.read(suffix, shape, *MODEL_CODES).astype(held).astype(np.float32)
        self.require(np.isfinite(array), suffix, f"values exceed {held.name}")
        return array

    def scale(self, suffix: str, shape: tuple[int, ...], zero: bool = False) -> np.ndarray:
        """Positive float32, or at least 0."""
        array = self.floats(suffix, shape)
        good = array >= 0 if zero else array > 0
        type = held_dtype(self.type, suffix, self.dtype).name
        wanted = "at least 0" if zero else "positive"
        self.require(good, suffix, f"scales are not {wanted} in {type}")
        return array

    def whole(self, suffix: str, shape: tuple[int, ...]) -> np.ndarray:
        """int8 zero points, in any type."""
        array = self.read(suffix, shape, *MODEL_CODES, "I8", "I32", "I64")
        whole = (array == np.rint(array)) & (array >= QMIN) & (array <= QMAX)
        self.require(whole, suffix, f"zero points are not whole numbers of {QMIN} to {QMAX}")
        return array.astype(np.int8)

    def deq_scale(self, shape: tuple[int, ...], zero: bool = False) -> np.ndarray:
        """float32, also where its bits are stored as integers."""
        if self.code("deq_scale") != "I64":
            return self.scale("deq_scale", shape, zero)
        stored = self.read("deq_scale", shape, "I64")
        self.require(stored == stored.astype(np.int32), "deq_scale", "values exceed 32 bits")
        array = narrowed(stored)
        good = np.isfinite(array) & ((array >= 0) if zero else (array > 0))
        self.require(good, "deq_scale", "scales are not positive and finite")
        return array

    def require(self, good: np.ndarray, suffix: str, what: str) -> None:
        wrong = int(good.size - np.count_nonzero(good))
        if wrong:
            where = self.tensors.checkpoint.place(f"{self.prefix}{suffix}")
            raise BadFileError(f"{where}: {wrong} of {good.size} {what}")


def read(
    type: str,
    tensors: Tensors,
    path: str,
    shape: tuple[int, int],
    dtype: np.dtype = FLOAT32,
) -> QuantizedLinear:
    """The linear at a path, with the bias of the file.

    Args:
        type: a name from ``TYPES``.
        tensors: of the file.
        path: the linear's.
        shape: (out, in), as the network has it.
        dtype: what the model runs in, to which the loader rounds scales; float32 is as stored.

    Raises:
        MsQuantError: names the tensor that is missing or wrong.
    """
    check_linear(type, shape, f"{path}.{MUL_SCALE}" in tensors.names, False, path)
    source, scheme = _Source(tensors, path, type, dtype), TYPES[type].make()
    if source.has("weight_offset"):
        offset = source.read("weight_offset", (shape[0], 1), *MODEL_CODES, "I8", "I32")
        source.require(offset == 0, "weight_offset", "offsets are not 0, MindIE-SD ignores them")
    weight = _codes(source, shape)
    bias = source.floats("bias", shape[:1]) if source.has("bias") else None
    static = isinstance(scheme.activation, StaticInt8)
    grid, smooth = _unit(type) if static else _grid(source, shape), _smooth(source, shape)
    linear = QuantizedLinear(weight, grid, bias, smooth=smooth, input_dtype=dtype)
    if static:
        return _static(source, linear)
    if isinstance(scheme.activation, Timestep):
        return _timesteps(source, linear)
    return replace(linear, activation=scheme.activation.fit(None, None))


def _codes(source: _Source, shape: tuple[int, int]) -> np.ndarray:
    codes, name = codes_of(source.type), f"{source.prefix}weight"
    if codes.dtype == np.uint8 and source.code("weight") == "F8_E4M3":
        return _e2m1_in_e4m3(source, shape)
    code = {"int8": "I8", "uint8": "U8"}.get(codes.dtype.name, "F8_E4M3")
    stored = source.read("weight", codes.shape(*shape), code)
    return codes.unpack(stored, shape[1], source.tensors.checkpoint.place(name))


def _e2m1_in_e4m3(source: _Source, shape: tuple[int, int]) -> np.ndarray:
    """Codes of E2M1 values that are stored one by one, not packed."""
    values = source.read("weight", shape, "F8_E4M3").astype(np.float32)
    finite = np.nan_to_num(values, nan=np.inf)
    codes = minifloat.encode(np.clip(finite, -6, 6), minifloat.E2M1)
    same = minifloat.decode(codes, minifloat.E2M1) == values
    source.require(same, "weight", "values are no E2M1 numbers")
    return codes


def _smooth(source: _Source, shape: tuple[int, int]) -> np.ndarray | None:
    name = f"{source.path}.{MUL_SCALE}"
    if name not in source.tensors.names:
        return None
    mul_scale = source.tensors.read(name, MODEL_CODES, shape[1:], source.type)
    with np.errstate(over="ignore"):
        mul_scale = mul_scale.astype(source.dtype).astype(np.float32)
    good = (mul_scale >= SMALLEST_SCALE) & np.isfinite(mul_scale)
    wrong = int(good.size - np.count_nonzero(good))
    if wrong:
        place, type = source.tensors.checkpoint.place(name), source.dtype.name
        raise BadFileError(
            f"{place}: {wrong} of {good.size} factors are not positive and finite in {type}"
        )
    return smooth_of(mul_scale, source.dtype)


def _grid(source: _Source, shape: tuple[int, int]) -> Grid:
    format, (rows, columns) = TYPES[source.type].make().weight, shape
    if not isinstance(format, MxFormat | DualMxFormat):
        return format.grid({"weight_scale": source.scale("weight_scale", (rows, 1))})
    blocks = (rows, -(-columns // format.group_size))
    exponents = source.read("weight_scale", blocks, "U8")
    source.require(exponents != 255, "weight_scale", "exponents are 255 (NaN)")
    arrays = {"weight_exponent": exponents}
    if isinstance(format, DualMxFormat):
        long = (rows, -(-columns // format.dual_block_size), 1)
        arrays["weight_dual_scale"] = source.scale("weight_dual_scale", long)[..., 0]
    return format.grid(arrays)


def _unit(type: str) -> Grid:
    """A grid for a weight whose scale is known in a product only."""
    return TYPES[type].make().weight.grid({"weight_scale": np.ones((1, 1), np.float32)})


def _static(source: _Source, linear: QuantizedLinear) -> QuantizedLinear:
    rows, columns = linear.weight.shape
    step, offset = source.scale("input_scale", (1,)), source.whole("input_offset", (1,))
    vector = np.full(columns, step[0], np.float32)
    static = StaticActivation(np.float32(1), int(offset[0]), vector, folds_bias=True)
    deq_scale, quant_bias = source.deq_scale((rows,)), source.read("quant_bias", (rows,), "I32")
    return with_tensors(replace(linear, activation=static), deq_scale, quant_bias)


def _timesteps(source: _Source, linear: QuantizedLinear) -> QuantizedLinear:
    """Where the tables are not those that follow from the scales they are kept as stated."""
    found, rows = source.tensors.shape(f"{source.prefix}input_scale"), len(linear.weight)
    steps = max(1, found[0]) if found else 1
    scale = source.scale("input_scale", (steps, 1), zero=True)[:, 0]
    activation = TimestepActivation(scale, source.whole("input_offset", (steps, 1))[:, 0])
    linear = replace(linear, activation=activation)
    deq_scale = source.deq_scale((steps, rows), zero=True)
    quant_bias = source.read("quant_bias", (steps, rows), "I32")
    made_scale, made_bias = timestep_tables(linear, source.prefix[:-1])
    reached = scale > 0
    if linear.bias is None and not np.array_equal(made_bias[reached], quant_bias[reached]):
        raise BadFileError(
            f"{source.tensors.checkpoint.place(f'{source.prefix}quant_bias')}: has a bias in it, "
            f"expected {source.prefix}bias as well, which dynamic timesteps add"
        )
    if np.array_equal(made_scale, deq_scale) and np.array_equal(made_bias, quant_bias):
        return linear
    near = np.abs(deq_scale - made_scale) <= ROUNDING * made_scale
    source.require(near, "deq_scale", "values are not input_scale * weight_scale, rounded")
    return replace(
        linear, activation=replace(activation, stated=StatedTables(deq_scale, quant_bias))
    )


def with_bias_of(linear: QuantizedLinear, type: str, wanted: bool, name: str) -> QuantizedLinear:
    """The linear as a layer with or without a bias takes it.

    Static types have it in ``quant_bias``, whatever else there is. Zeros are no bias: a writer adds
    them where the runtime fails without one.

    Raises:
        MsQuantError: the layer has a bias and the file none or the other way round, or the runtime
            drops it.
    """
    zeros = linear.bias is not None and not linear.bias.any()
    rows, columns = linear.weight.shape
    check_linear(type, (rows, columns), False, wanted or linear.bias is not None, name)
    if isinstance(TYPES[type].make().activation, StaticInt8):
        return linear
    if wanted and linear.bias is None:
        raise BadFileError(
            f"{name}.bias: the file has none, expected one of {rows} values as the layer has a bias"
        )
    if not wanted and linear.bias is not None:
        if zeros:
            return replace(linear, bias=None)
        raise BadFileError(f"{name}.bias: the layer has no bias, expected none in the file")
    return linear
