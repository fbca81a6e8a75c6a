"""What ``sparse-compress run`` is asked, and every refusal that needs no work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ms_quant.allocation.increase import check_increase
from ms_quant.data.calibration import Note, eval_windows
from ms_quant.errors import BadArgumentError
from ms_quant.formats.float_model import open_float
from ms_quant.formats.source_kind import model_directory
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.paths import check_paths
from ms_quant.pipeline.request import CheckedJob, Extension, prepare
from sparse_compress.codec import CORES
from sparse_compress.layouts import DEFAULT, Layout, Target, get_target
from sparse_compress.layouts.fp16 import survey
from sparse_compress.layouts.limits import most_bytes, outside_limits, staging_bytes
from sparse_compress.layouts.partition import check_tp
from sparse_compress.rate.goal import Goal, check_ratio
from sparse_compress.rate.prune import PRUNINGS, SPARSITY, Pruning, check_pruning

TP = 2


@dataclass(frozen=True)
class SparseOptions:
    """What a user asks of ``sparse-compress run``.

    Attributes:
        model: directory of the float checkpoint.
        output: directory to make.
        calib: calibration file.
        tp: how many ranks to write.
        sparsity: share of each linear's weights that is pruned, 0 to below 1; None is 0.5 where
            no goal is given.
        pruning: ``"activation"`` or ``"magnitude"``; None is the former.
        target_ratio: in place of pruning, the size to reach by rate-distortion rounding.
        max_ppl_increase: in place of that, by how much perplexity may grow; 0.005 is 0.5 %.
        heldout: the text that perplexity is measured on.
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
    tp: int = TP
    sparsity: float | None = None
    pruning: str | None = None
    target_ratio: float | None = None
    max_ppl_increase: float | None = None
    heldout: Path | None = None
    algorithm: str = DEFAULTS.algorithm
    alpha: float | None = None
    samples: int = DEFAULTS.samples
    seq_len: int = DEFAULTS.seq_len
    seed: int = DEFAULTS.seed
    exclude: Sequence[str] = ()
    job: Path | None = None
    keep_job: bool = False
    any_environment: bool = False
    target: str = DEFAULT
    workers: int = CORES

    @property
    def has_goal(self) -> bool:
        """Whether weights are rounded for a goal; else they are pruned."""
        return self.target_ratio is not None or self.max_ppl_increase is not None

    @property
    def pruned(self) -> Pruning | None:
        """How weights are pruned, if they are."""
        if self.has_goal:
            return None
        share = SPARSITY if self.sparsity is None else float(self.sparsity)
        return Pruning(share, self.pruning or PRUNINGS[0])

    def quantization(self, exclude: Sequence[str]) -> QuantizeOptions:
        """The part of it that the driver of ``ms-quant`` serves."""
        return QuantizeOptions(
            self.model,
            self.output,
            "W8A8",
            self.algorithm,
            algorithm_options={} if self.alpha is None else {"alpha": self.alpha},
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
class CheckedSparseJob:
    """A W8A8SC checkpoint to make: everything that can be refused has been.

    Attributes:
        options: what was asked.
        quantization: the part that the driver of ``ms-quant`` does.
        layout: what the output will hold.
        uncompressed: fused path to the reason why it stays float16.
        lost: tensor name to what float16 loses of it.
        goal: of rate-distortion rounding; None for pruning.
        rate: what the goal led to, once that is known.
    """

    options: SparseOptions
    quantization: CheckedJob
    layout: Layout
    uncompressed: dict[str, str]
    lost: dict[str, dict[str, int]]
    goal: Goal | None = None
    rate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def not_served_by(self) -> list[str]:
        """Why the runtime cannot load what is made, in sentences."""
        return self.layout.target.not_served_by(self.layout.config.model_type)


def check(options: SparseOptions) -> CheckedSparseJob:
    """Checks options against the model and the data, before any work.

    Args:
        options: what is asked.

    Raises:
        MsQuantError: anything that would make the job fail later; among it a value that float16
            cannot hold, a number of ranks that does not divide the model, and a model that the
            target cannot hold.
    """
    options = replace(options, model=model_directory(options.model))
    plain = options.quantization(options.exclude)
    check_paths(options.model, options.output, plain.job_directory)
    notes: list[str] = []
    goal = _goal(options, notes.append)
    pruned = options.pruned
    model = open_float(options.model)
    config, checkpoint = model
    if not config.predicts:
        raise BadArgumentError(
            f"{options.model}: has no head to predict tokens with, expected a model that "
            "generates: runtimes load no other from W8A8SC"
        )
    if config.carried:
        raise BadArgumentError(
            f"{options.model}: is a text model in a larger one ({config.carried[0][0]}), expected "
            "one by itself: how W8A8SC holds the others is not documented"
        )
    routed = next((g for b in config.blocks for g in b.groups if g.routed), None)
    if routed is not None:
        raise BadArgumentError(
            f"{options.model}: has routed experts ({routed.members[0]}), expected a model without: "
            "inputs of W8A8SC are static, an expert may see few tokens or none, and no runtime is "
            "documented to decode compressed experts"
        )
    target = get_target(options.target, config.model_type)
    check_tp(config, options.tp)
    target.check(config, options.tp, options.algorithm)
    limits = outside_limits(target, config, options.tp)
    reasons = _reasons(target, config, limits, options.exclude)
    fused = {path for _, _, path in target.linears(config)}
    if fused <= set(reasons):
        name, reason = next(iter(reasons.items()))
        raise BadArgumentError(f"no linear can be compressed at tp {options.tp}; {name}: {reason}")
    layout = Layout(config, options.tp, frozenset(fused - set(reasons)), target)
    writing: dict[str, Any] = {"format": "W8A8SC", "target": target.name, "tp": options.tp}
    numbers: dict[str, Any] = {"rate": goal.record()} if goal else {}
    if pruned:
        numbers = {"sparsity": pruned.share, "pruning": pruned.kind}
    extension = Extension(
        numbers=numbers,
        writing=writing,
        output_bytes=most_bytes(layout) + staging_bytes(layout),
        unknown=["price"] if goal else [],
    )
    lost = survey(checkpoint, layout.float_names())
    exclude = (*options.exclude, *_members(target, config, limits))
    checked = prepare(options.quantization(exclude), extension, model)
    checked = replace(checked, notes=(*notes, *checked.notes))
    return CheckedSparseJob(options, checked, layout, reasons, lost, goal)


def _goal(options: SparseOptions, note: Note) -> Goal | None:
    """The goal, or None where weights are pruned.

    Args:
        options: what is asked.
        note: told what to know of the held-out text.

    Raises:
        MsQuantError: two ways are asked for at once, or one is out of its range.
    """
    ways = {
        "target-ratio": options.target_ratio,
        "max-ppl-increase": options.max_ppl_increase,
        "sparsity": options.sparsity,
        "pruning": options.pruning,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1 and given != ["sparsity", "pruning"]:
        raise BadArgumentError(f"--{given[0]} and --{given[1]} exclude each other, expected one")
    if (options.heldout is None) != (options.max_ppl_increase is None):
        raise BadArgumentError(
            "--max-ppl-increase and --heldout FILE belong together, expected both or neither"
        )
    if options.pruned:
        check_pruning(*options.pruned)
        return None
    if options.target_ratio is not None:
        check_ratio(options.target_ratio)
        return Goal(float(options.target_ratio))
    assert options.max_ppl_increase is not None and options.heldout is not None
    check_increase(options.max_ppl_increase)
    tokens = eval_windows(options.heldout, options.model, options.seq_len, options.samples, note)
    if tokens.shape[1] < 2:
        raise BadArgumentError(
            f"seq_len is {options.seq_len}, expected at least 2 to predict a token of --heldout"
        )
    return Goal(None, float(options.max_ppl_increase), tokens)


def _reasons(
    target: Target, config: ModelConfig, limits: dict[str, str], exclude: Sequence[str]
) -> dict[str, str]:
    """Fused path to the reason why it stays float16."""
    reasons = {}
    for index, group, fused in target.linears(config):
        together = config.block(index).group(group.name).members
        members = [f"{block_prefix(index)}{member}" for member in together]
        matched = [p for p in exclude if any(fnmatchcase(path, p) for path in members)]
        if fused in limits:
            reasons[fused] = limits[fused]
        elif matched:
            reasons[fused] = f"excluded by {matched[0]!r}"
    return reasons


def _members(target: Target, config: ModelConfig, limits: dict[str, str]) -> list[str]:
    """One linear of each group that is wholly outside the limits; its whole group stays float."""
    inside = {
        (index, group.name) for index, group, fused in target.linears(config) if fused not in limits
    }
    return [
        f"{block_prefix(block.index)}{group.members[0]}"
        for block in config.blocks
        for group in block.groups
        if (block.index, group.name) not in inside
    ]
