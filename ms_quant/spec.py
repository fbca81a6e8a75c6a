"""What a scheme is: a frozen record, without behaviour of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from ms_quant.numerics.activation import ActivationFormat
from ms_quant.numerics.grid import WeightFormat
from ms_quant.numerics.storage import DTYPES


class ScaleType(str, Enum):
    """The type in which the runtime holds a weight's scales; codes are made with scales of it."""

    FLOAT32 = "float32"
    MODEL = "the model's"
    BFLOAT16 = "bfloat16 for bfloat16 models, else float32"


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a linear.

    Attributes:
        name: name as checkpoint descriptions spell it.
        weight: how weights become codes.
        activation: how inputs are quantized.
        summary: one line for ``ms-quant schemes``.
        flavour: the checkpoint flavour that holds it by default; "" for a scheme of networks, which
            no checkpoint of a decoder holds.
        served_by: runtimes that serve it from a checkpoint of that flavour.
        not_served_by: runtimes that do not, with the reason.
        scale_type: of the weight's scales.
        algorithm: the algorithm that the scheme cannot do without, or "".
        options: names of what may be chosen of the weight's format.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat
    summary: str
    flavour: str
    served_by: tuple[str, ...]
    not_served_by: tuple[str, ...] = ()
    scale_type: ScaleType = ScaleType.FLOAT32
    algorithm: str = ""
    options: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        return not self.activation.dynamic

    def scale_dtype(self, model_dtype: np.dtype) -> np.dtype:
        """The type of the weight's scales for a model of some type."""
        narrow = self.scale_type is ScaleType.MODEL or (
            self.scale_type is ScaleType.BFLOAT16 and model_dtype.name == "bfloat16"
        )
        return model_dtype if narrow else DTYPES["float32"]

    @property
    def chosen(self) -> dict[str, Any]:
        """The options of the weight's format as they are, for records."""
        return {name: getattr(self.weight, name) for name in self.options}
