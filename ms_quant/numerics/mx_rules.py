"""How a microscaling block gets its exponent, by toolkit; :mod:`ms_quant.numerics.mx` uses it.

Toolkits differ in how they choose the exponent from the largest magnitude ``amax`` of a block and
in how they round elements. ``floor2`` and ``ceil2`` below are floor and ceil of log2, taken from
the float32's exponent field, k is floor2(amax), and everything else is float32 arithmetic in the
order written. A block of zeros has the exponent -127 (byte 0), the clamp of minus infinity, but -22
by msModelSlim's nudged MXFP4 rule and -19 by its ceil_x.

===============================  =========================================  =========
rule                             exponent                                   elements
===============================  =========================================  =========
mxfp8_cann0                      floor2(amax) - 8                           half even
mxfp8_cann1                      ceil2(amax / 448)                          half even
mxfp8_msmodelslim                floor2(amax) - 8                           half away
mxfp8_msmodelslim_mse_round      floor2 or ceil2(amax) - 8, the less error  half away
mxfp4_cann0                      floor2(amax) - 2                           half even
mxfp4_cann0_round                floor2(amax) - 2                           half away
mxfp4_cann2_6                    k - 2, + 1 if amax >= 1.5 * 2**k            half even
mxfp4_cann2_7                    k - 2, + 1 if amax >= 1.75 * 2**k           half even
mxfp4_cann2_7.25                 ceil2(amax / 7.25)                         half even
mxfp4_msmodelslim                floor2(amax * 8 / 7 + 9.6e-7) - 2          half away
mxfp4_msmodelslim_ceil_x         ceil2(amax / 7.25 + 9.6e-7)                half away
mxfp4_msmodelslim_fouroversix    nearest power of two to amax / 6 or        half away
                                 amax / 4, the less error
===============================  =========================================  =========

Source: CANN's DynamicMxQuant, scale algorithms 0, 1 and 2; the offline rules of msModelSlim.
``docs/numerics.md`` says what of this is inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import E2M1, E4M3, Minifloat, Rounding, floor_log2

BIAS = 127  # of the stored exponent byte
NUDGE = np.float32(9.6e-7)  # msModelSlim's, so that it never takes the logarithm of 0
HUGE = np.finfo(np.float32).max

ExponentRule = Callable[[np.ndarray], np.ndarray]  # float32 amax -> int32 exponent, same shape


def _ceil_log2(x: np.ndarray) -> np.ndarray:
    return floor_log2(x) + (np.frexp(x)[0] > 0.5)


def _floor(amax: np.ndarray, format: Minifloat) -> np.ndarray:
    return floor_log2(amax) - format.max_exponent


def _ceil_divided(amax: np.ndarray, divisor: float, nudge: np.float32) -> np.ndarray:
    return _ceil_log2(amax / np.float32(divisor) + nudge)


def _bumped(amax: np.ndarray, mantissa: float) -> np.ndarray:
    return _floor(amax, E2M1) + (np.frexp(amax)[0] * 2 >= mantissa)


def _msmodelslim_fp4(amax: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # from 2**125 on: infinite there, and the exponent is 125
        raised = amax * np.float32(8) / np.float32(7) + NUDGE
    return _floor(np.minimum(raised, HUGE), E2M1)


def _nearest_divided(amax: np.ndarray, divisor: float) -> np.ndarray:
    """log2 of the power of two nearest to amax / divisor; a tie (1.5 * 2**k) goes up."""
    scale = amax / np.float32(divisor)
    return floor_log2(scale) + (np.frexp(scale)[0] >= 0.75)


@dataclass(frozen=True)
class MxRule:
    """How a block becomes an exponent and codes.

    Of several exponents the one with the least squared error of the block is taken, the first of
    them when errors are equal.
    """

    element: Minifloat
    rounding: Rounding
    exponents: tuple[ExponentRule, ...]


def cann2(largest: float) -> MxRule:
    """CANN's scale algorithm 2 for MXFP4 with ``dst_type_max`` = ``largest``, 6 to 12."""
    _check_divisor(largest)
    if largest in (6, 7):
        mantissa = 1.5 if largest == 6 else 1.75
        return MxRule(E2M1, Rounding.HALF_EVEN, (lambda a: _bumped(a, mantissa),))
    return MxRule(E2M1, Rounding.HALF_EVEN, (lambda a: _ceil_divided(a, largest, np.float32(0)),))


def msmodelslim_ceil_x(divisor: float = 7.25) -> MxRule:
    """The offline rule ``ceil_x`` of msModelSlim, with a divisor of 6 to 12."""
    _check_divisor(divisor)
    return MxRule(E2M1, Rounding.HALF_AWAY, (lambda a: _ceil_divided(a, divisor, NUDGE),))


def _check_divisor(divisor: float) -> None:
    if not 6 <= divisor <= 12:
        raise BadArgumentError(f"divisor {divisor:g} of a block's maximum, expected 6 to 12")


def _floor4(amax: np.ndarray) -> np.ndarray:
    return _floor(amax, E2M1)


def _floor8(amax: np.ndarray) -> np.ndarray:
    return _floor(amax, E4M3)


def _ceil8(amax: np.ndarray) -> np.ndarray:
    return _ceil_log2(amax) - E4M3.max_exponent


def _ceil448(amax: np.ndarray) -> np.ndarray:
    return _ceil_divided(amax, E4M3.largest, np.float32(0))


def _over_six(amax: np.ndarray) -> np.ndarray:
    return _nearest_divided(amax, 6)


def _over_four(amax: np.ndarray) -> np.ndarray:
    return _nearest_divided(amax, 4)


_EVEN, _AWAY = Rounding.HALF_EVEN, Rounding.HALF_AWAY
RULES: dict[str, MxRule] = {
    "mxfp8_cann0": MxRule(E4M3, _EVEN, (_floor8,)),
    "mxfp8_cann1": MxRule(E4M3, _EVEN, (_ceil448,)),
    "mxfp8_msmodelslim": MxRule(E4M3, _AWAY, (_floor8,)),
    "mxfp8_msmodelslim_mse_round": MxRule(E4M3, _AWAY, (_floor8, _ceil8)),
    "mxfp4_cann0": MxRule(E2M1, _EVEN, (_floor4,)),
    "mxfp4_cann0_round": MxRule(E2M1, _AWAY, (_floor4,)),
    "mxfp4_cann2_6": cann2(6),
    "mxfp4_cann2_7": cann2(7),
    "mxfp4_cann2_7.25": cann2(7.25),
    "mxfp4_msmodelslim": MxRule(E2M1, _AWAY, (_msmodelslim_fp4,)),
    "mxfp4_msmodelslim_ceil_x": msmodelslim_ceil_x(),
    "mxfp4_msmodelslim_fouroversix": MxRule(E2M1, _AWAY, (_over_six, _over_four)),
}
