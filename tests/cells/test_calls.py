"""Calibration data: any iterable, gone through once, not held in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Parameter, Tensor, nn

import ms_quant
from ms_quant.cells.calls import Call, CallStore, collect
from ms_quant.cells.tree import host_array

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


PLACES = pytest.mark.parametrize("in_memory", [0, 1 << 20], ids=["file", "memory"])


@PLACES
@pytest.mark.parametrize(
    "dtype", [ms.float32, ms.bfloat16, ms.float16, ms.int32, ms.int64, ms.bool_, ms.uint8]
)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_tensors_come_back_as_they_were(in_memory, dtype, shape):
    tensor = Tensor(np.random.default_rng(0).normal(size=shape).astype("f4") * 9).astype(dtype)
    calls = CallStore(in_memory)
    calls.append(Call((1, tensor), {}, 3))
    (again,) = calls
    assert again.step == 3 and again.arguments[0] == 1
    found = again.arguments[1]
    assert (found.dtype, found.shape) == (dtype, shape)
    assert host_array(found).tobytes() == host_array(tensor).tobytes()


@PLACES
def test_arguments_of_other_kinds(in_memory):
    parameter, thing, array = Parameter(Tensor(np.ones(2, "f4"))), object(), np.arange(3)
    named = {"pair": (array, [Tensor(np.full(2, 7, "f4"))]), "it": thing, "none": None}
    calls = CallStore(in_memory)
    for _ in range(2):
        calls.append(Call((parameter,), named, None))
    for call in [*calls, *calls]:  # as often as wanted
        assert call.arguments[0] is parameter
        assert call.named["it"] is thing and call.named["none"] is None
        found, (tensor,) = call.named["pair"]
        assert type(call.named["pair"]) is tuple and isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, array)
        np.testing.assert_array_equal(tensor.asnumpy(), [7, 7])


def test_what_a_generator_overwrites_is_kept():
    buffer = np.zeros((2, 2), "f4")

    def items():
        for value in range(3):
            buffer[:] = value
            yield buffer

    assert [int(call.arguments[0].asnumpy()[0, 0]) for call in collect(items())] == [0, 1, 2]


def test_calibration_data_larger_than_memory_is_not_held():
    size, count = 1 << 18, 40  # of float32: 40 MB

    def items():
        for seed in range(count):
            yield np.full((size // 8, 8), seed, "f4")

    tracemalloc.start()
    calls = collect(items(), in_memory=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert calls.tokens == count * size // 8
    assert peak < 8 << 20  # an item, its bytes, and what is kept before a file is made
    assert sum(float(call.arguments[0].asnumpy()[0, 0]) for call in calls) == sum(range(count))


def network() -> nn.Cell:
    made, rng = (
        nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 3)),
        np.random.default_rng(1),
    )
    for parameter in made.get_parameters():
        parameter.set_data(Tensor(rng.normal(size=parameter.shape).astype("f4")))
    return made


@pytest.mark.parametrize("algorithm", ["minmax", "osl+gptq"])
def test_a_generator_and_a_list_and_observations_give_the_same_numbers(algorithm):
    items = [np.random.default_rng(seed).normal(size=(500, 4)).astype("f4") for seed in range(3)]
    observed = ms_quant.calibrate(network(), iter(items), algorithm=algorithm)
    results = [
        ms_quant.quantize(network(), calibration=data, algorithm=algorithm)
        for data in (items, iter(items), observed)
    ]
    first = dict(results[0].parameters_and_names())
    for other in results[1:]:
        for name, parameter in other.parameters_and_names():
            np.testing.assert_array_equal(parameter.asnumpy(), first[name].asnumpy())


def test_progress_is_told_of_items_calls_and_groups():
    told: list[tuple[str, int, int]] = []
    items = [np.ones((5, 4), "f4")] * 3
    ms_quant.quantize(network(), calibration=items, progress=lambda *said: told.append(said))
    assert told == [
        *(("collect", n, 0) for n in (1, 2, 3)),
        *(("calibrate", n, 3) for n in (1, 2, 3)),
        *(("quantize", n, 2) for n in (1, 2)),
    ]
    told.clear()
    ms_quant.quantize(network(), "W8A8_DYNAMIC", progress=lambda *said: told.append(said))
    assert told == [("quantize", 1, 2), ("quantize", 2, 2)]
