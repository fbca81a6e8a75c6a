"""The quantized linear: its tensors, how they are made, and what it computes, in NumPy.

One record serves every scheme. It is a weight in codes on a grid, a way to quantize the input, and
what a few algorithms add: a smoothing vector, a Kronecker transform, a low-rank branch.

Source: docs/numerics.md; the golden-stick checkpoint contract in docs/golden_stick_format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics import affine, rotation
from ms_quant.numerics.activation import (
    Activation,
    ActivationFormat,
    DualMxTokens,
    PerToken,
    PhasedActivation,
    StaticActivation,
    static_activation,
)
from ms_quant.numerics.grid import AffineFormat, AffineGrid, Clip, Grid, WeightFormat
from ms_quant.numerics.storage import DTYPES, nearest
from ms_quant.numerics.timestep import Timestep, TimestepActivation

__all__ = ["QuantizedLinear", "StaticActivation", "quantize_linear", "static_activation"]


@dataclass(frozen=True)
class Kronecker:
    """A transform of the input, x @ kron(left, right); the weight has taken its inverse.

    Attributes:
        left: float32 (a, a).
        right: float32 (b, b), with a * b inputs.
    """

    left: np.ndarray
    right: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32 (..., a * b)."""
        return rotation.apply_kronecker(x, self.left, self.right, "x").astype(np.float32)


@dataclass(frozen=True)
class LowRank:
    """A float branch beside the quantized product: (x @ l1^T) @ l2^T.

    Attributes:
        l1: float32 (rank, in).
        l2: float32 (out, rank).
    """

    l1: np.ndarray
    l2: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """float32 (out, in), what the branch stands for."""
        return self.l2 @ self.l1


@dataclass(frozen=True)
class Stated:
    """What a static product is computed with, where others round it otherwise than is done here.

    Attributes:
        deq_scale: float32 (out,).
        quant_bias: int32 (out,).
        folds_bias: whether the bias is in ``quant_bias``.
    """

    deq_scale: np.ndarray
    quant_bias: np.ndarray
    folds_bias: bool

    def rows(self, rows: slice) -> Stated:
        """The part of some outputs."""
        return Stated(self.deq_scale[rows], self.quant_bias[rows], self.folds_bias)


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear.

    Attributes:
        weight: codes (out, in), int8 or uint8; int4 and E2M1 codes are not packed.
        grid: what the codes stand for.
        bias: float32 (out,) or None.
        activation: how the input is quantized.
        smooth: float (in,), what the input is divided by first, as a product with ``mul_scale``;
            or None. A static activation of the golden-stick kind holds its smoothing itself.
        kronecker: the transform of the input after that, or None.
        branch: the low-rank branch, or None.
        input_dtype: the type that inputs have where the linear runs. ``mul_scale``, its product
            with the input and the quotient of a dual scale are rounded to it; nothing else is.
        stated: what the static product of a checkpoint by others is computed with, or None.
    """

    weight: np.ndarray
    grid: Grid
    bias: np.ndarray | None = None
    activation: Activation = field(default_factory=PerToken)
    smooth: np.ndarray | None = None
    kronecker: Kronecker | None = None
    branch: LowRank | None = None
    input_dtype: np.dtype = DTYPES["float32"]
    stated: Stated | None = None

    @property
    def weight_scale(self) -> np.ndarray:
        """float32 (out,), the scale of each row; per-channel integer weights only."""
        assert isinstance(self.grid, AffineGrid)
        return self.grid.scale[:, 0]

    @property
    def static(self) -> StaticActivation:
        """The static parameters of the input; static and phased activations only."""
        if isinstance(self.activation, PhasedActivation):
            return self.activation.static
        assert isinstance(self.activation, StaticActivation)
        return self.activation

    @property
    def deq_scale(self) -> np.ndarray:
        """float32 (out,), s_x * s_w; static activations only."""
        if self.stated is not None:
            return self.stated.deq_scale
        return self.static.scale * self.weight_scale

    @property
    def quant_bias(self) -> np.ndarray:
        """int32 (out,), -offset * sum over in of the weight; static activations only."""
        if self.stated is not None and not self.stated.folds_bias:
            return self.stated.quant_bias
        return (-self.static.offset * self.weight.sum(axis=1, dtype=np.int64)).astype(np.int32)

    @property
    def integer(self) -> bool:
        """Whether the product is one of integers, with one scale for each row and token."""
        kinds = StaticActivation | PerToken | PhasedActivation | TimestepActivation
        return (
            isinstance(self.activation, kinds)
            and isinstance(self.grid, AffineGrid)
            and self.grid.scale.shape[1] == 1
            and self.grid.format.symmetric
        )

    def float_weight(self) -> np.ndarray:
        """float32 (out, in): the weight that the codes stand for, input transforms undone."""
        weight = self.grid.values(self.weight)
        if isinstance(self.activation, StaticActivation):
            weight = weight / self.activation.smooth
        if self.kronecker is not None:
            left, right = self.kronecker.left.T, self.kronecker.right.T
            weight = rotation.apply_kronecker(weight, left, right, "weight").astype(np.float32)
        if self.branch is not None:
            weight = weight + self.branch.weight
        return weight if self.smooth is None else weight / self.smooth

    @property
    def mul_scale(self) -> np.ndarray | None:
        """float32 (in,), what the input is multiplied by first: 1 / ``smooth`` in the type of
        inputs; or None."""
        return None if self.smooth is None else reciprocal(self.smooth, self.input_dtype)

    @property
    def rounds_smoothed(self) -> bool:
        """Whether the smoothed input is rounded to the type of inputs; the operator of a dual scale
        multiplies and divides before it rounds."""
        dual = isinstance(self.activation, DualMxTokens)
        return self.smooth is not None and self.input_dtype != np.float32 and not dual

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        """float32 (..., in): the input without its outliers."""
        mul_scale = self.mul_scale
        if mul_scale is None:
            return x
        product = x * mul_scale
        if not self.rounds_smoothed:
            return product
        with np.errstate(over="ignore"):  # infinite there, too
            return product.astype(self.input_dtype).astype(np.float32)

    def transformed(self, x: np.ndarray) -> np.ndarray:
        """float32 (..., in): the input as it is quantized."""
        x = self.smoothed(x)
        return x if self.kronecker is None else self.kronecker.apply(x)

    def at_step(self, step: int | None, name: str = "linear") -> QuantizedLinear:
        """The same in a static timestep, or, for None, in a dynamic one; others are themselves."""
        if not isinstance(self.activation, TimestepActivation):
            return self
        stated = self.activation.stated
        linear = replace(self, activation=self.activation.at(step, self.weight.shape[1], name))
        if step is None or stated is None:
            return linear
        return with_tensors(linear, stated.deq_scale[step], stated.quant_bias[step])

    def forward(
        self,
        x: np.ndarray,
        decode: bool = False,
        step: int | None = None,
        values: np.ndarray | None = None,
    ) -> np.ndarray:
        """What the linear computes, and the definition for every other path.

        Args:
            x: float32 (..., in).
            decode: which phase it is, where the activation differs between phases.
            step: the timestep, where it is static and the activation has parameters of each; None
                where it is dynamic.
            values: float32 (out, in), what the codes stand for, if that is known already.

        Returns:
            float32 (..., out). With integer weights per channel and

            * static activations, and phased ones in decode: (qx @ W^T + quant_bias) * deq_scale +
              bias, an int32 sum; where they fold the bias it is in quant_bias instead;
            * per-token ones, and phased ones in prefill: ((qx @ W^T) * x_scale) * weight_scale +
              bias;

            with anything else the product of both dequantized, in float32, + bias.

        Raises:
            MsQuantError: the static step has no parameters.
        """
        if isinstance(self.activation, TimestepActivation):
            return self.at_step(step).forward(x)
        seen = self.transformed(x)
        activation = self.activation
        if isinstance(activation, PhasedActivation):
            activation = activation.static if decode else activation.prefill
        y = self._product(seen, activation, values)
        if self.branch is not None:
            y = y + (self.smoothed(x) @ self.branch.l1.T) @ self.branch.l2.T
        folded = isinstance(activation, StaticActivation) and activation.folds_bias and self.integer
        return y if self.bias is None or folded else y + self.bias

    def _product(
        self, x: np.ndarray, activation: Activation, values: np.ndarray | None
    ) -> np.ndarray:
        if self.integer and isinstance(activation, StaticActivation):
            bias = folded_bias(self, "linear") if activation.folds_bias else self.quant_bias
            total = affine.integer_matmul(activation.codes(x), self.weight) + bias
            return total.astype(np.float32) * self.deq_scale
        if self.integer and isinstance(activation, PerToken):
            codes, x_scale = activation.codes(x)
            total = affine.integer_matmul(codes, self.weight)
            return total.astype(np.float32) * x_scale * self.weight_scale
        values = self.grid.values(self.weight) if values is None else values
        return self.fake(activation, x) @ values.T

    def fake(self, activation: Activation, x: np.ndarray) -> np.ndarray:
        """What the weight sees of an input that is transformed already."""
        if isinstance(activation, DualMxTokens):
            return activation.fake(x, self.input_dtype)
        return activation.fake(x)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the bias, by name; :func:`from_arrays` reads it back."""
        arrays = {"weight": self.weight, **self.grid.arrays()}
        if isinstance(self.activation, StaticActivation | PhasedActivation):
            arrays["act_scale"] = np.array([self.static.scale], np.float32)
            arrays["input_offset"] = np.array([self.static.offset], np.int8)
            arrays["input_scale"] = self.static.input_scale
            if self.static.reciprocal is not None:  # stored in the type that it is exact in
                arrays["input_reciprocal"] = self.static.reciprocal[:1].astype(
                    self.static.multiplied_in
                )
        if isinstance(self.activation, TimestepActivation):
            arrays |= self.activation.arrays()
        if isinstance(self.activation, PerToken) and self.activation.clip != 1.0:
            arrays["clip_ratio"] = np.array([self.activation.clip], np.float32)
        if self.smooth is not None:
            arrays["smooth"] = self.smooth
        if self.kronecker is not None:
            arrays |= {"left_trans": self.kronecker.left, "right_trans": self.kronecker.right}
        if self.branch is not None:
            arrays |= {"svd_lowrank_l1": self.branch.l1, "svd_lowrank_l2": self.branch.l2}
        return arrays


def from_arrays(
    weight: WeightFormat, activation: ActivationFormat, arrays: Mapping[str, np.ndarray]
) -> QuantizedLinear:
    """The linear, without its bias and for inputs in float32, that :meth:`QuantizedLinear.arrays`
    gave.

    Args:
        weight: the scheme's format of weights.
        activation: the scheme's format of inputs.
        arrays: by name.
    """
    kronecker = branch = None
    if "left_trans" in arrays:
        kronecker = Kronecker(arrays["left_trans"], arrays["right_trans"])
    if "svd_lowrank_l1" in arrays:
        branch = LowRank(arrays["svd_lowrank_l1"], arrays["svd_lowrank_l2"])
    return QuantizedLinear(
        arrays["weight"],
        weight.grid(arrays),
        None,
        _activation(activation, arrays),
        arrays.get("smooth"),
        kronecker,
        branch,
    )


def _activation(format: ActivationFormat, arrays: Mapping[str, np.ndarray]) -> Activation:
    if isinstance(format, PerToken) and "clip_ratio" in arrays:
        return PerToken(format.bits, float(arrays["clip_ratio"][0]))
    if format.dynamic:
        return format.fit(None, None)
    if isinstance(format, Timestep):
        return format.restore_steps(arrays["input_scale"], arrays["input_offset"])
    static = StaticActivation(
        arrays["act_scale"][0], int(arrays["input_offset"][0]), arrays["input_scale"]
    )
    if "input_reciprocal" in arrays:
        static = replace(static, multiplied_in=arrays["input_reciprocal"].dtype)
    return format.restore(static)


def int8_linear(
    weight: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray | None = None,
    activation: Activation | None = None,
) -> QuantizedLinear:
    """A linear from int8 codes (out, in) and one float32 scale for each row, (out,)."""
    scale = np.asarray(weight_scale)[:, None]
    grid = AffineFormat().grid({"weight_scale": scale})
    return QuantizedLinear(weight, grid, bias, activation or PerToken())


def quantize_linear(
    weight: np.ndarray,
    bias: np.ndarray | None,
    activation: StaticActivation | None,
    scale_dtype: np.dtype,
    clip: Clip = 1.0,
) -> QuantizedLinear:
    """Quantizes a weight to int8 per output channel.

    Args:
        weight: float32 (out, in), finite.
        bias: float32 (out,) or None.
        activation: static parameters of the input, or None for per-token activations.
        scale_dtype: type in which the weight scale is stored; it is rounded up to it before use.
        clip: factor on each row's range, (out, 1) or a number.
    """
    if activation is not None:
        weight = weight * activation.smooth
    grid = AffineFormat().fit(weight, "weight", scale_dtype, clip)
    return QuantizedLinear(grid.round(weight), grid, bias, activation or PerToken())


def bias_units(bias: np.ndarray, deq_scale: np.ndarray) -> np.ndarray:
    """A float bias in steps of the integer sum: whole float64 (n,), half to even."""
    return np.rint(bias.astype(np.float64) / deq_scale)


def folded_bias(linear: QuantizedLinear, path: str) -> np.ndarray:
    """``quant_bias`` with the linear's float bias in it, int32 (n,): rint(bias / deq_scale) more.

    Raises:
        MsQuantError: a sum does not fit int32.
    """
    if linear.stated is not None and linear.stated.folds_bias:
        return linear.stated.quant_bias
    if linear.bias is None:
        return linear.quant_bias
    total = linear.quant_bias + bias_units(linear.bias, linear.deq_scale)
    limits = np.iinfo(np.int32)
    wrong = int(np.count_nonzero((total < limits.min) | (total > limits.max)))
    if wrong:
        raise BadArgumentError(
            f"{path}.quant_bias: {wrong} of {total.size} values do not fit int32 with the bias in "
            "them"
        )
    return total.astype(np.int32)


def reciprocal(x: np.ndarray, dtype: np.dtype = DTYPES["float32"]) -> np.ndarray:
    """float32 1 / x, rounded to a type."""
    with np.errstate(over="ignore"):
        return (1 / x.astype(np.float64)).astype(dtype).astype(np.float32)


def smooth_of(mul_scale: np.ndarray, dtype: np.dtype = DTYPES["float32"]) -> np.ndarray:
    """The ``smooth`` whose ``mul_scale`` in a type an array is, exactly.

    It is float32 where a float32 has this reciprocal, else float64: of two neighbours in the upper
    part of a binade only one is the reciprocal of a float32. Narrower types are always told.

    Args:
        mul_scale: float32 (in,), positive, exact in the type.
        dtype: the type of inputs.
    """
    narrow = reciprocal(mul_scale)
    same = np.array_equal(reciprocal(narrow, dtype), mul_scale)
    return narrow if same else 1 / mul_scale.astype(np.float64)


def stable_smooth(smooth: np.ndarray, dtype: np.dtype = DTYPES["float32"]) -> np.ndarray:
    """Nearest vectors of float32 that their own ``mul_scale`` tells exactly.

    For float32 reciprocals of reciprocals come to rest after a step or two. In a narrower type they
    are those of its normal numbers: devices may flush others to zero, and float16 ends at 65504.

    Args:
        smooth: float32 (in,), positive.
        dtype: the type of inputs, which ``mul_scale`` is held in.
    """
    if dtype != np.float32:
        return reciprocal(nearest(reciprocal(smooth), dtype))
    while True:
        again = reciprocal(reciprocal(smooth))
        if np.array_equal(again, smooth):
            return smooth
        smooth = again


def with_tensors(
    linear: QuantizedLinear, deq_scale: np.ndarray, quant_bias: np.ndarray
) -> QuantizedLinear:
    """The linear with a static input that has these tensors.

    Only the product of both scales is known then: the input's becomes 1. The bias stays what it is
    if it gives this ``quant_bias``, else it is the one that does.

    Args:
        linear: whose static activation folds the bias.
        deq_scale: float32 (out,), positive.
        quant_bias: int32 (out,), the bias in it.
    """
    assert isinstance(linear.grid, AffineGrid)
    grid = linear.grid.format.grid({"weight_scale": deq_scale[:, None]})
    made = replace(linear, grid=grid, activation=replace(linear.static, scale=np.float32(1)))
    units = quant_bias.astype(np.int64) - made.quant_bias
    if not units.any() and linear.bias is None:
        return made
    exact = units * deq_scale.astype(np.float64)  # a float32 does not reach every step beyond 2**24
    for bias in (linear.bias, exact.astype(np.float32)):
        if bias is not None and np.array_equal(bias_units(bias, deq_scale), units):
            return replace(made, bias=bias)
    return replace(made, bias=exact)
