"""FlatQuant: an invertible Kronecker transform that makes 4-bit rounding harm a group less.

Linears of one input x (tokens, K) are deployed as

    y = dq(q(x')) @ dq(q(W'))^T,   x' = x @ kron(left, right),   W' = W @ inverse(kron)^T,

with a symmetric scale for each token of x', absmax * clip_ratio / 7, and for each row of W',
absmax * weight_clip / 7. The factors and the clipping are trained on the squared error of y
against x @ W^T with straight-through rounding, and start where a closed form puts them.

**The start.** With M = kron @ kron^T, the error that rounding of x' makes is proportional to
tr(M Sx) tr(M^-1 Sw), with Sx and Sw the second moments of the inputs and of the weights' rows; so
is that of W'. It is least where M is the geometric mean of Sx^-1 and Sw. As a Kronecker product,
one factor is solved for while the other is held, in turns. Any orthogonal matrix may follow
sqrt(M); a random Hadamard one spreads outliers.

**The training.** Adam with a cosine decay. A factor moves by P <- P (I - step), as its gradient is
taken in the frame of P: a step changes x' by a fraction of x', whatever the condition of P. One
clipping ratio of the tokens and one of the weights' rows are trained along, as sigmoids; then each
weight row takes its best ratio of a grid, given how the inputs are rounded. A step looks at some
tokens and some outputs, so that its cost does not grow with the linears.

Source: Sun et al., FlatQuant, arXiv 2410.09426. Different here: the start; plain matrices in place
of SVD factors; the rows' clipping, which is trained row by row there; and no scaling of single
channels beside the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ms_quant.algorithms.flat_group import Flat, Group
from ms_quant.algorithms.flat_options import FlatOptions
from ms_quant.algorithms.flat_training import descend
from ms_quant.algorithms.problem import Problem, Solution, checked, seen_inputs
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.numerics import rotation
from ms_quant.numerics.activation import PerToken
from ms_quant.numerics.linear import Kronecker

CLIPS = (1.0, 0.9, 0.8, 0.7)  # of all tokens and rows alike, for what is not trained
BALANCING_TURNS = 6
DAMPING = 1e-6  # of a second moment's mean, added to each; channels may be all zeros


DEFAULTS = FlatOptions()


def train(
    inputs: np.ndarray,
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    act_bits: int = 4,
    weight_bits: int = 4,
    options: FlatOptions = DEFAULTS,
) -> Flat:
    """Trains the transform of linears that read the same input.

    Args:
        inputs: float32 (tokens, K).
        weights: linear name to float32 (out, K).
        name: the group's name, for errors.
        act_bits: 4 or 8, of the inputs.
        weight_bits: 4 or 8, of the weights.
        options: how to train.

    Returns:
        The least loss of what was trained and of every start: the identity, a random Hadamard
        matrix, and the balanced one, each with every one of ``CLIPS``. The same arguments give
        the same bits on one machine with as many threads. MindSpore is much faster with
        ``mindspore.runtime.launch_blocking()``, which is the caller's to choose.

    Raises:
        MsQuantError: a value is NaN or inf, a shape or an option is wrong, or K is twice an odd
            number, which has no balanced factors.
    """
    group = Group(inputs, weights, name, act_bits, weight_bits)
    _check_options(options, name)
    starts = [group.deploy(*start) for start in _starts(group, options.seed)]
    best = min(starts, key=lambda flat: flat.loss)
    if best.loss > 0:
        refined = group.refine(best, options.row_clips)
        trained = descend(group, best, options) if options.steps else None
        candidates = [best, refined]
        if trained is not None:
            candidates.append(group.refine(trained, options.row_clips))
        best = min(candidates, key=lambda flat: flat.loss)
    return best


def solve(problem: Problem, solution: Solution, options: FlatOptions) -> Solution:
    """Factors are rounded to the type that stores them before the weights take their inverse."""
    activation = problem.scheme.activation
    assert isinstance(activation, PerToken)
    flat = train(
        seen_inputs(problem, solution),
        checked(problem, solution),
        problem.name,
        act_bits=activation.bits,
        weight_bits=problem.scheme.weight.bits,
        options=options,
    )
    factors = (m.astype(problem.dtype).astype(np.float32) for m in (flat.left, flat.right))
    return replace(
        solution,
        kronecker=Kronecker(*factors),
        input_clip=float(flat.clip_ratio),
        clip=flat.weight_clip,
        note={**solution.note, "flat_loss": flat.loss},
    )


def _check_options(options: FlatOptions, name: str) -> None:
    least = {"steps": 0, "batch_tokens": 1, "batch_rows": 1, "row_clips": 1, "seed": 0}
    for key, smallest in least.items():
        if getattr(options, key) < smallest:
            found = getattr(options, key)
            raise BadArgumentError(f"{name}: {key} is {found}, expected at least {smallest}")
    for key in ("learning_rate", "clip_learning_rate"):
        rate = getattr(options, key)
        if not 0 < rate < math.inf:
            raise BadArgumentError(f"{name}: {key} is {rate}, expected a positive number")


def _starts(group: Group, seed: int) -> Iterator[tuple]:
    """Arguments of :meth:`Group.deploy`; the identity without clipping is the first."""
    a, b = group.factors
    turns = [_orthogonal(a, 2 * seed), _orthogonal(b, 2 * seed + 1)]
    balanced = _balanced(group)
    for left, right in (
        (np.eye(a), np.eye(b)),
        (turns[0], turns[1]),
        (balanced[0] @ turns[0], balanced[1] @ turns[1]),
    ):
        for clip in CLIPS:
            yield left, right, clip, group.same_clip(clip)


def _orthogonal(n: int, seed: int) -> np.ndarray:
    """A random Hadamard matrix, or a random orthogonal one where there is none; float64 (n, n)."""
    try:
        return rotation.random_hadamard(n, seed)
    except MsQuantError:
        return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def _balanced(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the least tr(M Sx) tr(M^-1 Sw); see the module. float64, symmetric."""
    a, b = group.factors
    x = group.inputs.astype(np.float64).reshape(-1, a, b)
    w = np.concatenate(
        [weight / math.sqrt(group.energies[key]) for key, weight in group.weights.items()]
    ).reshape(-1, a, b)
    left, right = np.eye(a), np.eye(b)  # of M = kron(left, right)
    for _ in range(BALANCING_TURNS):
        left = _geometric_mean(_moment(x, right), _moment(w, np.linalg.inv(right)))
        x_turned, w_turned = x.transpose(0, 2, 1), w.transpose(0, 2, 1)
        right = _geometric_mean(_moment(x_turned, left), _moment(w_turned, np.linalg.inv(left)))
    return _power(left, 0.5), _power(right, 0.5)


def _moment(rows: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """The sum of R @ metric @ R^T over rows R, damped and of trace n.

    Args:
        rows: float64 (count, n, m).
        metric: (m, m).

    Returns:
        float64 (n, n), positive definite; the identity if all rows are zero.
    """
    n = rows.shape[1]
    products = (rows @ metric).transpose(1, 0, 2).reshape(n, -1)
    moment = products @ rows.transpose(1, 0, 2).reshape(n, -1).T
    mean = np.trace(moment) / n
    if not mean > 0:
        return np.eye(n)
    return (moment + moment.T) / (2 * mean) + DAMPING * np.eye(n)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, values.max() * 1e-14) ** exponent @ vectors.T


def _geometric_mean(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The M with M x M = w, the geometric mean of x^-1 and w; symmetric, of trace n."""
    root, inverse = _power(x, 0.5), _power(x, -0.5)
    mean = inverse @ _power(root @ w @ root, 0.5) @ inverse
    return (mean + mean.T) * (len(x) / (2 * np.trace(mean)))
