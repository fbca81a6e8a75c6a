"""What a scheme is: a frozen record, without behaviour of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from ms_quant.numerics.activation import ActivationFormat
from ms_quant.numerics.grid import WeightFormat
from ms_quant.numerics.storage import DTYPES, widened


class ScaleType(str, Enum):
    """The type in which the runtime holds a weight's scales; codes are made with scales of it."""

    FLOAT32 = "float32"
    MODEL = "the model's"
    BFLOAT16 = "bfloat16 for bfloat16 models, else float32"
    WIDENED = "the model's, which is made float32 again when it is loaded"


class Fold(str, Enum):
    """Where a smoothing vector goes."""

    INPUT_SCALE = "input-scale"  # one static input scale for each channel
    NORM = "norm"  # the norm, or the linear, that makes the input
    MUL_SCALE = "mul-scale"  # a tensor of its own that the input is multiplied by


def _into_norms() -> dict[Fold, ActivationFormat | None]:
    return {Fold.NORM: None}


@dataclass(frozen=True)
class Held:
    """How one checkpoint format holds a scheme, and who serves that.

    Attributes:
        format: name of the format.
        served_by: runtimes that serve it from such a checkpoint.
        kernels: the operators that they run.
        not_served_by: runtimes that read the format and do not, with the reason.
        scale_type: of the weight's scales.
        folds: where a smoothing vector may go, the default first, and how inputs are quantized
            then; None is the scheme's way.
        only: option to the value with which alone the format holds it.
        float32_scales: whether runtimes take scales of the weight in float32 as well.
    """

    format: str
    served_by: tuple[str, ...] = ()
    kernels: str = ""
    not_served_by: tuple[str, ...] = ()
    scale_type: ScaleType = ScaleType.FLOAT32
    folds: Mapping[Fold, ActivationFormat | None] = field(default_factory=_into_norms)
    only: Mapping[str, Any] = field(default_factory=dict)
    float32_scales: bool = False


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a linear.

    Attributes:
        name: name as checkpoint descriptions spell it.
        weight: how weights become codes.
        activation: how inputs are quantized.
        summary: one line for ``ms-quant schemes``.
        held: the formats that hold it, the default first; of a scheme that ``get_scheme`` gives,
            the chosen one alone. None holds a scheme of networks.
        algorithm: the algorithm that the scheme cannot do without, or "".
        options: names of what may be chosen of the weight's format.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat
    summary: str
    held: tuple[Held, ...] = ()
    algorithm: str = ""
    options: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The format of a checkpoint; "" for a scheme of networks."""
        return self.held[0].format if self.held else ""

    @property
    def fold(self) -> Fold:
        """Where a smoothing vector goes; with a linear of a network it stays."""
        return next(iter(self.held[0].folds)) if self.held else Fold.MUL_SCALE

    @property
    def served_by(self) -> tuple[str, ...]:
        return self.held[0].served_by if self.held else ()

    @property
    def not_served_by(self) -> tuple[str, ...]:
        return self.held[0].not_served_by if self.held else ()

    @property
    def needs_calibration(self) -> bool:
        return not self.activation.dynamic

    def scale_dtype(self, model_dtype: np.dtype) -> np.dtype:
        """The type of the weight's scales for a model of some type."""
        kind = self.held[0].scale_type if self.held else ScaleType.FLOAT32
        narrow = kind is ScaleType.MODEL or (
            kind is ScaleType.BFLOAT16 and model_dtype.name == "bfloat16"
        )
        if kind is ScaleType.WIDENED:
            return widened(model_dtype)
        return model_dtype if narrow else DTYPES["float32"]

    def narrowed(self, kind: ScaleType = ScaleType.MODEL) -> Scheme:
        """The same with weight scales that the model's type holds, whatever the format stores."""
        row = self.held[0] if self.held else Held("", folds={Fold.MUL_SCALE: None})
        return replace(self, held=(replace(row, scale_type=kind),))

    def widened(self) -> Scheme:
        """The same with weight scales in float32."""
        row = replace(self.held[0], scale_type=ScaleType.FLOAT32)
        return replace(self, held=(row,))

    @property
    def chosen(self) -> dict[str, Any]:
        """The options of the weight's format as they are, for records."""
        return {name: getattr(self.weight, name) for name in self.options}
