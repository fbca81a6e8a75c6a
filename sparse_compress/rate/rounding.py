"""int8 weights that make ``tr((W - sQ) H (W - sQ)^T) + price * bits(Q)`` small.

First GPTQ's column step with the price of each value in the choice, then coordinate descent on
the same sum, where each choice sees the exact error and both neighbours of its run. The codec's
dictionary is counted again after each pass.

Sources: docs/rate_distortion.md; the column step is :mod:`ms_quant.algorithms.gptq`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ms_quant.algorithms.gptq import BLOCK, damped, inverse_factor, solve_columns
from sparse_compress.rate.dictionary import (
    FIRST_BITS,
    RUN,
    Codes,
    Dictionary,
    Floats,
    mean_first_bits,
    pair_saving,
)
from sparse_compress.rate.levels import find_levels, to_grid

PASSES = 3
ROUNDS = 3
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.45)
SCALE_COLUMNS = 256
ELEMENTS = 1 << 25
"""Of a weight, that are worked on at once."""


class Rounded(NamedTuple):
    """Attributes:
    codes: int8 (out, in), from -127 to 127.
    scale: float32 (out,), positive: the step of each row.
    """

    codes: Codes
    scale: Floats


class Curvature(NamedTuple):
    """What the Hessian of a linear says, made once for all prices.

    Attributes:
        hessian: float32 (in, in), damped.
        factor: float32 (in, in), U of the column step.
        importance: float64 (in,), what a squared error costs in each column of the column step.
    """

    hessian: Floats
    factor: Floats
    importance: NDArray[np.float64]


def curvature(hessian: np.ndarray) -> Curvature:
    """Prepares a Hessian, (in, in), the mean of x x^T."""
    exact = damped(hessian)
    factor = inverse_factor(exact)
    importance = 1 / np.square(np.diagonal(factor))
    return Curvature(exact.astype(np.float32), factor.astype(np.float32), importance)


def round_matrix(weight: Floats, curved: Curvature, price: float, passes: int = PASSES) -> Rounded:
    """Chooses the int8 values of a weight.

    Args:
        weight: float32 (out, in), finite; linears that are stored as one share a dictionary, so
            they come as one.
        curved: of its input.
        price: what a bit costs, in the unit of the squared output error of a token; positive.
        passes: of coordinate descent.
    """
    if not weight.any():
        return Rounded(np.zeros(weight.shape, np.int8), np.ones(len(weight), np.float32))
    step, dictionary = to_grid(find_levels(weight, curved.importance, price), weight)
    codes = np.empty(weight.shape, np.int8)
    for _ in range(ROUNDS):
        scale = _row_scales(weight, curved, price, step, dictionary)
        for rows in _chunks(weight.shape):
            codes[rows] = column_step(weight[rows], curved, price, scale[rows], dictionary)
        before, dictionary = dictionary, Dictionary.of(codes)
        if dictionary.same_prices(before):
            break
    for _ in range(passes):
        for rows in _chunks(weight.shape):
            descend(weight[rows], curved.hessian, price, scale[rows], dictionary, codes[rows])
        dictionary = Dictionary.of(codes)
    return Rounded(codes, refit_scale(weight, curved.hessian, codes, scale))


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows to work on at once; rows do not depend on each other."""
    step = max(1, ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _row_scales(
    weight: Floats, curved: Curvature, price: float, step: float, dictionary: Dictionary
) -> Floats:
    """The step of each row that makes its cost least, judged by some of its columns."""
    columns = slice(None, None, -(-weight.shape[1] // SCALE_COLUMNS))
    part = weight[:, columns]
    importance = curved.importance[columns].astype(np.float32)
    fits = np.abs(weight).max(axis=1) / np.float32(127)
    candidates = [np.full(len(weight), step * factor, np.float32) for factor in FACTORS]
    candidates.append(np.maximum(fits, np.float32(step)))
    best, best_cost = candidates[0], np.full(len(weight), np.inf)
    bits = mean_first_bits(dictionary.first_share)
    for scale in candidates:
        local = np.float32(price) / (importance * np.square(scale)[:, None])
        _, cost = dictionary.choose(part / scale[:, None], local, bits)
        total = (cost * importance).sum(axis=1, dtype=np.float64) * np.square(scale)
        best = np.where(total < best_cost, scale, best)
        best_cost = np.minimum(total, best_cost)
    return best


def column_step(
    weight: Floats, curved: Curvature, price: float, scale: Floats, dictionary: Dictionary
) -> Codes:
    """GPTQ with the price of each value in the choice; runs are paired as they grow.

    Args:
        weight: (out, in).
        curved: of its input.
        price: of a bit.
        scale: (out,), the step of each row.
        dictionary: what values cost.

    Returns:
        int8 (out, in).
    """
    codes = np.empty(weight.shape, np.int8)
    is_open = np.zeros(len(weight), bool)
    opening = FIRST_BITS - pair_saving(dictionary.first_share)
    squares = np.square(scale)

    def rounder(j: int, target: Floats) -> Floats:
        if j % RUN == 0:
            is_open[:] = False
        local = np.float32(price / curved.importance[j]) / squares
        first_bits = np.where(is_open, np.float32(0), np.float32(opening))
        value, _ = dictionary.choose(target / scale, local, first_bits)
        is_open[:] = (value == dictionary.first) & ~is_open
        codes[:, j] = value
        return value * scale

    solve_columns(weight, curved.factor, rounder)
    return codes


def descend(
    weight: Floats,
    hessian: Floats,
    price: float,
    scale: Floats,
    dictionary: Dictionary,
    codes: Codes,
) -> None:
    """One pass of coordinate descent over the columns; no choice makes the sum larger.

    Args:
        weight: (out, in).
        hessian: (in, in), damped.
        price: of a bit.
        scale: (out,).
        dictionary: what values cost; it stays as it is.
        codes: int8 (out, in), changed in place.
    """
    gradient = (weight - codes * scale[:, None]) @ hessian
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        slopes = np.asfortranarray(gradient[:, start:stop])
        moved = np.empty_like(slopes)
        for run in range(start, stop, RUN):
            end = min(run + RUN, stop)
            after = _open_after(codes[:, run:end] == dictionary.first)
            before = np.zeros(len(weight), bool)
            for j in range(run, end):
                done, curve = j - start, hessian[j, j]
                old = codes[:, j].astype(np.float32)
                slope = slopes[:, done] - moved[:, :done] @ hessian[start:j, j]
                target = old + slope / (curve * scale)
                local = np.float32(price) / (curve * np.square(scale))
                first_bits = np.where(before | after[j - run + 1], np.float32(0), FIRST_BITS)
                value, _ = dictionary.choose(target, local, first_bits.astype(np.float32))
                before = (value == dictionary.first) & ~before
                codes[:, j] = value
                moved[:, done] = (value - old) * scale
        gradient[:, stop:] -= moved @ hessian[start:stop, stop:]


def _open_after(first: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """For each column of a run, whether the d0s from it on are of an odd number; then False."""
    result = [np.zeros(len(first), bool)]
    for column in first.T[::-1]:
        result.append(column & ~result[-1])
    return result[::-1]


def refit_scale(weight: Floats, hessian: Floats, codes: Codes, scale: Floats) -> Floats:
    """The step of each row that makes the error of its codes least; as it was where none does."""
    result = scale.copy()
    for rows in _chunks(weight.shape):
        values = codes[rows].astype(np.float32)
        curved = values @ hessian
        wanted = np.einsum("nk,nk->n", curved, weight[rows], dtype=np.float64)
        size = np.einsum("nk,nk->n", curved, values, dtype=np.float64)
        good = (wanted > 0) & (size > 0)
        result[rows][good] = (wanted[good] / size[good]).astype(np.float32)
    return result


def relative_error(weight: Floats, hessian: np.ndarray, rounded: Rounded) -> float:
    """Squared output error over the squared output, in the mean over the tokens of a Hessian."""
    error = power = 0.0
    for rows in _chunks(weight.shape):
        wrong = weight[rows] - rounded.codes[rows] * rounded.scale[rows, None]
        error += float(np.einsum("nk,nk->", wrong @ hessian, wrong, dtype=np.float64))
        power += output_power(weight[rows], hessian)
    return error / power if power > 0 else 0.0


def output_power(weight: Floats, hessian: np.ndarray) -> float:
    """The squared output of a token in the mean: tr(W H W^T)."""
    return float(np.einsum("nk,nk->", weight @ hessian, weight, dtype=np.float64))
