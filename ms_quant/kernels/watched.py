"""Arrays that may change between calls, and linears of them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ms_quant.kernels import native
from ms_quant.kernels.native import Computed
from ms_quant.kernels.packing import layout_of
from ms_quant.numerics.activation import PhasedActivation, StaticActivation
from ms_quant.numerics.grid import TwoLevelGrid
from ms_quant.numerics.linear import QuantizedLinear

_ALIGNMENT, _MOST_ARRAYS = 64, 16
_HELD_IN = {"float32": 0, "bfloat16": 1, "float16": 2}
_NAMES = {
    "mul": "mul_scale",
    "row_scale": "weight_scale",
    "zero_point": "weight_zero_point",
    "int_bias": "quant_bias",
}
"""How arrays of ``MsqLinear`` are called in a linear's tensors, where the names differ."""


class WatchedArrays:
    """Copies of arrays in memory of their own, of which is known whether it was written to.

    Whoever writes, and how, makes no difference: the operating system says so (``src/pages.h``).
    Without the library the arrays are compared with what they were.

    Args:
        arrays: by name.

    Attributes:
        arrays: the copies; they may be written to.
        offsets: where each begins, in bytes.
        pages: for the library, or None.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.offsets, count = {}, 0
        for name, array in arrays.items():
            self.offsets[name] = count
            count += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory, self.pages = _memory(max(count, 1))
        self.arrays = {}
        for name, array in arrays.items():
            start = self.offsets[name]
            place = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            place[...] = array
            self.arrays[name] = place
        self._memory = memory
        self._seen: np.ndarray | None = None

    def changed(self) -> bool:
        """Whether something was written since :meth:`watch`, or that was never called."""
        if self.pages is not None:
            return bool(native.function("msq_pages_changed")(self.pages))
        return self._seen is None or not np.array_equal(self._memory, self._seen)

    def watch(self) -> None:
        if self.pages is not None:
            native.function("msq_pages_watch")(self.pages)
        else:
            self._seen = self._memory.copy()


def _memory(count: int) -> tuple[np.ndarray, int | None]:
    """uint8 (count,), and the pages that it lies in; they are given back with its last view."""
    pages = native.function("msq_pages_new")(count) if native.available() else None
    if pages is None:
        memory = native.blob(count)
        memory[...] = 0
        return memory, None
    start = native.function("msq_pages_start")(pages)
    held = (ctypes.c_uint8 * count).from_address(start)
    weakref.finalize(held, native.function("msq_pages_free"), pages).atexit = False
    return np.frombuffer(memoryview(held), np.uint8), pages


class _Watched(ctypes.Structure):
    _fields_ = [
        ("process", ctypes.c_uint64),
        ("pages", ctypes.c_void_p),
        ("phases", native.Linear * 2),
        ("offset", ctypes.c_void_p),
        ("clip", ctypes.c_void_p),
        ("divisor", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("held_in", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("isa", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("params", ctypes.c_void_p * 2),
        ("weights_bytes", ctypes.c_int64),
        ("params_bytes", ctypes.c_int64 * 2),
        ("offsets", ctypes.c_int64 * _MOST_ARRAYS),
        ("arrays", ctypes.c_int64),
    ]


class WatchedLinear:
    """A linear whose arrays may change between calls.

    What the kernels read is packed in the first call, and again in the first one after a change.

    Args:
        linear: the linear; its arrays are those of ``watched``.
        watched: its tensors, by the names that checkpoints give them.
        isa: an instruction set by its name; None for the fastest there is.

    Attributes:
        outputs: how many there are.
        packed_bytes: of the packed weight.
        record: uint8, ``MsqWatchedLinear`` of ``src/kernels.h``, for the custom operator.
    """

    def __init__(self, linear: QuantizedLinear, watched: WatchedArrays, isa: str | None = None):
        layout = layout_of(linear)
        assert layout is not None and watched.pages is not None
        self.outputs = len(linear.weight)
        phases = [layout.computed, *([layout.decode] if layout.decode is not None else [])]
        two_levels = isinstance(linear.grid, TwoLevelGrid)
        factor = np.ones(linear.weight.shape[1], np.float32)
        linears = [_held(computed, watched, factor, two_levels).structure() for computed in phases]
        number = native.number_of(isa)
        weights = native.weights_blob(linear.weight.shape, layout.bits, number)
        params = [native.blob(native.params_bytes(each)) for each in linears]
        self._watched, self._packed = watched, (weights, params, factor)
        self.packed_bytes = weights.nbytes
        record = _Watched(
            process=native.function("msq_process")(),
            pages=watched.pages,
            codes=_place(watched, "weight"),
            offset=_place(watched, "input_offset"),
            clip=_place(watched, "clip_ratio"),
            isa=number,
            bits=layout.bits,
            weights=weights.ctypes.data,
            weights_bytes=weights.size,
            arrays=len(watched.arrays),
        )
        held_in = _held_in(linear)
        if held_in is not None:
            record.divisor, record.factor = _place(watched, "input_scale"), factor.ctypes.data
            record.held_in = _HELD_IN[held_in.name]
        for i, (each, packed) in enumerate(zip(linears, params, strict=True)):
            record.phases[i] = each
            record.params[i], record.params_bytes[i] = packed.ctypes.data, packed.size
        for i, offset in enumerate(watched.offsets.values()):
            record.offsets[i] = offset
        self.record = np.frombuffer(memoryview(record).cast("B"), np.uint8)
        self._address = ctypes.addressof(record)

    def __call__(
        self, x: np.ndarray, decode: bool = False, threads: int | None = None
    ) -> np.ndarray:
        """float32 (rows, out) of float32 (rows, in), as ``QuantizedLinear.forward`` gives it."""
        x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), self.outputs), np.float32)
        self.write(x.ctypes.data, len(x), y.ctypes.data, decode, native.threads_of(threads))
        return y

    def write(self, x: int, rows: int, y: int, decode: bool, threads: int) -> None:
        """The same for the addresses of contiguous memory."""
        native.watched_linear(self._address, decode, x, rows, y, threads)


def _held_in(linear: QuantizedLinear) -> np.dtype | None:
    """The type of the reciprocals that a static input is multiplied by; None where it is divided
    or not static."""
    activation = linear.activation
    static = activation.static if isinstance(activation, PhasedActivation) else activation
    return static.multiplied_in if isinstance(static, StaticActivation) else None


def _held(
    computed: Computed, watched: WatchedArrays, factor: np.ndarray, two_levels: bool
) -> Computed:
    """The same with arrays from the watched memory, and the factor that is made of it."""
    arrays = {}
    for name in computed.arrays:
        if name == "input_factor":
            arrays[name] = factor
            continue
        own = _NAMES.get(name, name)
        if name == "scale":
            static = computed.input == native.STATIC
            own = "deq_scale" if static else "weight_scale_second" if two_levels else "weight_scale"
        arrays[name] = watched.arrays[own]
    return replace(computed, arrays=arrays)


def _place(watched: WatchedArrays, name: str) -> int | None:
    array = watched.arrays.get(name)
    return None if array is None else array.ctypes.data
