"""Filling a placed file: each part is written while the next is made."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ms_quant.files.placed_file import PlacedFile
from ms_quant.files.writer import Array, TensorPlan
from ms_quant.progress import PartProgress

T = TypeVar("T")
Values = list[tuple[TensorPlan, Array]]
SAVED_SECONDS = 1.0
"""After so long what was written is brought to the disk, while more is made, but not much more
before it is there: a kill loses what was made in the last seconds."""


class InTurn:
    """Work on another thread, a piece at a time; who leaves waits for it.

    Args:
        waiting: how many pieces may wait for their turn.
    """

    def __init__(self, waiting: int = 0):
        self._thread, self._waiting = ThreadPoolExecutor(1), waiting
        self._begun = deque[Future[Any]]()

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *found: object) -> None:
        self._thread.shutdown()

    def begin(self, piece: Callable[[], T]) -> Callable[[], T]:
        """Begins a piece as soon as it may wait for those before; gives what waits for its result.

        Raises:
            Exception: that of a piece before.
        """
        self.wait(self._waiting)
        begun = self._thread.submit(piece)
        self._begun.append(begun)
        return begun.result

    def wait(self, left: int = 0) -> None:
        """Waits until at most so many pieces have not ended."""
        while len(self._begun) > left:
            self._begun.popleft().result()


def fill(
    file: PlacedFile,
    parts: Iterable[Sequence[TensorPlan]],
    value: Callable[[TensorPlan], Array],
    total: int,
    told: PartProgress,
    at_once: int = 1,
) -> None:
    """Writes each part while the next is made, and while the disk takes those before.

    Args:
        file: the file, new or begun; it is closed where this fails.
        parts: its tensors; those of one part are made together.
        value: makes a tensor.
        total: bytes of all tensors.
        told: told how much is written, 0 to 1.
        at_once: parts that are made at the same time, each by a thread of its own.

    Raises:
        MsQuantError: a tensor cannot be made, is not as planned, or the disk is full.
    """
    done, saved = 0, time.monotonic()

    def make(part: Sequence[TensorPlan]) -> Values:
        return [(tensor, value(tensor)) for tensor in part if tensor.name not in file.done]

    try:
        with InTurn(1) as writing, InTurn() as saving:
            for part, values in _ahead(make, parts, at_once):
                writing.begin(partial(_put, file, values))
                if time.monotonic() - saved >= SAVED_SECONDS:
                    saving.begin(file.save)
                    saved = time.monotonic()
                done += sum(tensor.bytes for tensor in part)
                told(done / (total or 1))
            writing.wait()
            saving.wait()
    except BaseException:
        file.close()
        raise


def _ahead(
    make: Callable[[Sequence[TensorPlan]], Values],
    parts: Iterable[Sequence[TensorPlan]],
    at_once: int,
) -> Iterator[tuple[Sequence[TensorPlan], Values]]:
    """The parts in their order with what was made of them, some at the same time."""
    begun = deque[tuple[Sequence[TensorPlan], Future[Values]]]()
    with ThreadPoolExecutor(at_once) as makers:
        try:
            for part in parts:
                begun.append((part, makers.submit(make, part)))
                if len(begun) == at_once:
                    first, values = begun.popleft()
                    yield first, values.result()
            for first, values in begun:
                yield first, values.result()
        finally:
            makers.shutdown(cancel_futures=True)


def _put(file: PlacedFile, values: Values) -> None:
    for tensor, value in values:
        file.put(tensor, value)
