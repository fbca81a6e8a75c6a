"""The input of a linear in a diffusion network: static with the parameters of each timestep, or
per token.

Source: docs/numerics.md, "W8A8_TIMESTEP"; the tensors are MindIE-SD's and msModelSlim's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.activation import (
    ObservedRange,
    PerToken,
    StaticActivation,
    tensor_activation,
)


@dataclass(frozen=True)
class StatedTables:
    """What a file states for the static steps of one linear, in place of what would follow.

    Attributes:
        deq_scale: float32 (T, n).
        quant_bias: int32 (T, n), the bias in it.
    """

    deq_scale: np.ndarray
    quant_bias: np.ndarray


@dataclass(frozen=True)
class TimestepActivation:
    """Static parameters of T timesteps. Which steps use them is a policy's to say.

    Attributes:
        scale: float32 (T,), exact in the stored type; 0 for a step that calibration did not
            reach, which has no parameters.
        offset: int8 (T,).
        stated: tables of a file whose writer rounded in other ways than here; or None.
    """

    scale: np.ndarray
    offset: np.ndarray
    stated: StatedTables | None = None
    tokens = PerToken(8)

    def fake(self, x: np.ndarray) -> np.ndarray:
        """What the linear sees in a dynamic step."""
        return self.tokens.fake(x)

    def check(self, step: int, name: str) -> None:
        """Refuses a step without parameters.

        Raises:
            MsQuantError: the step is not within 0..T-1, or calibration did not reach it.
        """
        count = len(self.scale)
        if not 0 <= step < count:
            raise BadArgumentError(
                f"{name}: timestep {step} is static, expected 0..{count - 1} as there are "
                f"parameters of {count} timesteps"
            )
        if not self.scale[step]:
            raise BadArgumentError(
                f"{name}: timestep {step} is static but calibration did not reach it, expected a "
                "dynamic one or calibration inputs of it"
            )

    def at(self, step: int | None, channels: int, name: str = "x") -> StaticActivation | PerToken:
        """How an input of some channels is quantized in a static step, or, for None, in a dynamic
        one."""
        if step is None:
            return self.tokens
        self.check(step, name)
        scale = np.float32(self.scale[step])
        vector = np.full(channels, scale, np.float32)
        return StaticActivation(scale, int(self.offset[step]), vector, folds_bias=True)

    def arrays(self) -> dict[str, np.ndarray]:
        """As they are stored: float32 and int8, (T, 1)."""
        return {"input_scale": self.scale[:, None], "input_offset": self.offset[:, None]}


@dataclass(frozen=True)
class Timestep:
    """The format of :class:`TimestepActivation`."""

    bits = 8
    dynamic = False
    holds_smoothing = False

    def fit(self, seen: ObservedRange | None, smooth: np.ndarray | None) -> TimestepActivation:
        """Parameters of each step from ranges (T, in); a step without any has low > high."""
        assert seen is not None and smooth is None
        lows, highs = np.atleast_2d(seen.low), np.atleast_2d(seen.high)
        scale, offset = np.zeros(len(lows), np.float32), np.zeros(len(lows), np.int8)
        for t in np.flatnonzero((lows <= highs).all(axis=1)):
            row = replace(seen, low=lows[t], high=highs[t], name=f"{seen.name}, timestep {t}")
            static = tensor_activation(row)
            scale[t], offset[t] = static.scale, static.offset
        return TimestepActivation(scale, offset)

    def restore(self, static: StaticActivation) -> TimestepActivation:
        """One step, of T = 1."""
        offset = np.array([static.offset], np.int8)
        return TimestepActivation(np.array([static.scale], np.float32), offset)

    def restore_steps(self, scale: np.ndarray, offset: np.ndarray) -> TimestepActivation:
        """All steps, from what is stored: (T, 1)."""
        return TimestepActivation(scale[:, 0], offset[:, 0])
