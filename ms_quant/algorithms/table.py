"""The table of algorithms. A new one is a file with ``solve`` and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ms_quant.algorithms import (
    admm,
    awq,
    clip,
    flatquant,
    flex_smooth,
    gptq,
    input_range,
    low_bits,
    outlier_suppression_lite,
    quarot,
    smooth,
    ssz,
    svd,
)
from ms_quant.algorithms.problem import OfMaxima, Solution
from ms_quant.numerics.activation import Float
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.timestep import Timestep
from ms_quant.schemes.records import Scheme
from ms_quant.statistics.observers import KEPT_TOKENS


class Stage(IntEnum):
    """What an algorithm decides. Those up to SMOOTHING may ask for the block's error."""

    MODEL = 0
    INPUT = 1
    SMOOTHING = 2
    TRANSFORM = 3
    RESIDUAL = 4
    RANGE = 5
    ROUNDING = 6


@dataclass(frozen=True)
class Algorithm:
    """Attributes:
    stage: when it is done.
    solve: the algorithm, ``solve(problem, solution, options) -> Solution``.
    summary: one line for ``ms-quant schemes``.
    options: record of its options with their defaults, or None.
    suits: None for every scheme; else a reason why it does not make sense, or "".
    calibrated: whether it looks at calibration data.
    hessian: whether it needs the products of channels.
    equal_tokens: whether each token counts as any other in those products.
    histogram: whether it needs a histogram of the input.
    rotates: whether it changes the whole model before anything is quantized.
    smooths: whether it answers with a smoothing vector.
    clips: whether the weights' ranges may have factors of ``clip.RATIOS``.
    moves_codes: whether codes may be others than the nearest ones, or scales than the ranges say.
    searches: how many candidates it tries for a group; each takes a forward of the block.
    kept_tokens: it looks at this many of the tokens' inputs themselves, at most.
    trains: whether it needs gradients, which MindSpore computes.
    of_maxima: its smoothing of an input that experts read, from largest magnitudes alone; None
        where it cannot do without all their weights: then such an input stays as it is.
    adds: what it puts beside the weight: "branch" of low rank, "kronecker" transform, or "".
    """

    stage: Stage
    solve: Callable[..., Solution]
    summary: str
    options: Any = None
    suits: Callable[[Scheme], str] = lambda scheme: ""
    calibrated: bool = True
    hessian: bool = False
    equal_tokens: bool = False
    histogram: bool = False
    rotates: bool = False
    smooths: bool = False
    clips: bool = False
    moves_codes: bool = False
    searches: int = 0
    kept_tokens: int = KEPT_TOKENS
    trains: bool = False
    of_maxima: OfMaxima | None = None
    adds: str = ""


def _quantized_input(scheme: Scheme) -> str:
    weight_only = isinstance(scheme.activation, Float)
    return "its activations stay float, and only weights would get harder" if weight_only else ""


def _static_input(scheme: Scheme) -> str:
    if isinstance(scheme.activation, Timestep):
        return "its activations have a range for each timestep"
    return "" if scheme.needs_calibration else "its activations have no static range"


def _clippable(scheme: Scheme) -> str:
    if not scheme.weight.clips:
        return "its weights' ranges follow from a rule"
    return _free_range(scheme)


def _free_range(scheme: Scheme) -> str:
    return "its weights' ranges leave out outliers" if scheme.algorithm == "low_bits" else ""


def _smoothed_and_clipped(scheme: Scheme) -> str:
    return _quantized_input(scheme) or _free_range(scheme)


def _affine(scheme: Scheme) -> str:
    weight = scheme.weight
    if _free_range(scheme):
        return _free_range(scheme)
    if isinstance(weight, AffineFormat) and weight.symmetric and not weight.per_tensor:
        return ""
    return "it needs symmetric integer weights with a scale for each row or group"


def _rounded(scheme: Scheme) -> str:
    return "its weights are floats of the model's type" if scheme.weight.bits == 16 else ""


def _own(name: str) -> Callable[[Scheme], str]:
    return lambda scheme: "" if scheme.algorithm == name else "its tensors have no place for it"


ALGORITHMS: dict[str, Algorithm] = {
    "quarot": Algorithm(
        Stage.MODEL,
        lambda problem, solution, options: solution,
        "Hadamard rotations folded into all weights of the model first (arXiv 2404.00456)",
        quarot.QuarotOptions(),
        calibrated=False,
        rotates=True,
    ),
    "histogram": Algorithm(
        Stage.INPUT,
        input_range.solve_histogram,
        "static input range with the least error over a histogram",
        None,
        _static_input,
        histogram=True,
    ),
    "percentile": Algorithm(
        Stage.INPUT,
        input_range.solve_percentile,
        "static input range that holds a share of the values",
        input_range.PercentileOptions(),
        _static_input,
        histogram=True,
    ),
    "smoothquant": Algorithm(
        Stage.SMOOTHING,
        smooth.solve,
        "smoothing of strength alpha (arXiv 2211.10438)",
        smooth.SmoothOptions(),
        _quantized_input,
        smooths=True,
        of_maxima=smooth.of_maxima,
    ),
    "flexsmooth": Algorithm(
        Stage.SMOOTHING,
        flex_smooth.solve,
        "smoothing with strengths of inputs and weights searched by the group's output error",
        flex_smooth.FlexSmoothOptions(),
        _quantized_input,
        smooths=True,
        of_maxima=flex_smooth.of_maxima,
    ),
    "osl": Algorithm(
        Stage.SMOOTHING,
        outlier_suppression_lite.solve,
        "smoothing strength searched by block error, then weight clipping",
        None,
        _smoothed_and_clipped,
        smooths=True,
        clips=True,
        searches=len(outlier_suppression_lite.ALPHAS) + 3,
    ),
    "awq": Algorithm(
        Stage.SMOOTHING,
        awq.solve,
        "columns scaled by mean activations, searched by block error, then clipping (2306.00978)",
        awq.AwqOptions(),
        _clippable,
        smooths=True,
        clips=True,
        searches=21,
    ),
    "flatquant": Algorithm(
        Stage.TRANSFORM,
        flatquant.solve,
        "a Kronecker transform trained to flatten inputs and weights (arXiv 2410.09426)",
        flatquant.DEFAULTS,
        _own("flatquant"),
        kept_tokens=2048,
        trains=True,
        adds="kronecker",
    ),
    "svd": Algorithm(
        Stage.RESIDUAL,
        svd.solve,
        "a float branch of low rank takes the largest singular values (arXiv 2411.05007)",
        svd.SvdOptions(),
        _own("svd"),
        calibrated=False,
        moves_codes=True,
        adds="branch",
    ),
    "clip": Algorithm(
        Stage.RANGE,
        clip.solve,
        "each group's range searched by its output error",
        None,
        _clippable,
        clips=True,
    ),
    "low_bits": Algorithm(
        Stage.RANGE,
        low_bits.solve,
        "each row's scale from all but its outliers, so that most codes need four bits",
        low_bits.LowBitsOptions(),
        _own("low_bits"),
        calibrated=False,
        moves_codes=True,
    ),
    "ssz": Algorithm(
        Stage.RANGE,
        ssz.solve,
        "each scale moved to the least squared error of the weight",
        ssz.SszOptions(),
        _affine,
        calibrated=False,
        moves_codes=True,
    ),
    "gptq": Algorithm(
        Stage.ROUNDING,
        gptq.solve,
        "each column's rounding error made up for by later ones (arXiv 2210.17323)",
        gptq.GptqOptions(),
        _rounded,
        hessian=True,
        equal_tokens=True,
        moves_codes=True,
    ),
    "admm": Algorithm(
        Stage.ROUNDING,
        admm.solve,
        "weights pruned by ADMM, the others cut to two mantissa bits (arXiv 2401.02938)",
        admm.AdmmOptions(),
        _own("admm"),
        hessian=True,
        moves_codes=True,
    ),
}
