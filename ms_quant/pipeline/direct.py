"""A model with experts, quantized from its weights alone, is written as it is quantized.

Nothing is calibrated, so no tensor needs another block. Each is read once and written once, to its
place in the output's files; there is no job directory, and no pass over the model before. A kill
loses what was quantized in the last seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import kernels
from ms_quant.algorithms.table import ALGORITHMS
from ms_quant.files.filling import InTurn, fill
from ms_quant.files.floats import round_chunks
from ms_quant.files.placed_file import PlacedFile
from ms_quant.files.reader import Checkpoint, FloatTensors
from ms_quant.files.writer import Array, TensorPlan
from ms_quant.formats.checks import format_of
from ms_quant.models.names import GroupId, parse_linear
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.request import CheckedJob
from ms_quant.pipeline.writer import Ending, write_output
from ms_quant.plan.plan import Plan
from ms_quant.progress import PartProgress
from ms_quant.quantization.block import quantize
from ms_quant.quantization.weights import StoredWeights

GROUPS_AT_ONCE = 3


def is_direct(checked: CheckedJob) -> bool:
    """Whether a request is served without a job: a begun job goes on, several formats of one model
    share one, and what an algorithm has chosen is kept there."""
    options, plan = checked.options, checked.plan
    names = {name for layer in plan.distinct for name in layer.algorithms.names}
    return (
        plan.config.routing is not None
        and checked.tokens is None
        and not checked.others
        and not options.keep_job
        and not options.job_directory.exists()
        and all(ALGORITHMS[name].rotates for name in names)
    )


def write_direct(checked: CheckedJob, progress: PartProgress) -> bool:
    """Writes an output, or what is left of it.

    Args:
        checked: the checked request, see :func:`is_direct`.
        progress: told how much is done, 0 to 1.

    Returns:
        bool, whether it was finished before.

    Raises:
        MsQuantError: a tensor holds NaN or infinity or does not fit its type, another process
            writes the output, or the disk is full.
    """
    output, plan, options = checked.output(), checked.plan, checked.options
    if output.finished:
        return True
    mode = format_of(plan).mode

    facts: dict[str, Any] = {
        "chosen": {
            f"block {index}": {group.name: {} for group in plan.groups(index)}
            for index in range(plan.config.num_blocks)
        }
    }
    with (
        output.open(),
        ThreadPoolExecutor(kernels.threads_of(None)) as rounding,
        InTurn() as endings,
    ):
        numbers = WeightNumbers(plan, checked.tensors, rounding)

        def write(path: Path, tensors: Sequence[TensorPlan], told: PartProgress) -> Ending:
            file = PlacedFile(path, tensors, mode)
            total = sum(tensor.bytes for tensor in tensors)
            parts = _together(tensors, plan)
            fill(file, parts, lambda x: x.value(numbers), total, told, numbers.at_once)
            # which takes as long as hashing it
            return endings.begin(lambda: output.note(path, file.finish()))

        write_output(
            plan, numbers, output, options.most_shard_bytes, options.model, facts, progress, write
        )
    return False


def _together(tensors: Sequence[TensorPlan], plan: Plan) -> Iterator[list[TensorPlan]]:
    """The tensors of each group of linears, which one quantization makes, and each other one."""

    def group_of(tensor: TensorPlan) -> GroupId | str:
        found = None if tensor.part is None else _group(plan, tensor.part[0])
        return tensor.name if found is None else found

    return (list(part) for _, part in groupby(tensors, group_of))


def _group(plan: Plan, path: str) -> GroupId | None:
    linear = parse_linear(path)
    group = plan.config.block(linear.block).group_of(linear.inner)
    return GroupId(linear.block, group.name) if group else None


class WeightNumbers:
    """The numbers of a model that is quantized from its weights alone, when they are asked for.

    Args:
        plan: what to do.
        checkpoint: the float model.
        threads: that round rows.
    """

    def __init__(self, plan: Plan, checkpoint: FloatTensors, threads: ThreadPoolExecutor):
        self.plan, self.checkpoint, self.threads = plan, checkpoint, threads
        self._names = set(checkpoint.names)
        self._last = threading.local()

    @property
    def at_once(self) -> int:
        """How many groups are made at the same time, so that no core waits for the end of one:
        some where each takes little more than its codes, one where it is read whole."""
        return GROUPS_AT_ONCE if isinstance(self.checkpoint, Checkpoint) else 1

    def linear(self, path: str, with_codes: bool = True) -> QuantizedLinear:
        """See :class:`~ms_quant.formats.format.Numbers`; each thread's last group stays in
        memory."""
        linear, name = parse_linear(path), f"{path}.bias"
        found = self._quantized(path)[linear.inner]
        bias = self.checkpoint.read_float32(name) if name in self._names else None
        return replace(found, bias=bias, input_dtype=self.plan.dtype)

    def _quantized(self, path: str) -> dict[str, QuantizedLinear]:
        group = _group(self.plan, path)
        assert group is not None, path
        if getattr(self._last, "group", None) != group:
            self._last.linears = None
            weights = StoredWeights(self.checkpoint, group.block, threads=self.threads)
            self._last.linears = quantize(self.plan, weights, None, only=[group.name]).linears
            self._last.group = group
        found: dict[str, QuantizedLinear] = self._last.linears
        return found

    def floats(self, name: str, dtype: np.dtype) -> Array:
        """See :class:`~ms_quant.formats.format.Numbers`."""
        return round_chunks(self.checkpoint, name, dtype)

    def cache_scale(self, path: str) -> np.ndarray:
        """See :class:`~ms_quant.formats.format.Numbers`."""
        raise AssertionError(f"{path}: a range of outputs without calibration")
