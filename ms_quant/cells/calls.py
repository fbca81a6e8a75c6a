"""Calls of a network or of a block, kept so that they can be made again.

Tensors lie in a temporary file, small amounts of them in memory: calibration data may be larger
than memory, and may come from a generator, which gives each item once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from ms_quant.cells.tree import host_array
from ms_quant.errors import BadArgumentError
from ms_quant.numerics.storage import DTYPES
from ms_quant.timestep import TimestepManager

IN_MEMORY = 64 << 20

Progress = Callable[[str, int, int], None]
"""Called with what is done (``"collect"``, ``"calibrate"``, ``"quantize"``), how many calls or
groups are done, and of how many, 0 where that is not known."""


def silent(what: str, done: int, of: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Call:
    """What a Cell is called with.

    Attributes:
        arguments, named: the arguments.
        step: the timestep that was set, or None.
        index: which call of the network it is, or is part of.
    """

    arguments: tuple
    named: Mapping[str, Any]
    step: int | None
    index: int = 0

    @property
    def tokens(self) -> int:
        """A guess of the tokens; only decides how densely rows are kept."""
        first = next((value for value in (*self.arguments, *self.named.values())), None)
        if not isinstance(first, Tensor):
            return 1
        channels = first.shape[-1] if first.ndim and first.is_floating_point() else 1  # or ids
        return max(1, first.size // max(1, channels))


class CallStore:
    """Calls in their order. Tensors and arrays are in a file; other arguments are kept as they
    are.

    Args:
        in_memory: bytes that are kept in memory before all go to a file.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._file = SpooledTemporaryFile(max_size=max(1, in_memory))  # noqa: SIM115
        self._end = 0
        self._calls: list[Call] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return (_changed(call, self._read) for call in self._calls)

    @property
    def stored(self) -> Sequence[Call]:
        """The calls with places in the file, where tensors and arrays are there."""
        return self._calls

    @property
    def steps(self) -> list[int | None]:
        """The timestep of each call."""
        return [call.step for call in self._calls]

    def append(self, call: Call, *, in_file: bool = True) -> None:
        """Keeps a call; without ``in_file`` only by reference, as who made it keeps it, too."""
        self.tokens += call.tokens
        if in_file:
            call = _changed(call, self._written)
        self._calls.append(call)

    def _written(self, value: Any) -> Any:
        if isinstance(value, Parameter) or not isinstance(value, Tensor | np.ndarray):
            return value
        array = host_array(value) if isinstance(value, Tensor) else value
        if array.dtype.hasobject or (isinstance(value, Tensor) and not _plain(value, array)):
            return value
        self._file.seek(self._end)
        try:
            self._file.write(array.tobytes())
        except OSError as error:
            raise BadArgumentError(
                f"calibration inputs: cannot be kept in a file ({error})"
            ) from error
        place = Place(self._end, array.dtype, array.shape, isinstance(value, Tensor))
        self._end += array.nbytes
        return place

    def array(self, place: Place) -> np.ndarray:
        """What lies at a place, which may not be changed."""
        self._file.seek(place.start)
        data = self._file.read(int(np.prod(place.shape)) * place.dtype.itemsize)
        return np.frombuffer(data, place.dtype).reshape(place.shape)

    def _read(self, value: Any) -> Any:
        if not isinstance(value, Place):
            return value
        array = self.array(value)
        return to_tensor(array) if value.is_tensor else array.copy()


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy of an array as a tensor of the same type."""
    if array.dtype == DTYPES["bfloat16"]:
        return Tensor(array.astype(np.float32), ms.bfloat16)
    return Tensor(array)


class Place(NamedTuple):
    """Where an array lies in the file of a :class:`CallStore`."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    is_tensor: bool


def _plain(tensor: Tensor, array: np.ndarray) -> bool:
    """Whether a tensor's type is one that NumPy has, too, or bfloat16."""
    return str(tensor.dtype).lower().replace("bool_", "bool") == array.dtype.name


def _changed(call: Call, change: Callable[[Any], Any]) -> Call:
    """A call with the leaves of its arguments changed."""
    arguments, named = _mapped((call.arguments, dict(call.named)), change)
    return replace(call, arguments=arguments, named=named)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with its leaves changed, in lists, tuples and dicts."""
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)


def collect(
    calibration: Iterable, progress: Progress = silent, in_memory: int = IN_MEMORY
) -> CallStore:
    """The calls that calibration data stands for, each with the timestep that was set for it."""
    calls, kept = CallStore(in_memory), type(calibration) in (list, tuple)
    for batch in calibration:
        calls.append(_call(batch), in_file=not kept)
        progress("collect", len(calls), 0)
    return calls


def _call(batch: Any) -> Call:
    step = TimestepManager.get_timestep_idx()
    if isinstance(batch, Mapping):
        return Call((), {key: _tensor(value) for key, value in batch.items()}, step)
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return Call(tuple(map(_tensor, arguments)), {}, step)


def _tensor(value: Any) -> Any:
    return Tensor(value) if isinstance(value, np.ndarray) else value
