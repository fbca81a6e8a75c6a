"""Algorithms joined with ``+``, such as ``osl+gptq``: one of each stage at most, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ms_quant.algorithms.problem import InputMaxima, Problem, Solution
from ms_quant.algorithms.table import ALGORITHMS, Algorithm, Stage
from ms_quant.errors import BadArgumentError
from ms_quant.schemes.records import Scheme
from ms_quant.statistics.observers import KEPT_TOKENS

PLAIN = "minmax"
LATER = {"smoothquant.only": "*"}
"""Options that records of earlier versions lack, which did what is the default now."""


@dataclass(frozen=True)
class AlgorithmPipeline:
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
    def preparing(self) -> list[tuple[str, Any]]:
        """Those that :meth:`first` runs, with their options."""
        rows = zip(self.names, self.rows, strict=True)
        return [(n, self.options[n]) for n, row in rows if row.stage <= Stage.SMOOTHING]

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

    def of_maxima(self, names: Sequence[str], maxima: InputMaxima) -> Solution:
        """The smoothing of an input that experts read, without their weights.

        Args:
            names: paths of the quantized linears that read it.
            maxima: what is known of it.
        """
        for name, row in zip(self.names, self.rows, strict=True):
            if row.of_maxima is not None:
                return row.of_maxima(names, maxima, self.options[name])
        return Solution()

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
        return {
            name: {k: v for k, v in vars(made).items() if LATER.get(f"{name}.{k}") != v}
            for name, made in self.options.items()
            if made is not None
        }


def get_algorithms(
    text: str, scheme: Scheme, settings: Mapping[str, Any] | None = None
) -> AlgorithmPipeline:
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
            known = ", ".join(ALGORITHMS if len(names) > 1 else [PLAIN, *ALGORITHMS])
            raise BadArgumentError(f"algorithm {name!r} is unknown, expected one of {known}")
        reason = ALGORITHMS[name].suits(scheme)
        if reason:
            suitable = [PLAIN, *(n for n, row in ALGORITHMS.items() if not row.suits(scheme))]
            raise BadArgumentError(
                f"algorithm {name!r} does not work with scheme {scheme.name}: {reason}, expected "
                f"one of {', '.join(suitable)}"
            )
    if scheme.algorithm and scheme.algorithm not in names:
        names.append(scheme.algorithm)
    names.sort(key=lambda name: ALGORITHMS[name].stage)
    for one, other in pairwise(names):
        if ALGORITHMS[one].stage == ALGORITHMS[other].stage:
            stage = ALGORITHMS[one].stage.name.lower()
            raise BadArgumentError(
                f"algorithm {text!r}: {one} and {other} both decide the {stage}, expected one"
            )
    smoothing = [name for name in names if ALGORITHMS[name].smooths]
    looking = [name for name in names if ALGORITHMS[name].histogram]
    if smoothing and looking:
        raise BadArgumentError(
            f"algorithm {text!r}: {looking[0]} looks at the input before {smoothing[0]} smooths "
            "it, expected one of them"
        )
    return AlgorithmPipeline(tuple(names), _options(names, dict(settings or {})))


def _options(names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The options of each algorithm, with what was set in place of the defaults."""
    algorithms, defaults = (
        "+".join(names) or PLAIN,
        {name: ALGORITHMS[name].options for name in names},
    )
    taken = [f"{name}.{key}" for name in names for key in vars(defaults[name] or _NOTHING)]
    found: dict[str, Any] = {}
    for key, value in settings.items():
        meant = [full for full in taken if key in (full, full.partition(".")[2])]
        if not meant:
            expected = ", ".join(taken) or "none"
            raise BadArgumentError(
                f"algorithm {algorithms} takes no option {key!r}, expected {expected}"
            )
        if len(meant) > 1 or meant[0] in found:
            raise BadArgumentError(
                f"algorithm {algorithms}: option {key!r} is one of several or given twice, "
                f"expected {' or '.join(meant)} once"
            )
        found[meant[0]] = value
    return {
        name: _changed(
            name,
            default,
            {k.partition(".")[2]: v for k, v in found.items() if k.startswith(f"{name}.")},
        )
        for name, default in defaults.items()
    }


def suiting(text: str, scheme: Scheme, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of algorithms that are meant for several schemes, those that one of them can have.

    Args:
        text: names joined with ``+``, or ``"minmax"``.
        scheme: the one.
        settings: options of all of them, by name.

    Returns:
        The names joined, and of the settings those that these algorithms take.

    Raises:
        MsQuantError: an unknown name.
    """
    names = [] if text == PLAIN else text.split("+")
    for name in names:
        if name not in ALGORITHMS:
            raise BadArgumentError(
                f"algorithm {name!r} is unknown, expected one of {', '.join(ALGORITHMS)}"
            )
    names = [name for name in names if not ALGORITHMS[name].suits(scheme)]
    taken = {key for name in names for key in vars(ALGORITHMS[name].options or _NOTHING)}
    kept = {
        key: value
        for key, value in settings.items()
        if (key.partition(".")[0] in names if "." in key else key in taken)
    }
    return "+".join(names) or PLAIN, kept


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
    if not found:
        return default
    try:
        made = TypeAdapter(type(default)).validate_python({**vars(default), **found})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise BadArgumentError(f"{where} is {first['input']!r:.80}: {first['msg']}") from None
    return replace(default, **vars(made))
