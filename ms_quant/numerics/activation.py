"""How the input of a linear is quantized, in NumPy.

A scheme names a **format**; fitted to what calibration saw it gives what a linear computes with. A
dynamic format needs nothing and is that itself.

================  =========================================  =======================
format            the linear sees                            parameters
================  =========================================  =======================
Float             x                                          none
StaticInt8        (q - offset) * scale, one for all tokens   StaticActivation
PerToken          q * scale, one scale a token, 8 or 4 bits  none, or a clip ratio
PerTokenFloat8    e4m3(q) * scale, one scale a token         none
GroupFloat8       the same, one scale for 128 channels       none
MxTokens          blocks of 32 with a shared exponent        none
DualMxTokens      the same under a scale for long blocks     none
Phased            per token in prefill, static in decode     StaticActivation
Timestep          per token or static, by diffusion step     TimestepActivation
================  =========================================  =======================

Source: the rules of :mod:`ms_quant.numerics.affine`, ``minifloat`` and ``mx``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ms_quant.numerics import affine, float8_blocks, minifloat, mx, storage
from ms_quant.numerics.mx_rules import RULES
from ms_quant.numerics.quotient import ChannelRange, nearly_exact
from ms_quant.numerics.reciprocal import round_up_for_reciprocal, rounded_reciprocal


@dataclass(frozen=True)
class ObservedRange:
    """What calibration saw of an input.

    Attributes:
        low: float32 (in,), smallest value of each channel; (T, in) where T timesteps have their
            own.
        high: the same of the largest.
        dtype: type that the checkpoint stores input scales in.
        name: the linear's name, for errors.
        gain: float32 (in,), of the norm that makes the input, where the runtime divides it by the
            scales of the channels; else None.
    """

    low: np.ndarray
    high: np.ndarray
    dtype: np.dtype
    name: str
    gain: np.ndarray | None = None


class Activation(Protocol):
    """How one linear's input is quantized."""

    def fake(self, x: np.ndarray) -> np.ndarray:
        """What the linear sees of float32 (..., in), as float32."""


class ActivationFormat(Protocol):
    """What a scheme says of an input."""

    @property
    def bits(self) -> int:
        """Of a value as the linear sees it: 16, 8 or 4."""

    @property
    def dynamic(self) -> bool:
        """Whether all parameters are computed at run time, so that calibration is not needed."""

    @property
    def holds_smoothing(self) -> bool:
        """Whether its input scale has a value for each channel, and so room for smoothing."""

    def fit(self, seen: ObservedRange | None, smooth: np.ndarray | None) -> Activation:
        """Its parameters for one input.

        Args:
            seen: what calibration saw; dynamic formats need nothing.
            smooth: float32 (in,), what the scales of the channels are multiplied by, or None.
        """

    def restore(self, static: StaticActivation) -> Activation:
        """The same from stored static parameters."""


class _Dynamic:
    dynamic = True
    holds_smoothing = False

    def restore(self, static: StaticActivation):
        return self

    def fit(self, seen: ObservedRange | None, smooth: np.ndarray | None):
        return self


@dataclass(frozen=True)
class Float(_Dynamic):
    """The input stays as it is: weight-only schemes."""

    bits = 16

    def fake(self, x: np.ndarray) -> np.ndarray:
        return x


@dataclass(frozen=True)
class PerToken(_Dynamic):
    """Symmetric integers with one scale a token: absmax * clip / 127 or / 7.

    Attributes:
        bits: 8 or 4.
        clip: factor on the range, at most 1.
    """

    bits: int = 8
    clip: float = 1.0

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int8 codes (..., in) and float32 scales (..., 1)."""
        absmax = np.abs(x).max(axis=-1, keepdims=True, initial=0) * np.float32(self.clip)
        scale = affine.symmetric_scale(absmax, affine.LIMITS[self.bits][1])
        return affine.quantize(x, scale, bits=self.bits), scale

    def fake(self, x: np.ndarray) -> np.ndarray:
        return affine.dequantize(*self.codes(x))


@dataclass(frozen=True)
class PerTokenFloat8(_Dynamic):
    """E4M3 with one scale a token."""

    bits = 8

    def fake(self, x: np.ndarray) -> np.ndarray:
        scale = minifloat.row_scale(x)
        return minifloat.dequantize_rows(minifloat.quantize_rows(x, scale), scale)


@dataclass(frozen=True)
class GroupFloat8(_Dynamic):
    """E4M3 with one scale for each 128 channels of a token."""

    bits = 8

    def fake(self, x: np.ndarray) -> np.ndarray:
        return float8_blocks.fake_groups(x)


@dataclass(frozen=True)
class MxTokens(_Dynamic):
    """MXFP8 or MXFP4 along the channels.

    Attributes:
        rule: a name from ``mx_rules.RULES``.
    """

    rule: str

    @property
    def bits(self) -> int:
        return 4 if RULES[self.rule].element is minifloat.E2M1 else 8

    def fake(self, x: np.ndarray) -> np.ndarray:
        rule = RULES[self.rule]
        return mx.dequantize(*mx.quantize(x, rule), rule.element)


@dataclass(frozen=True)
class DualMxTokens(_Dynamic):
    """MXFP4 along the channels, under a float32 scale for each long block of them.

    Attributes:
        rule: a name from ``mx_rules.RULES``, of MXFP4.
        size: the length of a long block.
    """

    rule: str
    size: int = mx.DUAL_BLOCK
    bits = 4

    def fake(self, x: np.ndarray, dtype: np.dtype = storage.DTYPES["float32"]) -> np.ndarray:
        """As :meth:`Activation.fake`, with x / scale rounded to a type."""
        found = mx.quantize_dual(x, RULES[self.rule], self.size, dtype)
        return mx.dequantize_dual(*found, self.size)


@dataclass(frozen=True)
class StaticActivation:
    """Static quantization of a linear's input, shared by all linears that read it.

    Attributes:
        scale: one float32 step s_x of the smoothed input.
        offset: int8 zero point.
        input_scale: float32 (in,): s_x times the smoothing vector, as the checkpoint stores it.
            Each value is exact in the stored type.
        folds_bias: whether the linear's bias is rounded into ``quant_bias``.
        multiplied_in: type in which the runtime holds 1 / ``input_scale``, the same for all
            channels, to multiply by; None where it divides.
    """

    scale: np.float32
    offset: int
    input_scale: np.ndarray
    folds_bias: bool = False
    multiplied_in: np.dtype | None = None

    @property
    def smooth(self) -> np.ndarray:
        """float32 (in,): what the input is divided by and the weight's columns multiplied by."""
        return self.input_scale / self.scale

    @property
    def reciprocal(self) -> np.ndarray | None:
        """float32 (in,): what the runtime multiplies by; None where it divides."""
        if self.multiplied_in is None:
            return None
        return rounded_reciprocal(self.input_scale, self.multiplied_in)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """int8 codes (..., in)."""
        reciprocal = self.reciprocal
        if reciprocal is not None:
            return affine.quantize_by(x, reciprocal, self.offset)
        return affine.quantize(x, self.input_scale, self.offset)

    def fake(self, x: np.ndarray) -> np.ndarray:
        """The smoothed input that the codes stand for."""
        return affine.dequantize(self.codes(x), self.scale, self.offset)


def static_activation(
    low: np.ndarray,
    high: np.ndarray,
    smooth: np.ndarray | None,
    dtype: np.dtype,
    name: str,
    gain: np.ndarray | None = None,
) -> StaticActivation:
    """Quantization parameters from each input channel's range.

    Args:
        low: float32 (in,), smallest value seen.
        high: float32 (in,), largest value seen.
        smooth: (in,) positive, or None.
        dtype: type that the checkpoint stores ``input_scale`` in. Stored values are rounded up,
            so that rounding never makes an activation clip, and the smoothing vector is
            redefined by what is stored.
        name: the linear's name, for errors.
        gain: as of :class:`ObservedRange`. Stored values are then those nearby by which it is
            divided nearly exactly.
    """
    vector = np.ones(low.shape, np.float32) if smooth is None else smooth
    scale, offset = affine.asymmetric_parameters(np.min(low / vector), np.max(high / vector))
    stored = storage.round_up(scale * vector.astype(np.float64), dtype, f"{name}.input_scale")
    if gain is not None:
        stored = nearly_exact(stored, gain, dtype, ChannelRange(low, high, int(offset)))
    return StaticActivation(np.float32(scale), int(offset), stored.astype(np.float32))


def tensor_activation(seen: ObservedRange, multiplies: bool = False) -> StaticActivation:
    """Parameters with one stored step for all channels, as ascend checkpoints hold them.

    The step itself is rounded up to the stored type before anything follows from it: no smoothing
    vector could make up for that.

    Args:
        seen: what calibration saw.
        multiplies: whether the runtime multiplies by the step's reciprocal in the stored type.
    """
    low, high = seen.low.min(initial=0), seen.high.max(initial=0)
    scale, _ = affine.asymmetric_parameters(low, high)
    round_up = round_up_for_reciprocal if multiplies else storage.round_up
    stored = np.float32(round_up(scale, seen.dtype, f"{seen.name}.input_scale"))
    offset = int(np.clip(np.rint(affine.QMIN - float(low) / float(stored)), -128, 127))
    vector = np.full(seen.low.shape, stored, np.float32)
    return StaticActivation(stored, offset, vector, True, seen.dtype if multiplies else None)


@dataclass(frozen=True)
class StaticInt8:
    """One asymmetric int8 scale and zero point for all tokens.

    Attributes:
        per_channel: whether the stored input scale has a value for each channel and so holds a
            smoothing vector, as in golden-stick; else it is one number.
        folds_bias: whether a linear's bias is rounded into ``quant_bias``, as in ascend.
        multiplies: whether the runtime multiplies by the reciprocal of the one number, rounded to
            the type that the number is stored in.
        symmetric: whether the zero point is 0: not what is made here, but what others make.
    """

    per_channel: bool = True
    folds_bias: bool = False
    multiplies: bool = False
    symmetric: bool = False
    dynamic = False
    bits = 8

    @property
    def holds_smoothing(self) -> bool:
        return self.per_channel

    def fit(self, seen: ObservedRange | None, smooth: np.ndarray | None) -> StaticActivation:
        assert seen is not None
        if self.per_channel:
            ends = seen.low, seen.high
            return static_activation(*ends, smooth, seen.dtype, seen.name, seen.gain)
        assert smooth is None
        return replace(tensor_activation(seen, self.multiplies), folds_bias=self.folds_bias)

    def restore(self, static: StaticActivation) -> StaticActivation:
        return replace(static, folds_bias=self.folds_bias)


@dataclass(frozen=True)
class PhasedActivation:
    """Per token in prefill, static in decode: PDMIX.

    Attributes:
        static: the parameters of decode; one step for all channels, the bias folded.
    """

    static: StaticActivation
    prefill = PerToken(8)

    def fake(self, x: np.ndarray) -> np.ndarray:
        """What the linear sees in prefill."""
        return self.prefill.fake(x)


@dataclass(frozen=True)
class Phased:
    """The format of :class:`PhasedActivation`.

    Attributes:
        multiplies: as of :class:`StaticInt8`, in decode.
    """

    multiplies: bool = False
    dynamic = False
    holds_smoothing = False
    bits = 8

    def fit(self, seen: ObservedRange | None, smooth: np.ndarray | None) -> PhasedActivation:
        assert seen is not None and smooth is None
        return PhasedActivation(tensor_activation(seen, self.multiplies))

    def restore(self, static: StaticActivation) -> PhasedActivation:
        return PhasedActivation(replace(static, folds_bias=True))
