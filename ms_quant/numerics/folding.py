"""Smoothing vectors in what makes an input: divided out of it, and read back from what is stored.

What is divided is rounded to the type that it is stored in, so a vector is what source and stored
tensor say together. Quantization and verification call the same functions for it.

* The gain of a norm has one value for each channel: the vector is gain / stored gain.
* A weight has a row for each channel. A vector with few significant bits is found in the rows
  whatever their rounding did: the ratio of two rows is off by no more than one value of them is,
  2^-9 in bfloat16, and its neighbours are at least 2^-6 away.
* Powers of two round nothing. Where linears that are never quantized read a norm, the vector
  consists of them: the products of a router, and so its choice, do not change by a bit.
"""

from __future__ import annotations

import numpy as np

BITS = 6


def divided_gain(
    gain: np.ndarray, smooth: np.ndarray, dtype: np.dtype, exact: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A norm's gain divided by a vector.

    Args:
        gain: float32 (channels,).
        smooth: float32 (channels,).
        dtype: what the gain is stored in.
        exact: the vector consists of powers of two; where dividing would round, it does not.

    Returns:
        float32 (channels,), the gain as it is stored, and what :func:`gain_divisors` finds in it. A
        gain that would become zero or infinite stays, and its channel is not smoothed.
    """
    with np.errstate(over="ignore"):
        stored = (gain / smooth).astype(dtype).astype(np.float32)
        plain = gain.astype(dtype).astype(np.float32)  # where nothing can fold
        lost = (stored == 0) | ~np.isfinite(stored) | (exact & (stored * smooth != plain))
    stored = np.where(lost, plain, stored)
    live = (stored != 0) & np.isfinite(stored)
    return np.where(live, stored, gain), gain_divisors(gain, np.where(live, stored, 0), exact)


def gain_divisors(gain: np.ndarray, stored: np.ndarray, exact: bool = False) -> np.ndarray:
    """float32 (channels,): what a stored gain was divided by, 1 where it is zero."""
    live = stored != 0
    found = np.where(live, gain / np.where(live, stored, 1), np.float32(1)).astype(np.float32)
    return powers_of_two(np.where(found > 0, found, 1)) if exact else found


def exact_columns(weight: np.ndarray, smooth: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """bool (in,): the columns whose products with powers of two are not rounded where stored."""
    with np.errstate(over="ignore"):
        plain = weight.astype(dtype).astype(np.float32)
        stored = (weight * smooth).astype(dtype).astype(np.float32)
    return (np.isfinite(stored) & (stored == plain * smooth)).all(axis=0)


def divided_rows(
    weight: np.ndarray, rows: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a weight divided by a vector, which is rounded to few significant bits.

    Args:
        weight: float32 (out, in).
        rows: float32 (out,).
        dtype: what the weight is stored in.

    Returns:
        The weight as it is stored, float32, and what :func:`row_divisors` finds in it. A row that
        does not say what it was divided by stays.
    """
    rows = few_bits(rows)
    with np.errstate(over="ignore"):
        stored = (weight / rows[:, None]).astype(dtype).astype(np.float32)
        plain = weight.astype(dtype).astype(np.float32)
    lost = (row_divisors(weight, stored) != rows) | ~np.isfinite(stored).all(axis=1)
    stored = np.where(lost[:, None], plain, stored)
    return stored, row_divisors(weight, stored)


def row_divisors(weight: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """float32 (out,): what the rows of a stored weight were divided by, 1 where they are zero."""
    return few_bits(row_ratios(weight, stored))


def row_ratios(weight: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """float64 (out,): the factor on each stored row that brings it nearest to the weight's."""
    both = np.einsum("ij,ij->i", weight, stored, dtype=np.float64)
    power = np.einsum("ij,ij->i", stored, stored, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = both / power
    return np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1)


def few_bits(values: np.ndarray) -> np.ndarray:
    """float32: positive numbers rounded to 6 significant bits."""
    fraction, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.rint(fraction * 2**BITS) / 2**BITS, exponent).astype(np.float32)


def powers_of_two(values: np.ndarray) -> np.ndarray:
    """float32: positive numbers rounded to powers of two, by their logarithm."""
    return np.exp2(np.rint(np.log2(np.asarray(values, np.float64)))).astype(np.float32)
