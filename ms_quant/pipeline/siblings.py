"""Groups that come out far worse than others of their kind, said while a job still runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

FAR = 10.0
"""Times the median of earlier blocks. Errors of one kind drift by 2 or 3 from block to block."""
LARGE = 0.02
"""No group is reported below: of an error of 2 % the model predicts as well as before."""
ENOUGH = 3
"""Earlier blocks, before there is a median to compare with."""
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


class Worst(NamedTuple):
    """The group of a block whose outputs are farthest from the float ones."""

    block: int
    name: str
    error: float

    def __str__(self) -> str:
        return f"block {self.block}: {self.name} {percent(self.error)}"


class GroupWatch:
    """Is told the errors of each finished block.

    Args:
        first_linear: gives the full path of a group's first linear.
    """

    def __init__(self, first_linear: Callable[[int, str], str]):
        self.first_linear = first_linear
        self._seen: dict[str, dict[int, float]] = {}

    def add(self, index: int, errors: Mapping[str, float]) -> Worst | None:
        """The worst group of a finished block; None where nothing was measured."""
        for kind, (_, error) in worst_of_kinds(errors).items():
            self._seen.setdefault(kind, {})[index] = error
        name = max(errors, key=lambda one: errors[one], default=None)
        return None if name is None else Worst(index, name, errors[name])

    def warnings(self, index: int, errors: Mapping[str, float]) -> Iterator[str]:
        """A sentence about each kind of group that is far worse than in the blocks before."""
        for kind, (name, error) in worst_of_kinds(errors).items():
            others = [e for block, e in self._seen.get(kind, {}).items() if block != index]
            usual = median(others) if len(others) >= ENOUGH else None
            if usual is not None and error > max(FAR * usual, LARGE):
                ratio = f"{error / usual:,.0f} times the" if usual else "against a"
                yield (
                    f"block {index}: the outputs of {name} are off by {percent(error)}, {ratio} "
                    f"median {percent(usual)} of this kind in {len(others)} other blocks; the job "
                    f"goes on, and --exclude {self.first_linear(index, name)} would leave it float"
                )


def worst_of_kinds(errors: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Kind of group to the worst one of a block; experts are of one kind."""
    found: dict[str, tuple[str, float]] = {}
    for name, error in errors.items():
        kind = kind_of(name)
        if kind not in found or error > found[kind][1]:
            found[kind] = name, error
    return found


def kind_of(name: str) -> str:
    """The name of a group without the number of its expert: ``"mlp.experts.*.gate_up"``."""
    return _EXPERT.sub("*", name)


def percent(error: float) -> str:
    """0.0123 -> "1.2 %"."""
    return f"{100 * error:.2g} %" if error < 1 else f"{100 * error:,.0f} %"
