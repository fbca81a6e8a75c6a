"""What ``sparse-compress run`` is asked, and every refusal that needs no work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ms_quant.checkpoint.reader import Checkpoint, check_model
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix, load_config
from ms_quant.places import check_places
from ms_quant.request import Extension, Prepared, QuantizeOptions, prepare
from sparse_compress.codec import CORES
from sparse_compress.fp16 import survey
from sparse_compress.fractal import unsupported_reason
from sparse_compress.layouts import DEFAULT, Layout, Target, TensorSpec, get_target
from sparse_compress.partition import check_tp, fused_shape
from sparse_compress.prune import check_pruning


@dataclass(frozen=True)
class SparseOptions:
    """What a user asks of ``sparse-compress run``.

    Attributes:
        model: directory of the float checkpoint.
        output: directory to make.
        calib: calibration file.
        tp: how many ranks to write.
        sparsity: share of each linear's weights that is pruned, 0 to below 1.
        pruning: ``"activation"`` or ``"magnitude"``.
        algorithm: name of the quantization algorithm.
        alpha: smoothing strength of ``smoothquant``; None is 0.5.
        samples: how many windows of the calibration data to use.
        seq_len: tokens of a window.
        seed: seed of the choice of windows.
        exclude: glob patterns of linears that stay float16, by whole fused groups.
        job: job directory; None is OUTPUT.job.
        keep_job: leave the job directory when all is done.
        any_environment: resume under other versions, CPU or thread count.
        target: name of the runtime that the output is for.
        workers: how many threads code a linear.
    """

    model: Path
    output: Path
    calib: Path
    tp: int = 2
    sparsity: float = 0.5
    pruning: str = "activation"
    algorithm: str = "minmax"
    alpha: float | None = None
    samples: int = 64
    seq_len: int = 256
    seed: int = 0
    exclude: Sequence[str] = ()
    job: Path | None = None
    keep_job: bool = False
    any_environment: bool = False
    target: str = DEFAULT
    workers: int = CORES

    def quantization(self, exclude: Sequence[str]) -> QuantizeOptions:
        """The part of the request that the driver of ``ms-quant`` serves."""
        return QuantizeOptions(
            self.model,
            self.output,
            "W8A8",
            self.algorithm,
            alpha=self.alpha,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            exclude=exclude,
            dtype="float16",
            job=self.job,
            keep_job=self.keep_job,
            any_environment=self.any_environment,
        )


@dataclass(frozen=True)
class Request:
    """A checked request: everything that can be refused has been.

    Attributes:
        options: what was asked.
        prepared: the part that the driver serves.
        layout: what the output will hold.
        uncompressed: fused path to the reason why it stays float16.
        lost: tensor name to what float16 loses of it.
    """

    options: SparseOptions
    prepared: Prepared
    layout: Layout
    uncompressed: dict[str, str]
    lost: dict[str, dict[str, int]]

    @property
    def not_served_by(self) -> list[str]:
        """Why the runtime cannot load what is made, in sentences."""
        return self.layout.target.not_served_by(self.layout.config.model_type)


def check(options: SparseOptions) -> Request:
    """Checks a request against the model and the data, before any work.

    Args:
        options: the request.

    Raises:
        MsQuantError: anything that would make the job fail later; among it a value that float16
            cannot hold, a number of ranks that does not divide the model, and a model that the
            target cannot hold.
    """
    plain = options.quantization(options.exclude)
    check_places(options.model, options.output, plain.job_directory)
    check_pruning(options.sparsity, options.pruning)
    config = load_config(options.model)
    target = get_target(options.target, config.model_type)
    check_tp(config, options.tp)
    target.check(config, options.tp, options.algorithm)
    checkpoint = Checkpoint(options.model)
    check_model(checkpoint, config)
    limits = outside_limits(target, config, options.tp)
    reasons = _reasons(target, config, limits, options.exclude)
    fused = {path for _, _, path in target.linears(config)}
    if fused <= set(reasons):
        name, reason = next(iter(reasons.items()))
        raise MsQuantError(f"no linear can be compressed at tp {options.tp}; {name}: {reason}")
    layout = Layout(config, options.tp, frozenset(fused - set(reasons)), target)
    extension = Extension(
        numbers={"sparsity": float(options.sparsity), "pruning": options.pruning},
        writing={"format": "W8A8SC", "target": target.name, "tp": options.tp},
        output_bytes=most_bytes(layout) + spool_bytes(layout),
    )
    lost = survey(checkpoint, layout.float_names())
    exclude = (*options.exclude, *_members(target, config, limits))
    prepared = prepare(options.quantization(exclude), extension)
    return Request(options, prepared, layout, reasons, lost)


def most_bytes(layout: Layout) -> int:
    """Bytes of the tensors of all ranks, if no tile were smaller than its content."""
    return layout.tp * _sizes(layout.tensors().values())


def spool_bytes(layout: Layout) -> int:
    """Bytes of the blocks that are kept beside the output until a rank's only file is whole."""
    if not layout.target.one_file:
        return 0
    return layout.config.num_layers * _sizes(layout.block_tensors(0).values())


def _sizes(specs: Iterable[TensorSpec]) -> int:
    return sum(
        (spec.most if spec.shape is None else math.prod(spec.shape)) * spec.dtype.itemsize
        for spec in specs
    )


def outside_limits(target: Target, config: ModelConfig, tp: int) -> dict[str, str]:
    """Path in a block to the reason why the hardware cannot take its slices."""
    found = {}
    for group in target.groups(config):
        reason = unsupported_reason(*fused_shape(config, tp, group))
        if reason:
            found[group.fused] = reason
    return found


def _reasons(
    target: Target, config: ModelConfig, limits: dict[str, str], exclude: Sequence[str]
) -> dict[str, str]:
    """Fused path to the reason why it stays float16."""
    reasons = {}
    together = {group.name: group.members for group in config.family.groups}
    for index, group, fused in target.linears(config):
        members = [f"{block_prefix(index)}{member}" for member in together[group.name]]
        matched = [p for p in exclude if any(fnmatchcase(path, p) for path in members)]
        if group.fused in limits:
            reasons[fused] = limits[group.fused]
        elif matched:
            reasons[fused] = f"excluded by {matched[0]!r}"
    return reasons


def _members(target: Target, config: ModelConfig, limits: dict[str, str]) -> list[str]:
    """One linear of each group that is wholly outside the limits; its whole group stays float."""
    inside = {group.name for group in target.groups(config) if group.fused not in limits}
    return [
        f"{block_prefix(index)}{group.members[0]}"
        for index in range(config.num_layers)
        for group in config.family.groups
        if group.name not in inside
    ]
