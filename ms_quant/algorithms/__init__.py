"""The algorithms, by name. A new one is a file with ``solve`` and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ms_quant.algorithms import outlier_suppression_lite, smooth
from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.errors import MsQuantError
from ms_quant.spec import Scheme


@dataclass(frozen=True)
class Algorithm:
    """Attributes:
    solve: the algorithm.
    summary: one line for ``ms-quant schemes``.
    smooths: True when it needs static activations and a place for a smoothing vector.
    clips: True when the rows of a weight may have a factor of ``clip.RATIOS`` on their range.
    searches: how many candidates it tries for a group; each takes a forward of the block.
    """

    solve: Callable[[Problem], Solution]
    summary: str
    smooths: bool = False
    clips: bool = False
    searches: int = 0


ALGORITHMS: dict[str, Algorithm] = {
    "minmax": Algorithm(lambda problem: Solution(), "the range that was seen, as it is"),
    "smoothquant": Algorithm(
        smooth.solve, "smoothing of strength --alpha (arXiv 2211.10438)", smooths=True
    ),
    "osl": Algorithm(
        outlier_suppression_lite.solve,
        "smoothing strength searched by block error, then weight clipping",
        smooths=True,
        clips=True,
        searches=len(outlier_suppression_lite.ALPHAS) + 2,
    ),
}


def get_algorithm(name: str, scheme: Scheme) -> Algorithm:
    """The algorithm of that name, if the scheme can hold its result.

    Raises:
        MsQuantError: there is none, or the scheme has no place for a smoothing vector.
    """
    if name not in ALGORITHMS:
        expected = ", ".join(ALGORITHMS)
        raise MsQuantError(f"algorithm {name!r} is unknown, expected one of {expected}")
    algorithm = ALGORITHMS[name]
    if algorithm.smooths and scheme.activation.dynamic:
        raise MsQuantError(
            f"algorithm {name!r} does not work with scheme {scheme.name}: its checkpoint has no "
            "input_scale to hold the smoothing vector, expected 'minmax'"
        )
    return algorithm
