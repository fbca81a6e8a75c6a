"""What a number format is: frozen records, without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Granularity(str, Enum):
    """Which values share one scale."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"
    PER_TOKEN = "per-token"


@dataclass(frozen=True)
class QuantSpec:
    """One operand of a quantized linear.

    Attributes:
        dtype: name of the stored or computed type.
        granularity: which values share one scale.
        symmetric: True when the zero point is 0.
        dynamic: True when scales are computed at run time.
    """

    dtype: str
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a linear.

    Attributes:
        name: name as checkpoint descriptions spell it.
        weight: how weights are stored.
        activation: how inputs are quantized.
        summary: one line for ``ms-quant schemes``.
        served_by: runtimes that serve it from a golden-stick checkpoint.
        not_served_by: runtimes that do not, with the reason.
    """

    name: str
    weight: QuantSpec
    activation: QuantSpec
    summary: str
    served_by: tuple[str, ...]
    not_served_by: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        return not self.activation.dynamic
