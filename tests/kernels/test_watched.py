"""Arrays of which is known whether they were written to, and linears that follow them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ms_quant.kernels import WatchedArrays, WatchedLinear, available, layout_of, native
from ms_quant.numerics.activation import StaticActivation
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear, folded_bias
from ms_quant.numerics.storage import DTYPES

needs_library = pytest.mark.skipif(not available(), reason="no C++ compiler at install time")
ARRAYS = {
    "codes": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "empty": np.zeros((0, 3), np.float32),
    "scale": np.float32([1.5, 2, 3]),
    "large": np.arange(5000, dtype=np.int32),
}


@pytest.fixture(params=[pytest.param("library", marks=needs_library), "compared"])
def watched(request, monkeypatch: pytest.MonkeyPatch) -> WatchedArrays:
    if request.param == "compared":
        monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    return WatchedArrays(ARRAYS)


def test_every_write_is_noticed_and_none_is_made_up(watched: WatchedArrays) -> None:
    assert watched.changed()
    for name, array in ARRAYS.items():
        found = watched.arrays[name]
        assert found.dtype == array.dtype and found.ctypes.data % 64 == 0
        np.testing.assert_array_equal(found, array)
    for name, index in (("codes", (2, 3)), ("scale", 0), ("large", 4999), ("large", 0)):
        watched.watch()
        assert not watched.changed() and not watched.changed()
        watched.arrays[name][index] += 1
        assert watched.changed() and watched.changed()
        assert watched.arrays[name][index] == ARRAYS[name][index] + 1
        watched.arrays[name][index] -= 1


@needs_library
def test_writes_of_other_threads_and_of_the_system() -> None:
    watched = WatchedArrays(ARRAYS)
    watched.watch()
    writer = threading.Thread(target=watched.arrays["large"].fill, args=(7,))
    writer.start()
    writer.join()
    assert watched.changed() and (watched.arrays["large"] == 7).all()
    watched.watch()
    with Path("/dev/zero").open("rb", buffering=0) as zeros, pytest.raises(OSError):
        zeros.readinto(watched.arrays["large"])  # the system's own writes fail, loudly
    watched.arrays["large"][0] = 1


@needs_library
def test_memory_lives_as_long_as_a_view_of_it() -> None:
    watched = WatchedArrays(ARRAYS)
    watched.watch()
    part = watched.arrays["large"][10:20]
    del watched
    gc.collect()
    part[...] = 3
    assert part.sum() == 30


PRELUDE = """
import ctypes, faulthandler, os, signal
import numpy as np
from ms_quant.kernels import WatchedArrays
watched = WatchedArrays({"a": np.zeros(3)})
watched.watch()
"""
WRITE = "watched.arrays['a'][1] = 5; assert watched.changed(); print('done')"


@needs_library
@pytest.mark.parametrize(
    ("code", "ends", "says"),
    [
        (WRITE, 0, ""),
        ("faulthandler.enable(); " + WRITE, 0, "Segmentation fault"),
        ("faulthandler.enable(); watched.watch(); " + WRITE, 0, ""),
        ("child = os.fork(); " + WRITE + "; child and os.waitpid(child, 0)", 0, ""),
        ("ctypes.string_at(0)", -11, ""),
        ("faulthandler.enable(); ctypes.string_at(0)", -11, "Segmentation fault"),
        ("faulthandler.enable(); watched.watch(); ctypes.string_at(0)", -11, "Segmentation fault"),
        ("signal.signal(signal.SIGSEGV, signal.SIG_DFL); watched.watch(); " + WRITE, 0, ""),
    ],
)
def test_other_faults_end_the_process_as_ever(
    code: str, ends: int, says: str, package_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env=package_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == ends, done.stderr
    assert (says in done.stderr) if says else not done.stderr
    assert ("done" in done.stdout) == (ends == 0)


@needs_library
@pytest.mark.parametrize("isa", [isa for isa in native.ISAS if available() and native.has_isa(isa)])
def test_a_linear_follows_its_arrays(isa: str) -> None:
    rng = np.random.default_rng(0)

    def made() -> QuantizedLinear:
        grid = AffineFormat().fit(rng.standard_normal((9, 40), np.float32), "w")
        bias = rng.standard_normal(9, np.float32)
        weight = rng.integers(-128, 128, (9, 40)).astype(np.int8)
        return QuantizedLinear(weight, grid, bias)

    def tensors(linear: QuantizedLinear) -> dict[str, np.ndarray]:
        assert linear.bias is not None
        return {
            "weight": linear.weight,
            "weight_scale": np.ascontiguousarray(linear.weight_scale),
            "bias": linear.bias,
        }

    first, second = made(), made()
    watched = WatchedArrays(tensors(first))
    linear, x = WatchedLinear(first, watched, isa), rng.standard_normal((5, 40), np.float32)
    for record in (first, second, first):
        for name, array in tensors(record).items():
            watched.arrays[name][...] = array
        for _ in range(2):
            np.testing.assert_array_equal(linear(x), record.forward(x))


def test_pages_are_used_again() -> None:
    if not Path("/proc/self/maps").exists() or not available():
        pytest.skip("Linux alone lists a process's memory")

    def regions() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    def make() -> Callable:
        watched = WatchedArrays(ARRAYS)
        watched.watch()
        return watched.changed

    assert not any(make()() for _ in range(5))
    before = regions()
    for _ in range(200):
        make()
    assert regions() < before + 50


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_rounded_reciprocal_follows_its_scale(dtype: str) -> None:
    """Ties, subnormal numbers and reciprocals at the type's ends among the scales."""
    rng = np.random.default_rng(0)
    count = 64
    grid = AffineFormat().fit(rng.standard_normal((3, count), np.float32), "w")
    weight = rng.integers(-128, 128, (3, count)).astype(np.int8)

    def made(scales: np.ndarray) -> QuantizedLinear:
        static = StaticActivation(np.float32(1), 3, scales.astype(np.float32), True, DTYPES[dtype])
        return QuantizedLinear(weight, grid, None, static)

    exponents = rng.integers(-13, 14, (2, count))
    first, second = (made(np.ldexp(1 + rng.random(count), each)) for each in exponents)
    second.static.input_scale[:4] = 2.0**-15, 3 * 2.0**-24, 1 + 2.0**-8, 1 + 2.0**-11
    layout = layout_of(first)
    assert layout is not None and "input_factor" in layout.computed.arrays
    tensors = {
        "weight": weight,
        "input_scale": first.static.input_scale,
        "input_offset": np.full(count, 3, np.int8),
        "deq_scale": first.deq_scale,
        "quant_bias": folded_bias(first, "linear"),
    }
    watched = WatchedArrays(tensors)
    linear, x = WatchedLinear(first, watched), rng.standard_normal((5, count), np.float32)
    for record in (first, second, first):
        watched.arrays["input_scale"][...] = record.static.input_scale
        codes = record.activation.codes(x).astype(np.int64)
        total = codes @ weight.T.astype(np.int64) + watched.arrays["quant_bias"]
        exact = total.astype(np.float32) * watched.arrays["deq_scale"]
        np.testing.assert_array_equal(linear(x), exact)
