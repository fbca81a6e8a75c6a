"""What other packages add, under entry point groups."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any


def first_answer(group: str, question: Any) -> Any:
    """What the first function of a group says that does not say None; None if all do.

    Args:
        group: of entry points, each a function of one argument; they are asked by name.
        question: the argument.
    """
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        answer = point.load()(question)
        if answer is not None:
            return answer
    return None
