"""A bfloat16 or float16 network called on a CPU, where MindSpore has no products of these types.

For the time of the calls everything in it that is narrow is float32: parameters, other tensors,
types that Cells keep under a name, and what ``to_float`` has set. Float32 holds every value of
both types, so all is afterwards what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore._c_expression import Cell_, MixedPrecisionType

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tree import float_dtype
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.numerics.storage import DTYPES

NARROW = (ms.bfloat16, ms.float16)
_TYPES = tuple(type(dtype) for dtype in NARROW)
_MIXED = {MixedPrecisionType.BF16: "bfloat16", MixedPrecisionType.FP16: "float16"}


def run_dtype(cell: nn.Cell) -> np.dtype:
    """The type that a linear runs in: what ``to_float`` has set, else that of its weight."""
    mixed = _MIXED.get(cell.mixed_precision_type)
    return float_dtype(cell.weight) if mixed is None else DTYPES[mixed]


def widened(value: Any) -> Any:
    """An argument with narrow tensors in float32, in lists, tuples and dicts, too."""
    if isinstance(value, Tensor):
        return value.astype(ms.float32) if value.dtype in NARROW else value
    if isinstance(value, Mapping):
        return {key: widened(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(widened, value))
    return value


@contextmanager
def in_float32(network: nn.Cell) -> Iterator[None]:
    """Makes a narrow network one of float32 for a while, whoever calls it; on CPU, and only there.

    Raises:
        MsQuantError: the network makes narrow tensors itself, which an operator does not take.
    """
    undo = [] if ms.get_context("device_target") != "CPU" else list(_changes(network))
    if undo:
        hook = network.register_forward_pre_hook(_widen_arguments, with_kwargs=True)
        undo.append(hook.remove)
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error)
        about_types = any(word in reason for word in ("loat16", "data type", "input type", "dtype"))
        if not undo or isinstance(error, MsQuantError) or not about_types:
            raise
        line = next((line for line in reason.splitlines() if line.strip()), type(error).__name__)
        raise BadArgumentError(
            f"{network.cls_name}: calibration on a CPU runs a bfloat16 or float16 network in "
            f"float32, and the network failed so ({line:.200}), expected one that casts to no type "
            "of its own while it is calibrated"
        ) from error
    finally:
        for change in reversed(undo):
            change()


def _widen_arguments(cell: nn.Cell, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
    return tuple(map(widened, arguments)), widened(named)


def _changes(network: nn.Cell) -> Iterator[Callable[[], None]]:
    """Changes one thing after the other; gives what changes each back."""
    seen: set[int] = set()
    for parameter in network.get_parameters():
        yield from _widen(parameter, seen)
    for _, cell in network.cells_and_names():
        if isinstance(cell, QuantLinear):  # computes in float32 and says where it rounds
            continue
        if cell.mixed_precision_type in _MIXED:
            yield _set_mixed(cell, MixedPrecisionType.FP32, cell.mixed_precision_type)
        for name, value in list(vars(cell).items()):
            if type(value) in _TYPES and value in NARROW:
                vars(cell)[name] = ms.float32
                yield _setter(vars(cell), name, value)
            for tensor in _tensors(value):
                yield from _widen(tensor, seen)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    items = value if isinstance(value, list | tuple) else [value]
    return (item for item in items if isinstance(item, Tensor))


def _widen(tensor: Tensor, seen: set[int]) -> Iterator[Callable[[], None]]:
    dtype = tensor.dtype
    if dtype in NARROW and id(tensor) not in seen:
        seen.add(id(tensor))
        tensor.set_dtype(ms.float32)
        yield lambda: tensor.set_dtype(dtype)


def _setter(attributes: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    return lambda: attributes.__setitem__(name, value)


def _set_mixed(cell: nn.Cell, now: Any, then: Any) -> Callable[[], None]:
    def put(kind: Any) -> None:
        cell.mixed_precision_type = kind
        Cell_.set_mixed_precision_type(cell, kind)

    put(now)
    return lambda: put(then)
