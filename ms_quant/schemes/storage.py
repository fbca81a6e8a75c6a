"""How a checkpoint format holds a scheme: frozen records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def dtype(self, model_dtype: np.dtype) -> np.dtype:
        """The type of the scales for a model of some type."""
        if self is ScaleType.WIDENED:
            return widened(model_dtype)
        narrow = self is ScaleType.MODEL or (
            self is ScaleType.BFLOAT16 and model_dtype.name == "bfloat16"
        )
        return model_dtype if narrow else DTYPES["float32"]


class SmoothingTarget(str, Enum):
    """Where a smoothing vector goes."""

    INPUT_SCALE = "input-scale"  # one static input scale for each channel
    NORM = "norm"  # the norm, or the linear, that makes the input
    MUL_SCALE = "mul-scale"  # a tensor of its own that the input is multiplied by


def _into_norms() -> dict[SmoothingTarget, ActivationFormat | None]:
    return {SmoothingTarget.NORM: None}


def wanted_text(only: Mapping[str, Any]) -> str:
    """Options and the values that they must have, in words."""
    return ", ".join(f"{option} {_any_of(value)}" for option, value in only.items())


def _any_of(value: Any) -> str:
    *others, last = map(str, _several(value))
    return f"{', '.join(others)} or {last}" if others else last


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class FormatSupport:
    """How one checkpoint format holds a scheme, and who serves that.

    Attributes:
        format: name of the format.
        served_by: runtimes that serve it from such a checkpoint.
        kernels: the operators that they run.
        not_served_by: runtimes that read the format and do not, with the reason.
        scale_type: of the weight's scales.
        targets: where a smoothing vector may go, the default first, and how inputs are quantized
            then; None is the scheme's way.
        only: option to the value with which alone the format holds it, or to several.
        weight: how weights become codes there, where that is not the scheme's way.
        routed_by: runtimes that serve it for routed experts, where they are others.
        float32_scales: whether runtimes take scales of the weight in float32 as well.
    """

    format: str
    served_by: tuple[str, ...] = ()
    kernels: str = ""
    not_served_by: tuple[str, ...] = ()
    scale_type: ScaleType = ScaleType.FLOAT32
    targets: Mapping[SmoothingTarget, ActivationFormat | None] = field(default_factory=_into_norms)
    only: Mapping[str, Any] = field(default_factory=dict)
    float32_scales: bool = False
    weight: Callable[[WeightFormat], WeightFormat] | None = None
    routed_by: tuple[str, ...] | None = None

    def takes(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the format holds the scheme with some options."""
        return all(chosen[option] in _several(value) for option, value in self.only.items())

    @property
    def wanted(self) -> str:
        """The options with which alone the format holds it, in words."""
        return wanted_text(self.only)

    @property
    def experts_served_by(self) -> tuple[str, ...]:
        """Those that serve it for routed experts and not for other linears."""
        return tuple(text for text in self.routed_by or () if text not in self.served_by)

    def runtimes(self, routed: bool) -> tuple[str, ...]:
        """Those that serve it, for routed experts or for other linears."""
        return self.served_by if not routed or self.routed_by is None else self.routed_by


@dataclass(frozen=True)
class Storage:
    """How one linear is held by a checkpoint.

    Attributes:
        support: how the format holds the scheme.
        target: where a smoothing vector goes.
        dtype: the type of what stays float.
        scale_type: of the weight's scales; others' checkpoints may have another than ours.
        foreign: whether others made the numbers: what follows from other tensors may then be
            rounded otherwise.
    """

    support: FormatSupport
    target: SmoothingTarget
    dtype: np.dtype
    scale_type: ScaleType
    foreign: bool = False

    @property
    def format(self) -> str:
        """The name of the format."""
        return self.support.format

    @property
    def scale_dtype(self) -> np.dtype:
        """The type of the weight's scales."""
        return self.scale_type.dtype(self.dtype)

    def narrowed(self) -> Storage:
        """The same with weight scales in the model's type."""
        return replace(self, scale_type=ScaleType.MODEL)

    def widened(self) -> Storage:
        """The same with weight scales in float32."""
        return replace(self, scale_type=ScaleType.FLOAT32)
