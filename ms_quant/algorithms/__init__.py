"""The algorithms, by name. A new one is a file with ``solve`` and a row here.

Names are joined with ``+``: ``osl+gptq``. Each belongs to a stage; stages are done in their order,
and each at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ms_quant.algorithms import (
    awq,
    clip,
    flatquant,
    gptq,
    input_range,
    outlier_suppression_lite,
    quarot,
    smooth,
    ssz,
    svd,
)
from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import Float
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.timestep import Timestep
from ms_quant.observers import KEPT_TOKENS
from ms_quant.spec import Scheme


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
    histogram: whether it needs a histogram of the input.
    rotates: whether it changes the whole model before anything is quantized.
    smooths: whether it answers with a smoothing vector.
    clips: whether the weights' ranges may have factors of ``clip.RATIOS``.
    places: whether codes may be others than the nearest ones, or scales than the ranges say.
    searches: how many candidates it tries for a group; each takes a forward of the block.
    kept_tokens: it looks at this many of the tokens' inputs themselves, at most.
    adds: what it puts beside the weight: "branch" of low rank, "kronecker" transform, or "".
    """

    stage: Stage
    solve: Callable[..., Solution]
    summary: str
    options: Any = None
    suits: Callable[[Scheme], str] = lambda scheme: ""
    calibrated: bool = True
    hessian: bool = False
    histogram: bool = False
    rotates: bool = False
    smooths: bool = False
    clips: bool = False
    places: bool = False
    searches: int = 0
    kept_tokens: int = KEPT_TOKENS
    adds: str = ""


def _quantized_input(scheme: Scheme) -> str:
    weight_only = isinstance(scheme.activation, Float)
    return "its activations stay float, and only weights would get harder" if weight_only else ""


def _static_input(scheme: Scheme) -> str:
    if isinstance(scheme.activation, Timestep):
        return "its activations have a range for each timestep"
    return "" if scheme.needs_calibration else "its activations have no static range"


def _clippable(scheme: Scheme) -> str:
    return "" if scheme.weight.clips else "its weights' ranges follow from a rule"


def _affine(scheme: Scheme) -> str:
    weight = scheme.weight
    if isinstance(weight, AffineFormat) and weight.symmetric and not weight.per_tensor:
        return ""
    return "it needs symmetric integer weights with a scale for each row or group"


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
    ),
    "osl": Algorithm(
        Stage.SMOOTHING,
        outlier_suppression_lite.solve,
        "smoothing strength searched by block error, then weight clipping",
        None,
        _quantized_input,
        smooths=True,
        clips=True,
        searches=len(outlier_suppression_lite.ALPHAS) + 2,
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
        adds="kronecker",
    ),
    "svd": Algorithm(
        Stage.RESIDUAL,
        svd.solve,
        "a float branch of low rank takes the largest singular values (arXiv 2411.05007)",
        svd.SvdOptions(),
        _own("svd"),
        calibrated=False,
        places=True,
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
    "ssz": Algorithm(
        Stage.RANGE,
        ssz.solve,
        "each scale moved to the least squared error of the weight",
        ssz.SszOptions(),
        _affine,
        calibrated=False,
        places=True,
    ),
    "gptq": Algorithm(
        Stage.ROUNDING,
        gptq.solve,
        "each column's rounding error made up for by later ones (arXiv 2210.17323)",
        gptq.GptqOptions(),
        hessian=True,
        places=True,
    ),
}
PLAIN = "minmax"


@dataclass(frozen=True)
class Chain:
    """Algorithms in the order of their stages.

    Attributes:
        names: of the algorithms; empty for the range that was seen, rounded to nearest.
        options: algorithm name to its options.
    """

    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Algorithm]:
        return [ALGORITHMS[name] for name in self.names]

    def any(self, attribute: str) -> bool:
        """Whether some algorithm has a flag of :class:`Algorithm`."""
        return any(getattr(row, attribute) for row in self.rows)

    @property
    def searches(self) -> int:
        return sum(row.searches for row in self.rows)

    @property
    def kept_tokens(self) -> int:
        return max((row.kept_tokens for row in self.rows), default=KEPT_TOKENS)

    @property
    def name(self) -> str:
        return "+".join(self.names) or PLAIN

    def first(self, problem: Problem) -> Solution:
        """What decides the smoothing: it may ask for the block's error."""
        return self._run(problem, Solution(), lambda stage: stage <= Stage.SMOOTHING)

    def rest(self, problem: Problem, solution: Solution) -> Solution:
        """What works on the weights as they will be rounded."""
        return self._run(problem, solution, lambda stage: stage > Stage.SMOOTHING)

    def solve(self, problem: Problem) -> Solution:
        return self.rest(problem, self.first(problem))

    def _run(
        self, problem: Problem, solution: Solution, wanted: Callable[[Stage], bool]
    ) -> Solution:
        for name, row in zip(self.names, self.rows, strict=True):
            if wanted(row.stage):
                solution = row.solve(problem, solution, self.options[name])
        return solution

    @property
    def chosen(self) -> dict[str, Any]:
        """The options as JSON, for records."""
        return {name: vars(made) for name, made in self.options.items() if made is not None}


def get_chain(text: str, scheme: Scheme, settings: Mapping[str, Any] | None = None) -> Chain:
    """The algorithms that a name stands for, if the scheme can hold their result.

    Args:
        text: names joined with ``+``, or ``"minmax"``. What the scheme cannot do without is added.
        scheme: the scheme to reach.
        settings: options by name, ``alpha`` or ``gptq.damping``; strings are converted.

    Raises:
        MsQuantError: an unknown name, two of one stage, one that makes no sense with the scheme,
            or an option that no algorithm takes.
    """
    names = [] if text == PLAIN else text.split("+")
    for name in names:
        if name not in ALGORITHMS:
            expected = ", ".join([PLAIN, *ALGORITHMS])
            raise MsQuantError(f"algorithm {name!r} is unknown, expected one of {expected}")
        reason = ALGORITHMS[name].suits(scheme)
        if reason:
            suitable = [PLAIN, *(n for n, row in ALGORITHMS.items() if not row.suits(scheme))]
            raise MsQuantError(
                f"algorithm {name!r} does not work with scheme {scheme.name}: {reason}, expected "
                f"one of {', '.join(suitable)}"
            )
    if scheme.algorithm and scheme.algorithm not in names:
        names.append(scheme.algorithm)
    names.sort(key=lambda name: ALGORITHMS[name].stage)
    for one, other in pairwise(names):
        if ALGORITHMS[one].stage == ALGORITHMS[other].stage:
            stage = ALGORITHMS[one].stage.name.lower()
            raise MsQuantError(
                f"algorithm {text!r}: {one} and {other} both decide the {stage}, expected one"
            )
    smoothing = [name for name in names if ALGORITHMS[name].smooths]
    if smoothing and any(ALGORITHMS[name].histogram for name in names):
        raise MsQuantError(
            f"algorithm {text!r}: {names[0]} looks at the input before {smoothing[0]} smooths it, "
            "expected one of them"
        )
    return Chain(tuple(names), _options(names, dict(settings or {})))


def _options(names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The options of each algorithm, with what was set in place of the defaults."""
    made: dict[str, Any] = {}
    for name in names:
        default = ALGORITHMS[name].options
        fields = {} if default is None else vars(default)
        found = {}
        for key in fields:
            for spelled in (key, f"{name}.{key}"):
                if spelled in settings:
                    found[key] = settings.pop(spelled)
        made[name] = default if not found else _changed(name, default, found)
    if settings:
        taken = [f"{name}.{key}" for name in names for key in vars(made[name] or _NOTHING)]
        expected = ", ".join(taken) or "none"
        chain = "+".join(names) or PLAIN
        raise MsQuantError(
            f"algorithm {chain} takes no option {min(settings)!r}, expected {expected}"
        )
    return made


def has(text: str, attribute: str) -> bool:
    """Whether an algorithm of a joined name has a flag of :class:`Algorithm`."""
    return any(getattr(ALGORITHMS[name], attribute) for name in text.split("+") if name != PLAIN)


def is_known(text: Any) -> bool:
    """Whether a value is names of algorithms, joined."""
    return isinstance(text, str) and all(
        name in ALGORITHMS or text == PLAIN for name in text.split("+")
    )


class _Nothing:
    """A record without options."""


_NOTHING = _Nothing()


def _changed(name: str, default: Any, found: dict[str, Any]) -> Any:
    try:
        made = TypeAdapter(type(default)).validate_python({**vars(default), **found})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise MsQuantError(f"{where} is {first['input']!r:.80}: {first['msg']}") from None
    return replace(default, **vars(made))
