"""W8A8_TIMESTEP: QuantLinear is bit-equal to its definition in every timestep."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.cells.timesteps import WIDE, forward_rows
from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import MxTokens, ObservedRange
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.table import get_scheme
from ms_quant.statistics.observers import StepStats
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

STEPS = 5
LINEAR = "w8a8_static_linear"


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


def policy(*static: int, default: str = "dynamic") -> TimestepPolicyConfig:
    made = TimestepPolicyConfig(default)
    made.register(list(static), "static", LINEAR)
    return made


ALL_STATIC = TimestepPolicyConfig("static")


def layer(inner: int, bias: bool = True, steps: int = STEPS, reached=None) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, inner)).astype("f4")
    drift = np.float32(2) ** np.arange(steps, dtype="f4")[:, None]
    low, high = np.tile(-drift, (1, inner)), np.tile(3 * drift, (1, inner))
    for t in set(range(steps)) - set(range(steps) if reached is None else reached):
        low[t], high[t] = np.inf, -np.inf
    scheme = get_scheme("W8A8_TIMESTEP")
    grid = scheme.weight.fit(weight, "w", DTYPES["float32"])
    activation = scheme.activation.fit(ObservedRange(low, high, DTYPES["bfloat16"], "x"), None)
    offsets = rng.standard_normal(6).astype("f4") if bias else None
    return QuantizedLinear(grid.round(weight), grid, offsets, activation)


def tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def at(step: int | None, cell: nn.Cell, x: np.ndarray) -> np.ndarray:
    TimestepManager.set_timestep_idx(step)
    return cell(Tensor(x)).asnumpy()


@pytest.mark.parametrize("inner", [1, 7, 1024, 1025, 2500])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition_in_every_step(inner, bias):
    linear = layer(inner, bias)
    cell = QuantLinear(linear, timestep_policy=policy(0, 2, 4))
    for shape in [(4, inner), (2, 3, inner), (inner,), (0, inner)]:
        x = tokens(*shape)
        for t in range(STEPS):
            expected = linear.forward(x, step=t if t % 2 == 0 else None)
            np.testing.assert_array_equal(at(t, cell, x), expected)
    large = np.float32(1e3) * tokens(3, inner)  # static codes clip at both ends
    np.testing.assert_array_equal(at(2, cell, large), linear.forward(large, step=2))


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("step", [0, 1])
def test_narrow_inputs_give_narrow_outputs(step, dtype):
    linear = layer(33)
    x = Tensor(tokens(4, 33)).astype(dtype)
    wide = linear.forward(x.astype(ms.float32).asnumpy(), step=step)
    TimestepManager.set_timestep_idx(step)
    y = QuantLinear(linear, timestep_policy=policy(0, 1))(x)
    assert y.dtype == dtype
    expected = Tensor(wide).astype(dtype).astype(ms.float32).asnumpy()
    np.testing.assert_array_equal(y.astype(ms.float32).asnumpy(), expected)


def test_parameters_are_the_toolkits_tensors():
    cell = QuantLinear(layer(7))
    assert {p.name: (p.dtype, p.shape) for p in cell.get_parameters()} == {
        "weight": (ms.int8, (6, 7)),
        "weight_scale": (ms.float32, (6,)),
        "input_scale": (ms.float32, (STEPS, 1)),
        "input_offset": (ms.int8, (STEPS, 1)),
        "deq_scale": (ms.float32, (STEPS, 6)),
        "quant_bias": (ms.int32, (STEPS, 6)),
        "bias": (ms.float32, (6,)),
    }
    assert "timestep input" in repr(cell)


def test_without_a_policy_every_step_is_dynamic():
    linear, x = layer(7), tokens(4, 7)
    np.testing.assert_array_equal(at(99, QuantLinear(linear), x), linear.forward(x))


def test_a_policy_may_change_later():
    linear, x, steps = layer(7), tokens(4, 7), policy()
    cell = QuantLinear(linear, timestep_policy=steps)
    np.testing.assert_array_equal(at(1, cell, x), linear.forward(x))
    steps.register(1, "static", LINEAR)
    np.testing.assert_array_equal(at(1, cell, x), linear.forward(x, step=1))


def test_steps_without_parameters_are_refused_by_name():
    cell = QuantLinear(layer(7, reached=[0, 1]), timestep_policy=ALL_STATIC)
    x = tokens(4, 7)
    with pytest.raises(MsQuantError, match=r"^weight: timestep 5 is static, expected 0\.\.4 as"):
        at(STEPS, cell, x)
    with pytest.raises(MsQuantError, match=r"^weight: timestep 3 is static but calibration did n"):
        at(3, cell, x)
    with pytest.raises(MsQuantError, match=r"^weight: no timestep is set, expected TimestepMana"):
        at(None, cell, x)


def test_a_graph_is_refused_and_does_not_keep_the_step_it_was_made_in():
    cell = QuantLinear(layer(7), timestep_policy=ALL_STATIC)
    TimestepManager.set_timestep_idx(1)

    @ms.jit
    def run(value):
        return cell(value)

    with pytest.raises((TypeError, RuntimeError, ValueError)):
        run(Tensor(tokens(4, 7)))


def test_there_is_no_ascend_operator():
    with pytest.raises(MsQuantError, match="no Ascend operators here yet"):
        QuantLinear(layer(7), device_target="Ascend", timestep_policy=ALL_STATIC)


def test_threads_are_in_steps_of_their_own():
    linear, x = layer(40), tokens(8, 40)
    cell = QuantLinear(linear, timestep_policy=policy(0, 2))
    wrong: list[int] = []
    barrier, turn = threading.Barrier(3), threading.Lock()  # MindSpore crashes in calls at a time

    def run(step: int) -> None:
        TimestepManager.set_timestep_idx(step)
        expected = linear.forward(x, step=step if step != 1 else None)
        for _ in range(20):
            barrier.wait()
            with turn:
                if not np.array_equal(cell(Tensor(x)).asnumpy(), expected):
                    wrong.append(step)

    threads = [threading.Thread(target=run, args=(step,)) for step in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert TimestepManager.get_timestep_idx() is None


def test_searches_see_every_kept_token_in_the_strategy_of_its_step():
    linear, steps = layer(7), policy(0, 2, 4)
    stats = StepStats(7, total_tokens=1200, steps=STEPS, keep_rows=100)
    seen = [tokens(240, 7, seed=t) for t in range(STEPS)]
    for t, x in enumerate(seen):
        stats.update_step(x[:100], t)
        stats.update_step(x[100:], t)
    y = forward_rows(linear, stats, steps)
    assert len(stats.rows) == len(stats.row_steps) == 100
    for row, t, found in zip(stats.rows, stats.row_steps, y, strict=True):
        assert (seen[t] == row).all(axis=1).any()
        expected = linear.forward(row[None], step=int(t) if t % 2 == 0 else None)[0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("smooths", [False, True])
def test_inputs_in_mxfp4_are_in_mxfp8_where_the_policy_says_so(smooths):
    """W4A4 <-> W4A8: the same weight, another grid of the input."""
    x, weight = tokens(3, 64), np.random.default_rng(2).standard_normal((6, 64)).astype("f4")
    scheme, made = get_scheme("W4A4_MXFP4"), TimestepPolicyConfig()
    made.register([1], "W4A8", "w4a4_linear")
    grid = scheme.weight.fit(weight, "w", DTYPES["float32"])
    smooth = np.full(64, 2, "f4") if smooths else None
    bias = np.ones(6, "f4")
    linear = QuantizedLinear(grid.round(weight), grid, bias, MxTokens("mxfp4_cann0"), smooth)
    cell = QuantLinear(linear, timestep_policy=made)
    with TimestepManager.at(0):
        found = cell(Tensor(x)).asnumpy()
        np.testing.assert_array_equal(found, QuantLinear(linear)(Tensor(x)).asnumpy())
    with TimestepManager.at(1):
        found = cell(Tensor(x)).asnumpy()
    seen = WIDE.fake(x / 2 if smooths else x).astype("f8")
    expected = seen @ grid.values(linear.weight).astype("f8").T + 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MsQuantError, match="no timestep is set"):
        cell(Tensor(x))


def test_one_policy_of_a_network_and_its_file(tmp_path):
    made, x = TimestepPolicyConfig(), Tensor(tokens(3, 64))
    made.register([1], "W4A8", "w4a4_linear")
    network = nn.SequentialCell(nn.Dense(64, 8))
    ms_quant.quantize(network, "W4A4_MXFP4", timestep_policy=made)
    path = ms_quant.save_quantized(network, tmp_path, format="network")
    loaded = ms_quant.load_quantized(nn.SequentialCell(nn.Dense(64, 8)), path, timestep_policy=made)
    found = []
    for step in range(2):
        with TimestepManager.at(step):
            found.append(network(x).asnumpy())
            np.testing.assert_array_equal(loaded(x).asnumpy(), found[step])
    assert np.abs(found[0] - found[1]).max() > 1e-3
