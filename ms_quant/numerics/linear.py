"""The int8 linear: its tensors, how they are made, and what it computes, in NumPy.

Source: the golden-stick checkpoint contract, as docs/golden_stick_format.md states it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ms_quant.numerics import affine, storage


@dataclass(frozen=True)
class StaticActivation:
    """Static quantization of a linear's input, shared by all linears that read it.

    Attributes:
        scale: one float32 step s_x of the smoothed input.
        offset: int8 zero point.
        input_scale: float32 (in,): s_x times the smoothing vector, as the checkpoint stores it.
            Each value is exact in the stored type.
    """

    scale: np.float32
    offset: int
    input_scale: np.ndarray

    @property
    def smooth(self) -> np.ndarray:
        """float32 (in,): what the input is divided by and the weight's columns multiplied by."""
        return self.input_scale / self.scale


def static_activation(
    low: np.ndarray, high: np.ndarray, smooth: np.ndarray | None, dtype: np.dtype, name: str
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
    """
    vector = np.ones(low.shape, np.float32) if smooth is None else smooth
    scale, offset = affine.asymmetric_parameters(np.min(low / vector), np.max(high / vector))
    stored = storage.round_up(scale * vector.astype(np.float64), dtype, f"{name}.input_scale")
    return StaticActivation(np.float32(scale), int(offset), stored.astype(np.float32))


@dataclass(frozen=True)
class QuantizedLinear:
    """An int8 linear.

    Attributes:
        weight: int8 (out, in).
        weight_scale: float32 (out,).
        bias: float32 (out,) or None.
        activation: static parameters, or None when activations are scaled per token.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None = None
    activation: StaticActivation | None = None

    @property
    def deq_scale(self) -> np.ndarray:
        """float32 (out,), s_x * s_w; static activations only."""
        assert self.activation is not None
        return self.activation.scale * self.weight_scale

    @property
    def quant_bias(self) -> np.ndarray:
        """int32 (out,), -offset * sum over in of the weight; static activations only."""
        assert self.activation is not None
        return (-self.activation.offset * self.weight.sum(axis=1, dtype=np.int64)).astype(np.int32)

    def float_weight(self) -> np.ndarray:
        """float32 (out, in): the weight that the int8 one stands for, smoothing undone."""
        weight = affine.dequantize(self.weight, self.weight_scale[:, None])
        return weight if self.activation is None else weight / self.activation.smooth

    def forward(self, x: np.ndarray) -> np.ndarray:
        """What the linear computes, and the definition for every other path.

        Args:
            x: float32 (..., in).

        Returns:
            float32 (..., out). Static: (qx @ W^T + quant_bias) * deq_scale + bias with an int32
            sum; dynamic: ((qx @ W^T) * x_scale) * weight_scale + bias.
        """
        if self.activation is None:
            x_scale = affine.per_token_scale(x)
            total = affine.integer_matmul(affine.quantize(x, x_scale), self.weight)
            y = total.astype(np.float32) * x_scale * self.weight_scale
        else:
            qx = affine.quantize(x, self.activation.input_scale, self.activation.offset)
            total = affine.integer_matmul(qx, self.weight) + self.quant_bias
            y = total.astype(np.float32) * self.deq_scale
        return y if self.bias is None else y + self.bias


def quantize_linear(
    weight: np.ndarray,
    bias: np.ndarray | None,
    activation: StaticActivation | None,
    scale_dtype: np.dtype,
    clip: np.ndarray | float = 1.0,
) -> QuantizedLinear:
    """Quantizes a weight per output channel.

    Args:
        weight: float32 (out, in), finite.
        bias: float32 (out,) or None.
        activation: static parameters of the input, or None for per-token activations.
        scale_dtype: type in which the weight scale is stored; it is rounded up to it before use.
        clip: factor on each row's range, (out, 1) or a number.
    """
    if activation is not None:
        weight = weight * activation.smooth
    scale = storage.round_up(affine.per_channel_scale(weight, clip), scale_dtype, "weight_scale")
    scale = scale.astype(np.float32)
    return QuantizedLinear(affine.quantize(weight, scale), scale[:, 0], bias, activation)
