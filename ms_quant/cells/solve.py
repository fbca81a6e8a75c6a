"""Finding the quantized linears of one group of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ms_quant.algorithms.problem import Problem, apply
from ms_quant.cells import timesteps
from ms_quant.cells.blocks import WEIGHT, BlockErrors
from ms_quant.cells.choice import LinearPlan
from ms_quant.cells.sites import Site, weight_and_bias
from ms_quant.files.floats import round_finite
from ms_quant.formats.mindie_sd.choice import network_scale_type
from ms_quant.formats.mindie_sd.held import held_dtype
from ms_quant.models.linear_forward import Linear as Rows
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.timestep import TimestepPolicyConfig


@dataclass(frozen=True)
class Group:
    """Linears that read one input and become the same.

    Attributes:
        sites: where they are.
        plan: what they become.
        dtype: the type that they run in.
        stats: of their input, None where nothing needs them.
        policy: which timesteps are static, of linears of timesteps.
        block: errors of their block's output, None where their own count.
    """

    sites: tuple[Site, ...]
    plan: LinearPlan
    dtype: np.dtype
    stats: ActivationStats | None = None
    policy: TimestepPolicyConfig | None = None
    block: BlockErrors | None = None


@dataclass(frozen=True)
class Found:
    """A quantized linear.

    Attributes:
        linear: it.
        error: squared error over squared output on the kept calibration tokens, or of the weight
            where there are none.
        on_outputs: whether the error is that of outputs.
    """

    linear: QuantizedLinear
    error: float
    on_outputs: bool


def solve(group: Group) -> dict[str, Found]:
    """The quantized linears of a group, by path.

    Raises:
        MsQuantError: a value is NaN or inf, or does not fit what holds it.
    """
    floats = _Floats.of(group)
    plan, stats = group.plan, group.stats
    own = _OwnErrors(floats, stats, group.policy)
    problem = Problem(
        name=group.sites[0].path,
        scheme=plan.scheme,
        weights=floats.weights,
        biases=floats.biases,
        stats=stats,
        dtype=group.dtype,
        mse=own.mse if group.block is None else group.block.mse,
        relative_mse=None if group.block is None else group.block.relative_mse,
        token_error=None if group.block is None else group.block.token_error,
        input_dtype=group.dtype,
        scale_type=network_scale_type(plan.scheme),
        scores=frozenset(f"{site.path}{WEIGHT}" for site in group.sites if site.scores),
    )
    solution = plan.algorithms.first(problem)
    if solution.smooth is not None and not plan.scheme.activation.holds_smoothing:
        solution = replace(solution, smooth=stable_smooth(solution.smooth, group.dtype))
    made = apply(problem, plan.algorithms.rest(problem, solution))
    return {name.removesuffix(WEIGHT): own.found(name, linear) for name, linear in made.items()}


@dataclass
class _Floats:
    """float32 weights and biases of a group, by the name of the weight, as errors call it."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Group) -> _Floats:
        made = cls()
        for site in group.sites:
            weight, bias = weight_and_bias(site)
            name = f"{site.path}{WEIGHT}"
            made.weights[name] = weight
            if bias is not None:
                held = held_dtype(group.plan.scheme.name, "bias", group.dtype)
                rounded = round_finite(bias, held, f"{site.path}.bias")
                made.biases[name] = rounded.astype(np.float32)
        return made


@dataclass
class _OwnErrors:
    """Errors of a group's own outputs on the kept calibration tokens."""

    floats: _Floats
    stats: ActivationStats | None
    policy: TimestepPolicyConfig | None
    _exact: dict[str, np.ndarray] = field(default_factory=dict)

    def mse(self, candidate: Mapping[str, QuantizedLinear]) -> float:
        """Mean squared error of the outputs."""
        squares, size = np.float64(0), 0
        for name, linear in candidate.items():
            error = self._output(linear, linear.forward) - self._exact_output(name)
            squares += np.square(error).sum(dtype=np.float64)
            size += error.size
        return float(squares / size)

    def found(self, name: str, linear: QuantizedLinear) -> Found:
        """A linear with its error."""
        if self.stats is None or not len(self.stats.rows):
            exact = self.floats.weights[name]
            return Found(linear, _share(linear.float_weight() - exact, exact), False)
        exact = self._exact_output(name)
        output = self._output(linear, QuantizedForward(linear))
        return Found(linear, _share(output - exact, exact), True)

    def _exact_output(self, name: str) -> np.ndarray:
        assert self.stats is not None
        if name not in self._exact:
            bias = self.floats.biases.get(name)
            exact = self.stats.rows @ self.floats.weights[name].T
            self._exact[name] = exact + (0 if bias is None else bias)
        return self._exact[name]

    def _output(self, linear: QuantizedLinear, forward: Rows) -> np.ndarray:
        assert self.stats is not None
        if self.policy is not None and isinstance(self.stats, StepStats):
            return timesteps.forward_rows(linear, self.stats, self.policy)
        return forward(self.stats.rows)


def _share(error: np.ndarray, exact: np.ndarray) -> float:
    """Squared error over the square of what is exact."""
    whole = float(np.square(exact, dtype=np.float64).sum())
    return float(np.square(error, dtype=np.float64).sum()) / whole if whole else 0.0
