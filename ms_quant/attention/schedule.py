"""Which denoising steps are dense, and when a mask is made anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ms_quant.errors import BadArgumentError

Mask = TypeVar("Mask")


@dataclass(frozen=True)
class StepWindow:
    """The steps that are sparse: ``start`` to before ``end``; the others are dense.

    Attributes:
        start: so many first steps are dense: they decide what is in the picture.
        end: the first dense step at the end; None: none is.
        refresh: a mask serves so many steps; 0: all of them.
    """

    start: int = 0
    end: int | None = None
    refresh: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "refresh"):
            if getattr(self, name) < 0:
                raise BadArgumentError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if self.end is not None and self.end < self.start:
            raise BadArgumentError(f"end: {self.end}, expected {self.start} (start) or more")

    def __contains__(self, step: int) -> bool:
        return step >= self.start and (self.end is None or step < self.end)


@dataclass
class MaskCache(Generic[Mask]):
    """The mask of one layer from step to step.

    A dense step clears it, and so does a step before the last one: a new clip's loop does not meet
    the mask of the clip before. Calls of one step share a mask, as guidance makes two of them.
    """

    window: StepWindow = field(default_factory=StepWindow)
    _mask: Mask | None = None
    _made: int = -1
    _last: int = -1
    _key: Hashable = None

    def at(self, step: int | None, make: Callable[[], Mask], key: Hashable = None) -> Mask | None:
        """The mask of a step, made where there is none yet or it is due; None: dense.

        Args:
            step: the index of the denoising step, not of the layer.
            make: makes a mask.
            key: what a mask is for, such as its grid; another one needs another mask.

        Raises:
            MsQuantError: no step is set.
        """
        if step is None:
            raise BadArgumentError(
                "step: none is set, expected the index of the denoising step (TimestepManager)"
            )
        if step not in self.window:
            self.clear()
            return None
        due = self.window.refresh and step - self._made >= self.window.refresh
        if self._mask is None or due or step < self._last or key != self._key:
            self._mask, self._made, self._key = make(), step, key
        self._last = step
        return self._mask

    def clear(self) -> None:
        self._mask, self._made, self._last = None, -1, -1
