"""A choice put together from what an analysis has quantized, without quantizing again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ms_quant.analysis.request import CheckedAnalysis
from ms_quant.files.floats import round_finite
from ms_quant.formats.opening import FloatModel
from ms_quant.mixed_precision.candidates import Choice
from ms_quant.mixed_precision.costs import FLOAT
from ms_quant.models.names import GroupId, parse_linear
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.quantization.divided import as_divided


class AssembledModel(FloatModel):
    """The float model, rotated where the plans rotate it, with each group as in its scheme's job.

    Linears smooth their inputs themselves. In a checkpoint in whose norms smoothing is folded these
    are rounded, and some codes are others: its errors are others of the same size.

    Args:
        analysis: the finished analysis, whose job keeps the linears.
        choice: every group to its scheme.
    """

    format = "assembled"

    def __init__(self, analysis: CheckedAnalysis, choice: Choice):
        checked, plans = analysis.checked, analysis.subject.plans
        self.choice = choice
        self.config, self.dtype = checked.plan.config, checked.plan.dtype
        self._jobs = {scheme: analysis.job(target) for target, scheme in enumerate(plans)}
        ranges = next(iter(self._jobs.values())).ranges()
        directory = str(checked.options.job_directory)
        self.checkpoint = as_divided(checked.tensors, self.config, ranges, directory)
        self._names = set(self.checkpoint.names)
        layers = (plans[name].layers[group] for group, name in choice.items() if name != FLOAT)
        self.phased = any(layer is not None and layer.phased for layer in layers)

    def tensor(self, name: str) -> np.ndarray:
        return self._rounded(name, super().tensor(name))

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        for start, part in super().chunks(name):
            yield start, self._rounded(name, part)

    def _rounded(self, name: str, array: np.ndarray) -> np.ndarray:
        return round_finite(array, self.dtype, name).astype(np.float32)

    def linear(self, path: str) -> QuantizedLinear | None:
        found = parse_linear(path)
        group = self.config.block(found.block).group_of(found.inner)
        assert group is not None, path
        scheme = self.choice[GroupId(found.block, group.name)]
        if scheme == FLOAT:
            return None
        made, name = self._jobs[scheme].linear(found.block, found.inner), f"{path}.bias"
        bias = self.tensor(name) if name in self._names else None
        return replace(made, bias=bias, input_dtype=self.dtype)
