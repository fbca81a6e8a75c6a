"""Hadamard and Kronecker transforms, in float64 NumPy.

Transforms multiply row vectors from the right, x' = x @ R, along the last axis. With an
orthogonal R, (x @ R) @ (W @ R)^T = x @ W^T for a weight W (out, in): both sides are rotated by the
same call.

**Supported orders** are 2^k * m for m = 1 and for each order m of Paley's two constructions with a
prime q: m = q + 1 with q = 3 mod 4, and m = 2 * (q + 1) with q = 1 mod 4. Up to 200 these m, where
no half of them will do, are 12, 20, 28, 36, 44, 60, 68, 76, 84, 104, 108, 124, 132, 140, 148, 164,
180, 196 and 200. Orders known only from tables or prime powers (52, 92, 100, 172) are not built, so
11008 = 2^8 * 43 falls back on m = 5504, which is right and slow.

Sources: Sylvester 1867; Paley, On Orthogonal Matrices, 1933; QuaRot, arXiv 2404.00456; FlatQuant,
arXiv 2410.09426.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.affine import check_finite


def base_order(n: int, name: str) -> int:
    """The smallest supported m with n = 2^k * m.

    Raises:
        MsQuantError: there is none.
    """
    if n > 0:
        m = n // (n & -n)  # the odd part
        while m <= n:
            if m == 1 or _is_paley_one(m) or _is_paley_two(m):
                return m
            m *= 2
    raise BadArgumentError(
        f"{name}: no Hadamard matrix of order {n}, expected 2^k or 2^k times a Paley order "
        "(12, 20, 28, 36, 44, 60, ...)"
    )


def hadamard(n: int, name: str = "hadamard") -> np.ndarray:
    """The normalized Hadamard matrix kron(Sylvester(n / m), Paley(m)) / sqrt(n), float64 (n, n).

    Orthogonal; not symmetric where m comes from Paley's first construction.
    """
    m = base_order(n, name)
    return np.kron(_sylvester(n // m), _base(m)) / math.sqrt(n)


def random_signs(n: int, seed: int) -> np.ndarray:
    """float64 (n,) of +-1: the top bits of NumPy's PCG64.

    Raw bits, as NumPy promises to keep them from version to version; not so for what its
    ``Generator`` draws from them.
    """
    return 1.0 - 2.0 * (np.random.PCG64(seed).random_raw(n) >> np.uint64(63)).astype(np.float64)


def random_hadamard(n: int, seed: int, name: str = "hadamard") -> np.ndarray:
    """diag(signs) @ Hadamard, orthogonal, float64 (n, n)."""
    return random_signs(n, seed)[:, None] * hadamard(n, name)


def sylvester(x: np.ndarray, divisor: float) -> np.ndarray:
    """The Sylvester matrix times each of float64 (rows, 2^k, width), divided: k stages of sums."""
    rows, order, width = x.shape
    y, half = x, order // 2
    while half:
        pairs = y.reshape(rows, order // (2 * half), 2, half * width)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([low + high, low - high], axis=2)
        half //= 2
    return y.reshape(x.shape) / divisor


def apply_hadamard(
    x: np.ndarray,
    name: str,
    signs: np.ndarray | None = None,
    stages: Callable[[np.ndarray, float], np.ndarray] = sylvester,
) -> np.ndarray:
    """x @ diag(signs) @ hadamard(n) by the fast Walsh-Hadamard transform.

    Args:
        x: float (..., n), finite.
        name: the tensor's name, for errors.
        signs: (n,) of :func:`random_signs`, or None for ones.
        stages: what computes :func:`sylvester`; it may change its input.

    Returns:
        float64 (..., n). log2(n / m) + m additions for each element.
    """
    check_finite(x, name)
    n = x.shape[-1] if x.ndim else 0
    m = base_order(n, name)
    if signs is not None and signs.shape != (n,):
        raise BadArgumentError(f"{name}: signs of shape {signs.shape}, expected ({n},)")
    y = np.array(x, np.float64) if signs is None else x.astype(np.float64) * signs
    y = y.reshape(-1, n // m, m)
    return stages(y if m == 1 else y @ _base(m), math.sqrt(n)).reshape(x.shape)


def balanced_factors(k: int, name: str) -> tuple[int, int]:
    """(l, r) with l * r = k: l <= r as close as can be, with an even sum.

    The rule of FlatQuant and msModelSlim: the smallest a >= sqrt(k) for which a^2 - k is a square
    b^2 gives (a - b, a + b).

    Raises:
        MsQuantError: k is not positive, or is twice an odd number, which has no such factors.
    """
    for left in range(math.isqrt(max(k, 0)), 0, -1):
        right, rest = divmod(k, left)
        if rest == 0 and (left + right) % 2 == 0:
            return left, right
    raise BadArgumentError(
        f"{name}: K = {k} has no factors with an even sum, expected an odd K or 4 * n"
    )


def apply_kronecker(x: np.ndarray, left: np.ndarray, right: np.ndarray, name: str) -> np.ndarray:
    """x @ kron(left, right), computed as left^T @ reshape(x, (a, b)) @ right.

    Args:
        x: float (..., a * b), finite.
        left: (a, a).
        right: (b, b).
        name: the tensor's name, for errors.

    Returns:
        float64 (..., a * b).
    """
    _check_factors(x, left, right, name)
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], len(left), len(right))
    return (left.astype(np.float64).T @ blocks @ right.astype(np.float64)).reshape(x.shape)


def fold_kronecker(
    weight: np.ndarray, left: np.ndarray, right: np.ndarray, name: str
) -> np.ndarray:
    """weight @ inverse(kron(left, right))^T: what undoes :func:`apply_kronecker` on the input.

    Args:
        weight: float (out, a * b), finite.
        left: (a, a), not singular.
        right: (b, b), not singular.
        name: the tensor's name, for errors.

    Returns:
        float64 (out, a * b).
    """
    _check_factors(weight, left, right, name)
    try:
        inverses = [np.linalg.inv(matrix.astype(np.float64)).T for matrix in (left, right)]
    except np.linalg.LinAlgError:
        raise BadArgumentError(
            f"{name}: a Kronecker factor is singular, expected inverses"
        ) from None
    return apply_kronecker(weight, inverses[0], inverses[1], name)


def _check_factors(x: np.ndarray, left: np.ndarray, right: np.ndarray, name: str) -> None:
    square = all(m.ndim == 2 and m.shape[0] == m.shape[1] for m in (left, right))
    if not square or x.ndim == 0 or len(left) * len(right) != x.shape[-1]:
        raise BadArgumentError(
            f"{name}: Kronecker factors {left.shape} and {right.shape} for a tensor of {x.shape}, "
            "expected (a, a) and (b, b) with a * b its last axis"
        )
    for tensor, label in ((x, name), (left, f"{name}: left"), (right, f"{name}: right")):
        check_finite(tensor, label)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _is_paley_one(m: int) -> bool:
    return m % 4 == 0 and _is_prime(m - 1)


def _is_paley_two(m: int) -> bool:
    return m % 4 == 0 and m // 2 % 4 == 2 and _is_prime(m // 2 - 1)


def _sylvester(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


def _base(m: int) -> np.ndarray:
    """The +-1 matrix of a base order, float64 (m, m)."""
    if m == 1:
        return np.ones((1, 1))
    if _is_paley_one(m):
        return np.eye(m) + _conference(m - 1, below=-1)
    pair, diagonal = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
    return np.kron(_conference(m // 2 - 1, below=1), pair) + np.kron(np.eye(m // 2), diagonal)


def _conference(q: int, below: int) -> np.ndarray:
    """[[0, 1], [below, Q]] with Q[i, j] = the Legendre symbol of i - j modulo the prime q."""
    symbol = np.full(q, -1.0)
    symbol[np.arange(q) ** 2 % q] = 1
    symbol[0] = 0
    matrix = np.ones((q + 1, q + 1))
    matrix[0, 0], matrix[1:, 0] = 0, below
    matrix[1:, 1:] = symbol[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return matrix
