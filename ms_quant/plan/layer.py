"""What becomes of the linears of one group: decided once, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.algorithms import AlgorithmPipeline, get_algorithms
from ms_quant.numerics.activation import Phased
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.storage import SmoothingTarget, Storage
from ms_quant.schemes.support import store
from ms_quant.schemes.table import get_scheme


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of the linears of one group.

    Attributes:
        scheme: their numerics, as the checkpoint's runtime computes them.
        storage: how the checkpoint holds them.
        algorithms: what finds the numbers.
    """

    scheme: Scheme
    storage: Storage
    algorithms: AlgorithmPipeline

    @property
    def dtype(self) -> np.dtype:
        """The type of what stays float."""
        return self.storage.dtype

    @property
    def foreign(self) -> bool:
        """Whether others made the numbers."""
        return self.storage.foreign

    @property
    def phased(self) -> bool:
        """Whether prefill and decode are told apart."""
        return isinstance(self.scheme.activation, Phased)

    @property
    def needs_calibration(self) -> bool:
        return self.scheme.needs_calibration or self.algorithms.any("calibrated")

    @property
    def folds(self) -> bool:
        """Whether smoothing goes into what makes the input."""
        into_producer = self.storage.target is SmoothingTarget.NORM
        return self.algorithms.any("smooths") and into_producer

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What decides the numbers: layers of two formats with the same get the same."""
        scheme, storage = self.scheme, self.storage
        kinds = scheme.weight, scheme.activation, storage.scale_dtype, storage.target
        return *kinds, self.algorithms, storage.dtype

    def record(self) -> dict[str, Any]:
        """The same as JSON; what is usual for the format is not said."""
        scheme, storage = self.scheme, self.storage
        _, usual = store(get_scheme(scheme.name, **scheme.chosen), self.dtype, storage.format)
        scales = storage.scale_dtype
        return {
            "scheme": scheme.name,
            "algorithm": self.algorithms.name,
            **({"scheme_options": scheme.chosen} if scheme.chosen else {}),
            **({"algorithm_options": self.algorithms.chosen} if self.algorithms.chosen else {}),
            **({"scale_dtype": scales.name} if scales != usual.scale_dtype else {}),
            **({"fold": storage.target.value} if storage.target is not usual.target else {}),
        }


def layer_plan(
    name: str,
    algorithm: str,
    dtype: np.dtype,
    *,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    format: str = "",
    target: SmoothingTarget | None = None,
) -> LayerPlan:
    """What becomes of a group that is to be of a scheme by some algorithms.

    Args:
        name: a name from ``SCHEMES``.
        algorithm: names from ``ALGORITHMS`` joined with ``+``, or ``"minmax"``.
        dtype: the type of what stays float.
        options: of the scheme.
        settings: options of the algorithms.
        format: the checkpoint format; "" is the first that a runtime serves.
        target: where smoothing vectors go; None is the format's first choice. Where nothing
            smooths, no tensor is stored for it.

    Raises:
        MsQuantError: there is no such layer.
    """
    scheme, storage = store(get_scheme(name, **(options or {})), dtype, format, target)
    algorithms = get_algorithms(algorithm, scheme, settings or {})
    if not algorithms.any("smooths"):
        scheme, storage = _without_smoothing(name, storage, options or {})
    return LayerPlan(scheme, storage, algorithms)


def _without_smoothing(
    name: str, storage: Storage, options: Mapping[str, Any]
) -> tuple[Scheme, Storage]:
    """There is nothing to hold."""
    scheme = get_scheme(name, **options)
    _, usual = store(scheme, storage.dtype, storage.format)
    target = usual.target
    if target is SmoothingTarget.MUL_SCALE:
        target = SmoothingTarget.NORM
    return store(scheme, storage.dtype, storage.format, target)


def recorded_layer(record: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """What a record says was done to a group, by the text of its id."""
    mixed = record.get("mixed")
    entry = mixed.get(group) if isinstance(mixed, Mapping) else None
    return entry if isinstance(entry, Mapping) else record
