"""A quantized linear packed for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ms_quant.kernels import native
from ms_quant.kernels.native import Computed
from ms_quant.numerics.activation import Activation, Float, PerToken, PhasedActivation
from ms_quant.numerics.affine import LIMITS
from ms_quant.numerics.grid import AffineGrid, TwoLevelGrid
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, folded_bias

GROUP_MULTIPLE = 8  # inputs that one word of 4-bit codes holds


@dataclass(frozen=True)
class PackedLinear:
    """What the kernels read.

    Attributes:
        outputs: how many there are.
        weights: uint8 (bytes,), the codes in the layout of one instruction set.
        params: uint8 (bytes,), everything else; with ``decode`` in place of it in that phase.
        decode: for activations that differ between phases, or None.
        alike: how many rows at a time do not change what another gets; None for any number.
    """

    outputs: int
    weights: np.ndarray
    params: np.ndarray
    decode: np.ndarray | None = None
    alike: int | None = None

    def __call__(
        self, x: np.ndarray, decode: bool = False, threads: int | None = None
    ) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in), as ``QuantizedLinear.forward`` gives it."""
        x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), self.outputs), np.float32)
        self.write(x.ctypes.data, len(x), y.ctypes.data, decode, native.threads_of(threads))
        return y

    def step(self, x: np.ndarray) -> np.ndarray:
        """The same in decode, each row as if it were alone."""
        if self.alike is None or len(x) <= self.alike:
            return self(x, decode=True)
        parts = (x[at : at + self.alike] for at in range(0, len(x), self.alike))
        return np.concatenate([self(part, decode=True) for part in parts])

    def write(self, x: int, rows: int, y: int, decode: bool, threads: int) -> None:
        """The same for the addresses of contiguous memory."""
        weights, params, decode_params = self._places
        native.linear(weights, decode_params if decode else params, x, rows, y, threads)

    @cached_property
    def _places(self) -> tuple[native.Place, native.Place, native.Place]:
        params = native.place_of(self.params)
        decode = params if self.decode is None else native.place_of(self.decode)
        return native.place_of(self.weights), params, decode


def pack(linear: QuantizedLinear, isa: str | None = None) -> PackedLinear | None:
    """The linear for the kernels; None where they have none for it, or are not there.

    What happens to the input before the kernel is the caller's, if there is something: see
    :func:`transforms`.

    Args:
        linear: the linear.
        isa: an instruction set by its name; None for the fastest there is.
    """
    layout = layout_of(linear)
    if layout is None:
        return None
    decode = None if layout.decode is None else native.pack_params(layout.decode)
    weights = native.pack_weights(linear.weight, layout.bits, isa)
    alike = native.rows_alike(weights) if layout.computed.input == native.FLOAT else None
    params = native.pack_params(layout.computed)
    return PackedLinear(len(linear.weight), weights, params, decode, alike)


@dataclass(frozen=True)
class Layout:
    """How the kernels compute a linear.

    Attributes:
        bits: of a code.
        computed: what it computes with; with ``decode`` in place of it in that phase.
        decode: for activations that differ between phases, or None.
    """

    bits: int
    computed: Computed
    decode: Computed | None = None


def layout_of(linear: QuantizedLinear) -> Layout | None:
    """How the kernels compute a linear; None where they do not, or are not there."""
    grid, activation, shape = linear.grid, linear.activation, linear.weight.shape
    if linear.branch is not None or 0 in shape or not native.available():
        return None
    if isinstance(grid, TwoLevelGrid):
        if not isinstance(activation, PerToken) or grid.group % GROUP_MULTIPLE:
            return None
        arrays = {"scale": grid.second.scale, "row_scale": grid.scale}
        return Layout(4, _computed(linear, activation, arrays, grid.group))
    if not isinstance(grid, AffineGrid):
        return None
    if isinstance(activation, Float):
        groups = grid.scale.shape[1]
        if groups > 1 and (shape[1] // groups) % GROUP_MULTIPLE:
            return None
        arrays = {"scale": grid.scale}
        if not grid.format.symmetric:
            arrays["zero_point"] = grid.zero_point
        return Layout(grid.format.bits, _computed(linear, activation, arrays, shape[1] // groups))
    if linear.integer and isinstance(activation, PerToken | StaticActivation):
        return Layout(grid.format.bits, _of_integers(linear, activation))
    if linear.integer and isinstance(activation, PhasedActivation):
        decode = _of_integers(linear, activation.static)
        return Layout(grid.format.bits, _of_integers(linear, activation.prefill), decode)
    return None


def transforms(linear: QuantizedLinear) -> bool:
    """Whether a packed linear takes inputs that ``QuantizedLinear.transformed`` gave: kernels
    multiply by a smoothing vector in float32, and know no more."""
    return linear.kronecker is not None or linear.rounds_smoothed


def _of_integers(linear: QuantizedLinear, activation: Activation) -> Computed:
    if isinstance(activation, StaticActivation):
        folds = activation.folds_bias
        bias = folded_bias(linear, "linear") if folds else linear.quant_bias
        arrays = {"scale": linear.deq_scale, "int_bias": bias}
        return _computed(linear, activation, arrays, linear.weight.shape[1], folds)
    arrays = {"scale": linear.weight_scale}
    return _computed(linear, activation, arrays, linear.weight.shape[1])


def _computed(
    linear: QuantizedLinear,
    activation: Activation,
    arrays: dict[str, np.ndarray],
    group: int,
    folds_bias: bool = False,
) -> Computed:
    outputs, inputs = linear.weight.shape
    shape = outputs, inputs
    if linear.bias is not None and not folds_bias:
        arrays["bias"] = linear.bias
    if linear.mul_scale is not None and not transforms(linear):
        arrays["mul"] = linear.mul_scale
    if isinstance(activation, StaticActivation):
        if activation.reciprocal is None:
            arrays["input_scale"] = activation.input_scale
        else:
            arrays["input_factor"] = activation.reciprocal
        offset = float(activation.offset)
        return Computed(shape, arrays, group, native.STATIC, offset=offset)
    if isinstance(activation, PerToken):
        limits, clip = LIMITS[activation.bits], activation.clip
        return Computed(shape, arrays, group, native.PER_TOKEN, limits, clip)
    return Computed(shape, arrays, group, native.FLOAT)
