"""float16, the only float type of the Atlas 300I Duo: what fits and what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.files.safetensors_file import TensorInfo

FLOAT16 = np.dtype(np.float16)
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


class Floats(Protocol):
    """Where the float tensors come from."""

    def info(self, name: str) -> TensorInfo:
        """Shape of a tensor as it is stored."""

    def read_float32(self, name: str) -> np.ndarray:
        """A whole tensor."""

    def float_chunks(
        self, name: str, rows: slice | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The same some rows at a time: (first row, rows)."""


@dataclass(frozen=True)
class Underflow:
    """Values of one or more tensors that float16 holds badly.

    Attributes:
        to_zero: how many became 0 and were not.
        subnormal: how many became subnormal, with fewer digits; some devices take them for 0.
    """

    to_zero: int = 0
    subnormal: int = 0

    def __add__(self, other: Underflow) -> Underflow:
        return Underflow(self.to_zero + other.to_zero, self.subnormal + other.subnormal)


def to_float16(array: np.ndarray, name: str) -> np.ndarray:
    """Rounds to float16, half to even.

    Args:
        array: float array.
        name: the tensor's name, for the error.

    Raises:
        MsQuantError: a value is too large for float16.
    """
    rounded = _round(array)
    wrong = array.size - int(np.count_nonzero(np.isfinite(rounded)))
    if wrong:
        raise _too_large(name, wrong, array.size, np.abs(array).max())
    return rounded


def _round(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(FLOAT16)


def _too_large(name: str, wrong: int, size: int, largest: float) -> MsQuantError:
    return BadArgumentError(
        f"tensor {name!r}: {wrong} of {size} values do not fit float16, the largest is "
        f"{largest:g}, expected at most {LARGEST:g}"
    )


def underflow(array: np.ndarray, rounded: np.ndarray) -> Underflow:
    """Counts what rounding to float16 lost.

    Args:
        array: what was rounded.
        rounded: the float16 result.
    """
    small = np.abs(rounded) < SMALLEST_NORMAL
    to_zero = int(np.count_nonzero((rounded == 0) & (array != 0)))
    return Underflow(to_zero, int(np.count_nonzero(small & (rounded != 0))))


def survey(checkpoint: Floats, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Tries every float tensor of the output before the long work, a few rows at a time.

    Args:
        checkpoint: the source.
        names: the tensors that will be float16.

    Returns:
        Tensor name to the counts of :class:`Underflow`, for tensors that lose something.

    Raises:
        MsQuantError: a value is too large for float16; names the tensor.
    """
    lost = {}
    for name in names:
        found = _survey(checkpoint, name)
        if found != Underflow():
            lost[name] = asdict(found)
    return lost


def _survey(checkpoint: Floats, name: str) -> Underflow:
    found, size, wrong, largest = Underflow(), 0, 0, 0.0
    for _, chunk in checkpoint.float_chunks(name):
        wide = chunk.astype(np.float32, copy=False)
        rounded = _round(wide)
        found += underflow(wide, rounded)
        size += wide.size
        wrong += int(np.count_nonzero(~np.isfinite(rounded)))
        largest = max(largest, float(np.abs(wide).max(initial=0)))
    if wrong:
        raise _too_large(name, wrong, size, largest)
    return found
