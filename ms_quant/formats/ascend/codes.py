"""How the ascend format stores a weight's codes: one layout for each way to pack them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.numerics import affine, pack
from ms_quant.numerics.activation import PerToken
from ms_quant.schemes.records import Scheme

INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Codes:
    """A layout of codes (N, K).

    Attributes:
        dtype: of what is stored.
        pack: int8 or uint8 codes (N, K) and a name to what is stored.
        unpack: what is stored, K and a name to codes; refuses what are no codes.
        rows, columns: how many adjacent rows or columns are in one stored item.
    """

    dtype: np.dtype
    pack: Callable[[np.ndarray, str], np.ndarray]
    unpack: Callable[[np.ndarray, int, str], np.ndarray]
    rows: int = 1
    columns: int = 1

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of what is stored."""
        return rows // self.rows, columns // self.columns

    def check(self, rows: int, columns: int, name: str) -> None:
        """Refuses a shape that cannot be packed.

        Raises:
            MsQuantError: names the weight and its size.
        """
        for size, of, side in ((rows, self.rows, "outputs"), (columns, self.columns, "inputs")):
            if size % of:
                raise BadFileError(f"{name}: {size} {side}, expected an even number to pack int4")


def _plain(codes: np.ndarray, name: str) -> np.ndarray:
    return codes


def _whole_range(stored: np.ndarray, columns: int, name: str) -> np.ndarray:
    return stored


def _four_bits(stored: np.ndarray, columns: int, name: str) -> np.ndarray:
    smallest, largest = affine.LIMITS[4]
    wrong = int(np.count_nonzero((stored < smallest) | (stored > largest)))
    if wrong:
        raise BadFileError(
            f"{name}: {wrong} of {stored.size} values are not int4, expected {smallest}..{largest}"
        )
    return stored


def no_nan(stored: np.ndarray, columns: int, name: str) -> np.ndarray:
    codes = stored.view(np.uint8)
    wrong = int(np.count_nonzero((codes & 127) == 127))
    if wrong:
        raise BadFileError(f"{name}: {wrong} of {codes.size} values are NaN, expected none")
    return codes


PLAIN = Codes(INT8, _plain, _whole_range)
INT4 = Codes(INT8, _plain, _four_bits)
ALONG_OUT = Codes(INT8, pack.pack_along_out, lambda s, k, n: pack.unpack_along_out(s, n), rows=2)
FLOAT8 = Codes(E4M3, lambda codes, name: codes.view(E4M3), no_nan)
FLOAT4 = Codes(UINT8, pack.pack_nibbles, pack.unpack_nibbles, columns=2)


def _floats(dtype: np.dtype) -> Codes:
    """Floats of a model's type."""
    return Codes(dtype, lambda codes, name: codes.astype(dtype), _finite)


def _finite(stored: np.ndarray, columns: int, name: str) -> np.ndarray:
    wide = stored.astype(np.float32)
    affine.check_finite(wide, name)
    return wide


def codes_of(scheme: Scheme, dtype: np.dtype) -> Codes:
    """The layout of a scheme's weights: packed as the kernel of its activations reads them.

    Args:
        scheme: the scheme.
        dtype: of the model.
    """
    weight = scheme.weight
    if weight.bits == 16:
        return _floats(dtype)
    if not weight.integer:
        return FLOAT8 if weight.bits == 8 else FLOAT4
    if weight.bits == 8:
        return PLAIN
    return ALONG_OUT if has_scale_bias(scheme) else INT4


def has_scale_bias(scheme: Scheme) -> bool:
    """Whether the kernel splits int8 inputs into nibbles for int4 weights."""
    weight = scheme.weight
    return weight.integer and weight.bits == 4 and scheme.activation == PerToken(8)
