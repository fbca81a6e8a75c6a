"""The timesteps of calibration inputs and of the call that a Cell is in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.activation import MxTokens
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.statistics.observers import StepStats
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

SHOWN = 4
MX_TARGET = "w4a4_linear"
WIDE = MxTokens("mxfp8_cann0")
"""What MXFP4 inputs are in steps whose strategy is W4A8."""


def current_step(name: str) -> int:
    """The index of this context's step, for what cannot do without.

    Raises:
        MsQuantError: none is set.
    """
    step = TimestepManager.get_timestep_idx()
    if step is None:
        raise BadArgumentError(
            f"{name}: no timestep is set, expected TimestepManager.set_timestep_idx(t) before the "
            "network is called"
        )
    return step


def is_static(policy: TimestepPolicyConfig, step: int) -> bool:
    return policy.get_strategy(step, "w8a8_static_linear") == "static"


def takes_wide(activation: object, policy: TimestepPolicyConfig) -> bool:
    """Whether inputs are in MXFP4, and in MXFP8 in some step."""
    in_mxfp4 = isinstance(activation, MxTokens) and activation.bits == 4
    return in_mxfp4 and policy.chooses("W4A8", MX_TARGET)


def is_wide(policy: TimestepPolicyConfig, step: int) -> bool:
    return policy.get_strategy(step, MX_TARGET) == "W4A8"


def count_steps(found: Sequence[int | None], policy: TimestepPolicyConfig) -> int:
    """T, where the calibration inputs are of the steps ``found``.

    Raises:
        MsQuantError: an input is of no step, none is of a static step, or nothing tells T.
    """
    steps = [step for step in found if step is not None]
    if len(steps) < len(found):
        raise BadArgumentError(
            f"calibration input {found.index(None)}: no timestep is set, expected "
            "TimestepManager.set_timestep_idx(t) before it is given"
        )
    count = TimestepManager.get_timestep_idx_max() or 1 + max(steps, default=-1)
    if not count:
        raise BadArgumentError(
            "scheme W8A8_TIMESTEP: the number of timesteps is not known, expected calibration "
            "inputs or TimestepManager.set_timestep_idx_max(T)"
        )
    refuse_unseen("scheme W8A8_TIMESTEP", set(steps), count, policy)
    return count


def refuse_unseen(
    name: str, seen: Collection[int], count: int, policy: TimestepPolicyConfig
) -> None:
    """Refuses static steps of T = ``count`` that calibration did not reach.

    Raises:
        MsQuantError: there is one.
    """
    missing = [t for t in range(count) if t not in seen and is_static(policy, t)]
    if missing:
        more = ", ..." if len(missing) > SHOWN else ""
        listed = ", ".join(map(str, missing[:SHOWN])) + more
        raise BadArgumentError(
            f"{name}: no calibration input reached it in the static timesteps {listed}; expected "
            "some, or the strategy dynamic"
        )


def recorder(stats: StepStats) -> Callable[[np.ndarray], None]:
    """Adds inputs to the statistics of the step that is set when they come.

    Raises:
        MsQuantError: none is set, or one that is not below T.
    """

    def observe(x: np.ndarray) -> None:
        step = current_step(stats.name)
        if step >= stats.steps:
            raise BadArgumentError(
                f"{stats.name}: timestep {step}, expected 0..{stats.steps - 1} as calibration "
                f"inputs are of {stats.steps} timesteps"
            )
        stats.update_step(x, step)

    return observe


def forward_rows(
    linear: QuantizedLinear, stats: StepStats, policy: TimestepPolicyConfig
) -> np.ndarray:
    """float32 (len(rows), out): what a linear makes of the kept tokens, each in its step."""
    rows, of_row = stats.rows, stats.row_steps
    y = np.zeros((len(rows), len(linear.weight)), np.float32)
    for step in np.unique(of_row).tolist():
        chosen = of_row == step
        y[chosen] = linear.forward(rows[chosen], step=step if is_static(policy, step) else None)
    return y
