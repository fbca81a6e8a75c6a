"""A float checkpoint made into W8A8SC by one call."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.progress import StepProgress, silent
from sparse_compress.codec import CORES
from sparse_compress.layouts import DEFAULT
from sparse_compress.pipeline.request import TP, SparseOptions
from sparse_compress.pipeline.result import SparseResult
from sparse_compress.pipeline.run import run


def compress_checkpoint(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    calibration: str | PathLike[str],
    target: str = DEFAULT,
    tp: int = TP,
    target_ratio: float | None = None,
    max_ppl_increase: float | None = None,
    heldout: str | PathLike[str] | None = None,
    sparsity: float | None = None,
    pruning: str | None = None,
    algorithm: str = DEFAULTS.algorithm,
    alpha: float | None = None,
    samples: int = DEFAULTS.samples,
    seq_len: int = DEFAULTS.seq_len,
    seed: int = DEFAULTS.seed,
    exclude: Sequence[str] = (),
    job: str | PathLike[str] | None = None,
    keep_job: bool = False,
    any_environment: bool = False,
    workers: int = CORES,
    progress: StepProgress | None = None,
) -> SparseResult:
    """Makes a W8A8SC checkpoint of a float one, as ``sparse-compress run`` does.

    Weights are rounded for a size or a loss of quality, or pruned; sliced for tensor parallelism,
    and coded. Called again with the same arguments after a kill, it goes on where it stopped. One
    of ``target_ratio``, ``max_ppl_increase`` and pruning is done; without either of the first two
    half of the weights are pruned.

    Args:
        model: directory of a Hugging Face checkpoint.
        output: directory to make.
        calibration: file of calibration data: text, JSON records, .parquet or .npz.
        target: name of the runtime that it is for, one of ``sparse_compress.layouts.TARGETS``.
        tp: tensor-parallel ranks.
        target_ratio: size to reach, such as 0.45 of that of int8 weights.
        max_ppl_increase: by how much perplexity may grow; 0.005 is 0.5 %. Needs ``heldout``.
        heldout: text whose first ``samples`` windows perplexity is measured on.
        sparsity: share of each linear's weights to prune; None is 0.5.
        pruning: ``"activation"`` prunes by ``|W| * ||X||``, ``"magnitude"`` by ``|W|``; None is the
            former.
        algorithm: ``"minmax"``, ``"smoothquant"`` or ``"osl"``.
        alpha: smoothing strength of smoothquant; None is 0.5.
        samples: windows of calibration data.
        seq_len: tokens of a window.
        seed: seed of the choice of windows.
        exclude: glob patterns of linears that stay float16; whole fused groups do.
        job: directory of the work in progress; None is the output's name with ``.job`` after it.
        keep_job: leave the job directory when all is done.
        any_environment: go on with a job that was begun under other versions, another kind of CPU
            or another number of threads.
        workers: threads that code one tensor.
        progress: told how far the steps ``"read"``, ``"quantize"`` and ``"compress"`` are; with a
            size or a loss to reach also ``"measure"`` and ``"evaluate"``.

    Returns:
        SparseResult: sizes, what stayed float16 and why, and counts of what was pruned or rounded.

    Raises:
        MsQuantError: what is asked for cannot be done, which is found before the work begins; the
            goal cannot be reached; or a value of the model is not finite. No output is left behind.

    Examples:
        >>> import sparse_compress
        >>> result = sparse_compress.compress_checkpoint(
        ...     "Qwen3-8B", "Qwen3-8B-W8A8SC", calibration="calib.txt", sparsity=0.6,
        ...     samples=4, seq_len=32,
        ... )
        >>> result.format, result.compressed_linears
        ('W8A8SC TP2', 4)
        >>> 0.2 < result.ratio < 0.9
        True
    """
    if isinstance(exclude, str):
        raise BadArgumentError(f"exclude is {exclude!r:.80}, expected a list of strings")
    options = SparseOptions(
        model=Path(model),
        output=Path(output),
        calib=Path(calibration),
        target=target,
        tp=tp,
        target_ratio=target_ratio,
        max_ppl_increase=max_ppl_increase,
        heldout=None if heldout is None else Path(heldout),
        sparsity=sparsity,
        pruning=pruning,
        algorithm=algorithm,
        alpha=alpha,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        exclude=tuple(exclude),
        job=None if job is None else Path(job),
        keep_job=keep_job,
        any_environment=any_environment,
        workers=workers,
    )
    return run(options, progress or silent)
