"""What an algorithm is given, and what it answers.

An algorithm is a function ``solve(problem, solution) -> Solution`` that adds to what the ones
before it have found. It ends as numbers: a smoothing vector, factors on the weights' ranges, a
grid, codes on it, a transform, a branch. :func:`apply` turns them into quantized linears, in one
place for every algorithm and scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ms_quant.numerics import rotation
from ms_quant.numerics.activation import Activation, ObservedRange, PerToken, StaticActivation
from ms_quant.numerics.grid import Grid
from ms_quant.numerics.linear import Kronecker, LowRank, QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import ScaleType
from ms_quant.statistics.observers import ActivationStats


@dataclass(frozen=True)
class Solution:
    """Attributes:
    smooth: float32 (in,), what the input is divided by; None for no smoothing.
    input_range: (low, high) of the input after smoothing, in place of what was seen; or None.
    kronecker: transform of the smoothed input, or None.
    input_clip: factor on each token's range, for per-token activations.
    branch: linear name to the low-rank part of its weight that stays float.
    clip: linear name to the factor on each group's range, (out, 1) or (out, groups); missing
        means 1.
    grids: linear name to the grid, where it does not follow from the weight's range.
    codes: linear name to the codes on it, where they are not the nearest ones.
    note: what was chosen, for the report.
    """

    smooth: np.ndarray | None = None
    input_range: tuple[float, float] | None = None
    kronecker: Kronecker | None = None
    input_clip: float = 1.0
    branch: Mapping[str, LowRank] = field(default_factory=dict)
    clip: Mapping[str, np.ndarray] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)


ErrorOf = Callable[[Mapping[str, QuantizedLinear]], float]
"""The error that candidates in place of float linears make, by the names of the linears."""


@dataclass(frozen=True)
class Problem:
    """Linears that read the same input, to be quantized together.

    Attributes:
        name: the group's name, for errors.
        scheme: the scheme to reach.
        weights: linear name to float32 (out, in).
        biases: linear name to float32 (out,), where there is one.
        stats: statistics of the shared input, None when nothing needs them.
        dtype: type that scales in the model's type are stored in.
        mse: error of the network with the linears of a candidate in place of the float ones;
            a mean squared error over calibration tokens.
        relative_mse: squared error over squared output of each token, in the mean over tokens; a
            token with huge activations counts as any other. None where no block is run.
        token_error: the same and a share of the largest, which a search of static ranges
            minimises.
        smoothing: whether there is a place for a smoothing vector of this input.
        shared: how many adjacent sets of ``head`` inputs must share their smoothing, as query
            heads that read one value head do; (1, 1) for none.
        input_dtype: the type of inputs that the linears multiply by a vector of their own, or scale
            by long blocks, where they run; what is folded elsewhere is not rounded so.
        scale_type: of the weights' scales.
        scores: names of the linears whose outputs are multiplied into attention scores.
        unsearched: (low, high) of the input over the tokens that errors are not measured on; None
            where nobody tells them apart.
        gain: of the norm that makes the input, as of :class:`ObservedRange`.
    """

    name: str
    scheme: Scheme
    weights: Mapping[str, np.ndarray]
    biases: Mapping[str, np.ndarray]
    stats: ActivationStats | None
    dtype: np.dtype
    mse: ErrorOf
    relative_mse: ErrorOf | None = None
    token_error: ErrorOf | None = None
    smoothing: bool = True
    shared: tuple[int, int] = (1, 1)
    input_dtype: np.dtype = DTYPES["float32"]
    scale_type: ScaleType = ScaleType.FLOAT32
    scores: frozenset[str] = frozenset()
    unsearched: tuple[np.ndarray, np.ndarray] | None = None
    gain: np.ndarray | None = None

    def held_out(self) -> Problem:
        """The problem with the input's range over the tokens that errors are not measured on.

        Candidates are tried so: what was made of a token never clips it, and a candidate that
        clips in other texts would look good.
        """
        if self.unsearched is None:
            return self
        return replace(self, stats=self.seen.within(*self.unsearched))

    @property
    def scale_dtype(self) -> np.dtype:
        """The type of the weights' scales."""
        return self.scale_type.dtype(self.dtype)

    @property
    def seen(self) -> ActivationStats:
        """The statistics, of an algorithm that has asked for them."""
        assert self.stats is not None, self.name
        return self.stats

    def share(self, values: np.ndarray) -> np.ndarray:
        """(in,) values of channels, where those that must share one all have the largest."""
        heads, size = self.shared
        if heads == 1:
            return values
        sets = values.reshape(-1, heads, size)
        return np.broadcast_to(sets.max(axis=1, keepdims=True), sets.shape).reshape(-1)


@dataclass(frozen=True)
class InputMaxima:
    """What decides the smoothing of an input that all experts of a layer read.

    Their weights are never in memory together: only the largest magnitude of each column is known,
    which is found expert by expert.

    Attributes:
        activations: float32 (in,), the largest magnitude of each channel over all tokens.
        columns: float32 (in,), the largest magnitude of each column over all quantized weights
            that read it.
    """

    activations: np.ndarray
    columns: np.ndarray

    def with_weight(self, weight: np.ndarray) -> InputMaxima:
        """The same with one more weight, float32 (out, in), among those that read it."""
        found = np.maximum(weight.max(axis=0), -weight.min(axis=0))
        return replace(self, columns=np.maximum(self.columns, found))


OfMaxima = Callable[[Sequence[str], InputMaxima, Any], Solution]
"""The smoothing of an input that experts read: of the names of all that read it, what is known of
it, and the algorithm's options."""


def input_quantization(problem: Problem, solution: Solution) -> Activation:
    """How the shared input is quantized."""
    format = problem.scheme.activation
    if isinstance(format, PerToken):
        return PerToken(format.bits, solution.input_clip)
    if format.dynamic:
        return format.fit(None, None)
    (low, high), smooth = problem.seen.ranges, solution.smooth
    if smooth is not None and not format.holds_smoothing:
        low, high, smooth = low / smooth, high / smooth, None
    if solution.input_range is not None:
        inside = np.ones_like(low) if smooth is None else smooth
        low, high = (np.float32(bound) * inside for bound in solution.input_range)
    seen = ObservedRange(low, high, problem.dtype, problem.name, problem.gain)
    return format.fit(seen, smooth)


def smoothing(problem: Problem, solution: Solution) -> np.ndarray | None:
    """float32 (in,): what the input is divided by in all; a static activation's own vector."""
    if problem.scheme.activation.holds_smoothing:
        activation = input_quantization(problem, solution)
        assert isinstance(activation, StaticActivation)
        return activation.smooth
    return solution.smooth


def checked(problem: Problem, solution: Solution) -> dict[str, np.ndarray]:
    """The weights as they are rounded: linear name to float32 (out, in)."""
    smooth = smoothing(problem, solution)
    weights = {}
    for name, weight in problem.weights.items():
        if smooth is not None:
            weight = weight * smooth
        if name in solution.branch:
            weight = weight - solution.branch[name].weight
        if solution.kronecker is not None:
            left, right = solution.kronecker.left, solution.kronecker.right
            weight = rotation.fold_kronecker(weight, left, right, name).astype(np.float32)
        weights[name] = weight
    return weights


def apply(problem: Problem, solution: Solution) -> dict[str, QuantizedLinear]:
    """The quantized linears that a solution stands for, rounded to nearest where it says nothing
    else."""
    activation = input_quantization(problem, solution)
    inside = problem.scheme.activation.holds_smoothing
    linears = {}
    for name, weight in checked(problem, solution).items():
        grid = grid_of(problem, solution, name, weight)
        codes = solution.codes[name] if name in solution.codes else grid.round(weight)
        linears[name] = QuantizedLinear(
            codes,
            grid,
            problem.biases.get(name),
            activation,
            None if inside else solution.smooth,
            solution.kronecker,
            solution.branch.get(name),
            problem.input_dtype,
        )
    return linears


def grid_of(problem: Problem, solution: Solution, name: str, weight: np.ndarray) -> Grid:
    """The grid of one linear's weight, as it will be rounded."""
    if name in solution.grids:
        return solution.grids[name]
    return problem.scheme.weight.fit(
        weight, name, problem.scale_dtype, solution.clip.get(name, 1.0)
    )


def seen_inputs(problem: Problem, solution: Solution) -> np.ndarray:
    """float32 (tokens, in): the kept tokens as the weight's columns meet them, not quantized."""
    x = problem.seen.rows
    smooth = smoothing(problem, solution)
    if smooth is not None:
        x = x / smooth
    return x if solution.kronecker is None else solution.kronecker.apply(x)


def seen_hessian(problem: Problem, solution: Solution) -> np.ndarray:
    """float32 (in, in): the mean of x x^T over all tokens, of the same inputs."""
    hessian = problem.seen.hessian
    smooth = smoothing(problem, solution)
    if smooth is not None:
        hessian = hessian / smooth / smooth[:, None]
    if solution.kronecker is not None:
        left, right = solution.kronecker.left, solution.kronecker.right
        for _ in range(2):  # K^T H K, as H is symmetric
            hessian = rotation.apply_kronecker(hessian, left, right, problem.name).T
    return np.ascontiguousarray(hessian, np.float32)


def noted(solution: Solution, **note: Any) -> Solution:
    """The solution with more in its note."""
    return replace(solution, note={**solution.note, **note})
