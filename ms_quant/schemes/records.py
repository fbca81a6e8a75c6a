"""What a scheme is: a frozen record of numerics, without behaviour of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ms_quant.numerics.activation import ActivationFormat
from ms_quant.numerics.grid import WeightFormat


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a linear.

    Attributes:
        name: name as checkpoint descriptions spell it.
        weight: how weights become codes.
        activation: how inputs are quantized.
        summary: one line for ``ms-quant schemes``.
        algorithm: the algorithm that the scheme cannot do without, or "".
        options: names of what may be chosen of the weight's format.
        weight_with: the weight's format with chosen options, where that is another kind; None
            replaces fields of ``weight``.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat
    summary: str
    algorithm: str = ""
    options: tuple[str, ...] = ()
    weight_with: Callable[[Mapping[str, Any]], WeightFormat] | None = None

    @property
    def needs_calibration(self) -> bool:
        return not self.activation.dynamic

    @property
    def chosen(self) -> dict[str, Any]:
        """The options of the weight's format as they are, for records."""
        return {name: getattr(self.weight, name) for name in self.options}
