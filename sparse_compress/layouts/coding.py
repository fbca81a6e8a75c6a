"""The types of weights that can be compressed, as descriptions name them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_compress.codec.fractal import most_bytes, unsupported_reason
from sparse_compress.layouts.fp16 import FLOAT16

PARAMETERS = ("deq_scale", "quant_bias", "input_scale", "input_offset")
INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class Coding:
    """A type of weights that can be compressed.

    Attributes:
        plain: the type before.
        coded: the type after.
        mode: of the codec.
        dtype: of the weight.
        parameters: suffixes of the tensors that such a linear has besides its weight.
    """

    plain: str
    coded: str
    mode: str
    dtype: np.dtype
    parameters: tuple[str, ...]

    def reason(self, shape: tuple[int, ...]) -> str | None:
        """Why the hardware does not take a weight of this shape, or None."""
        return unsupported_reason(shape[0], shape[1] * self.dtype.itemsize)

    def most_bytes(self, shape: tuple[int, ...]) -> int:
        """The largest coded weight that the runtimes take."""
        return most_bytes(shape[0], shape[1] * self.dtype.itemsize)

    def left(self, shape: tuple[int, ...]) -> str:
        """Why a weight is not compressed, as one that could be would have been."""
        too_long = f"takes more than the {self.most_bytes(shape)} bytes that the runtimes accept"
        return self.reason(shape) or f"compressed, it {too_long}"


CODINGS = (
    Coding("W8A8S", "W8A8SC", "low", INT8, PARAMETERS),
    Coding("W16A16S", "W16A16SC", "high", FLOAT16, ()),
)
PLAIN = {coding.plain: coding for coding in CODINGS}
CODED = {coding.coded: coding for coding in CODINGS}
