"""Kept calls in a file: their tensors, and how a call is made of them.

A call is ``{"arguments": [...], "named": {...}, "step": null, "index": 0}``. Among its values
``{"tensor": 3}`` and ``{"array": 3}`` are tensor 3 of the file, as MindSpore's or NumPy's;
``{"float": "0x1.8p+1"}``, ``{"list": [...]}``, ``{"tuple": [...]}`` and ``{"dict": {...}}`` are
what they are called, and other JSON is itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.cells.calls import Call, CallStore, Place, to_tensor
from ms_quant.errors import BadFileError, UnsupportedError, short
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.files.writer import TensorPlan
from ms_quant.numerics.storage import DTYPES
from ms_quant.statistics.stated import fact

MAX_STEP = 1 << 31


def stated_calls(store: CallStore, name: str, what: str) -> tuple[list[Any], list[TensorPlan]]:
    """What a file states of calls, and their tensors.

    Args:
        store: the calls.
        name: what the names of the tensors begin with.
        what: what is called, for errors.

    Raises:
        MsQuantError: an argument is nothing that a file can hold.
    """
    plans: list[TensorPlan] = []

    def stated(value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"float": value.hex()}
        if type(value) in (list, tuple):
            return {type(value).__name__: [stated(item) for item in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: stated(item) for key, item in value.items()}}
        if not isinstance(value, Place):
            raise UnsupportedError(
                f"{what}: is called with {short(value, 80)} ({type(value).__name__}), which no "
                "file holds, expected tensors, arrays, numbers and strings"
            )
        plan = TensorPlan(
            f"{name}.{len(plans)}", value.dtype, value.shape, make=lambda *_: store.array(value)
        )
        plans.append(plan)
        return {"tensor" if value.is_tensor else "array": len(plans) - 1}

    found = []
    for call in store.stored:
        arguments = [stated(value) for value in call.arguments]
        named = {key: stated(value) for key, value in call.named.items()}
        found.append(
            {"arguments": arguments, "named": named, "step": call.step, "index": call.index}
        )
    return found, plans


def restored_calls(calls: list[Any], file: SafetensorsFile, name: str, in_memory: int) -> CallStore:
    """The calls that :func:`stated_calls` told of.

    Args:
        calls: what it stated.
        file: it.
        name: what the names of the tensors begin with.
        in_memory: as of :class:`CallStore`.

    Raises:
        MsQuantError: they are no such calls.
    """

    def value_of(said: Any) -> Any:
        if said is None or type(said) in (bool, int, str):
            return said
        kind, inner = next(iter(said.items())) if _is_pair(said) else ("", None)
        if kind == "float" and type(inner) is str:
            return _float(inner)
        if kind in ("list", "tuple") and type(inner) is list:
            return (list if kind == "list" else tuple)(map(value_of, inner))
        if kind == "dict" and type(inner) is dict:
            return {key: value_of(item) for key, item in inner.items()}
        if kind in ("tensor", "array") and type(inner) is int:
            return _array(file, f"{name}.{inner}", kind)
        raise BadFileError(f"{name}: holds {short(said, 80)}, expected a value of a call")

    store = CallStore(in_memory)
    for said in calls:
        if type(said) is not dict:
            raise BadFileError(f"{name}: holds {short(said, 80)}, expected a call")
        arguments = tuple(map(value_of, fact(said, "arguments", list)))
        named = {key: value_of(item) for key, item in fact(said, "named", dict).items()}
        step = fact(said, "step")
        if step is not None:
            step = fact(said, "step", int, high=MAX_STEP)
        store.append(Call(arguments, named, step, fact(said, "index", int)))
    return store


def _array(file: SafetensorsFile, name: str, kind: str) -> Any:
    if name not in file.tensors:
        raise BadFileError(f"{name}: missing, expected a tensor")
    array = file.read(name)
    if kind == "array":
        return array
    if array.dtype.kind not in "biuf" and array.dtype != DTYPES["bfloat16"]:
        raise BadFileError(f"{name}: is {array.dtype}, expected a type of MindSpore's tensors")
    return to_tensor(array)


def _is_pair(said: Any) -> bool:
    return isinstance(said, Mapping) and len(said) == 1


def _float(text: str) -> float:
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError):
        raise BadFileError(f"float: is {short(text, 80)}, expected a hexadecimal one") from None
