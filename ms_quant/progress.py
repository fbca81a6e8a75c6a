"""How long work says how far it is: four kinds of function that a caller may give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

PartProgress = Callable[[float], None]
"""Called with how much is done, 0 to 1."""

BlockProgress = Callable[[int, float], None]
"""Called with a block's index and how much of that block is done, 0 to 1."""

BlockDone = Callable[[int, Mapping[str, float]], None]
"""Called with the index of a finished block and the relative errors of its groups, by name."""

StepProgress = Callable[[str, float], None]
"""Called with a step's name and how much of that step is done, 0 to 1."""


def silent(*_: object) -> None:
    """Shows no progress of any kind."""


def of_blocks(progress: StepProgress, step: str, blocks: int) -> BlockProgress:
    """The progress of a step that goes through the blocks of a model.

    Args:
        progress: told how far the step is.
        step: the step's name.
        blocks: how many blocks there are.
    """
    return lambda index, part: progress(step, (index + part) / blocks)
