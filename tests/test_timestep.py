"""The current step of each context, and the strategy of each step."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.timestep import (
    STRATEGIES,
    TimestepManager,
    TimestepPolicyConfig,
    kept_timesteps,
)

NO_INTS = [True, False, 1.0, "1", np.int64(1), [1]]


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


# The manager


def test_index_and_count():
    assert TimestepManager.get_timestep_idx() is None
    assert TimestepManager.get_timestep_idx_max() is None
    TimestepManager.set_timestep_idx(10**6)  # no count yet, no limit
    assert TimestepManager.get_timestep_idx() == 10**6
    TimestepManager.set_timestep_idx(None)
    assert TimestepManager.get_timestep_idx() is None
    TimestepManager.set_timestep_idx_max(4)
    assert TimestepManager.get_timestep_idx_max() == 4
    for index in range(4):
        TimestepManager.set_timestep_idx(index)
        assert TimestepManager.get_timestep_idx() == index


@pytest.mark.parametrize("index", [4, 5])
def test_the_count_itself_is_no_index(index):
    TimestepManager.set_timestep_idx_max(4)
    TimestepManager.set_timestep_idx(3)
    with pytest.raises(
        MsQuantError, match=rf"^timestep_idx: {index}, expected 0..3 as there are 4 timesteps$"
    ):
        TimestepManager.set_timestep_idx(index)
    assert TimestepManager.get_timestep_idx() == 3  # as before


@pytest.mark.parametrize(("index", "count"), [(None, None), (3, None), (None, 4), (2, 4), (9, 4)])
def test_what_is_set_in_between_is_undone(index, count):
    TimestepManager.set_timestep_idx(index)
    TimestepManager.set_timestep_idx_max(count)  # 9 of 4 is refused when read, and stays so
    with pytest.raises(KeyError), kept_timesteps():
        TimestepManager.set_timestep_idx_max(7)
        TimestepManager.set_timestep_idx(6)
        raise KeyError
    assert TimestepManager.get_timestep_idx_max() == count
    TimestepManager.set_timestep_idx_max(None)
    assert TimestepManager.get_timestep_idx() == index


def test_an_index_left_from_a_longer_loop_is_refused_when_read():
    TimestepManager.set_timestep_idx(49)
    TimestepManager.set_timestep_idx_max(20)
    with pytest.raises(
        MsQuantError, match=r"^timestep_idx that was set earlier: 49, expected 0..19"
    ):
        TimestepManager.get_timestep_idx()
    TimestepManager.set_timestep_idx(0)
    assert TimestepManager.get_timestep_idx() == 0


@pytest.mark.parametrize("value", [*NO_INTS, -1])
def test_refused_indices(value):
    with pytest.raises(
        MsQuantError, match=r"^timestep_idx: .* \(\w+\), expected an int of at least 0$"
    ):
        TimestepManager.set_timestep_idx(value)
    assert TimestepManager.get_timestep_idx() is None


@pytest.mark.parametrize("value", [*NO_INTS, -1, 0])
def test_refused_counts(value):
    with pytest.raises(
        MsQuantError, match=r"^timestep_idx_max: .* \(\w+\), expected an int of at least 1$"
    ):
        TimestepManager.set_timestep_idx_max(value)
    assert TimestepManager.get_timestep_idx_max() is None


def test_threads_do_not_see_each_others_index():
    TimestepManager.set_timestep_idx_max(100)
    TimestepManager.set_timestep_idx(99)
    barrier = threading.Barrier(4, timeout=10)
    seen: dict[int, list[int | None]] = {}

    def loop(number: int) -> None:
        seen[number] = []
        for step in range(10):
            TimestepManager.set_timestep_idx(10 * number + step)
            barrier.wait()  # everyone has set
            seen[number].append(TimestepManager.get_timestep_idx())
            barrier.wait()  # everyone has read

    threads = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {n: [10 * n + step for step in range(10)] for n in range(4)}
    assert TimestepManager.get_timestep_idx() == 99


def test_a_thread_begins_unset_and_is_held_to_the_count():
    TimestepManager.set_timestep_idx_max(4)
    TimestepManager.set_timestep_idx(3)
    seen: list[object] = []

    def work() -> None:
        seen.append(TimestepManager.get_timestep_idx())
        try:
            TimestepManager.set_timestep_idx(4)
        except MsQuantError as error:
            seen.append(type(error))

    thread = threading.Thread(target=contextvars.Context().run, args=(work,))
    thread.start()
    thread.join()
    assert seen == [None, BadArgumentError]


def test_tasks_do_not_see_each_others_index():
    async def loop(number: int) -> list[int | None]:
        seen = [TimestepManager.get_timestep_idx()]
        for step in range(5):
            TimestepManager.set_timestep_idx(10 * number + step)
            await asyncio.sleep(0)  # the others run
            seen.append(TimestepManager.get_timestep_idx())
        return seen

    async def main() -> tuple[list[list[int | None]], int | None]:
        TimestepManager.set_timestep_idx(7)
        return await asyncio.gather(*map(loop, range(3))), TimestepManager.get_timestep_idx()

    seen, own = asyncio.run(main())
    assert seen == [[7] + [10 * number + step for step in range(5)] for number in range(3)]
    assert own == 7
    assert TimestepManager.get_timestep_idx() is None


# The policy


def test_defaults():
    policy = TimestepPolicyConfig()
    assert policy.get_strategy(0) == policy.default_strategy == "dynamic"
    assert policy.get_strategy(0, "w8a8_static_linear") == "dynamic"
    assert policy.get_strategy(0, "w4a4_linear") == policy.w4a4_default_strategy == "W4A4"
    assert policy.get_strategy(0, "fa") == policy.fa_default_strategy == "MXFP4"
    policy = TimestepPolicyConfig("static", "W4A8", fa_default_strategy="FLOAT")
    assert [policy.get_strategy(3, target) for target in STRATEGIES] == ["static", "W4A8", "FLOAT"]


def test_calls_of_every_version():
    policy = TimestepPolicyConfig(default_strategy="dynamic")
    policy.register(range(2), "static")  # before there were targets
    policy.register([2, 3], "W4A8")  # the default target is w4a4_linear
    policy.register(4, "static", "linear")
    policy.register(5, strategy="W4A8", target="linear")
    policy.register(step_range=range(6, 2, -2), strategy="FP8", target="fa")

    def strategies(target: str) -> list[str]:
        return [policy.get_strategy(step, target) for step in range(8)]

    assert strategies("w8a8_static_linear") == [
        *["static"] * 2, *["dynamic"] * 2, "static", *["dynamic"] * 3
    ]  # fmt: skip
    assert strategies("w4a4_linear") == [
        *["W4A4"] * 2,
        *["W4A8"] * 2,
        "W4A4",
        "W4A8",
        *["W4A4"] * 2,
    ]
    assert strategies("fa") == [*["MXFP4"] * 4, "FP8", "MXFP4", "FP8", "MXFP4"]


RANGES = st.builds(range, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
STEPS = st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=4) | RANGES
PAIRS = [(target, strategy) for target, names in STRATEGIES.items() for strategy in names]


@given(calls=st.lists(st.tuples(STEPS, st.sampled_from(PAIRS)), max_size=8))
def test_the_last_call_counts(calls):
    policy = TimestepPolicyConfig()
    expected = {(target, step): policy.get_strategy(step, target)
                for target in STRATEGIES for step in range(10)}  # fmt: skip
    for steps, (target, strategy) in calls:
        policy.register(steps, strategy, target)
        for step in [steps] if isinstance(steps, int) else steps:
            expected[target, step] = strategy
    assert {key: policy.get_strategy(key[1], key[0]) for key in expected} == expected


def test_lists_are_copied_and_endless_ranges_cost_nothing():
    policy = TimestepPolicyConfig()
    steps = [1]
    policy.register(steps, "static")
    steps.append(2)
    assert policy.get_strategy(2) == "dynamic"
    policy.register(range(10**15), "static")
    assert policy.get_strategy(10**15 - 1) == "static"
    assert policy.get_strategy(10**15) == "dynamic"
    policy.register([], "dynamic")
    policy.register(range(3, 3), "dynamic")
    assert policy.get_strategy(3) == "static"


BAD_REGISTRATIONS = [
    ((0, 1), TypeError, r"strategy of target 'linear': 1 \(int\), expected a str$"),
    ((0, "Static"), ValueError, r"strategy of .*: 'Static', expected one of dynamic, static, W4A4"),
    ((0, "FP8"), ValueError, r"strategy of target 'linear': 'FP8', expected one of dynamic, "),
    ((0, "static", "w4a4_linear"), ValueError, r"strategy of .*: 'static', .* of W4A4, W4A8$"),
    ((0, "W4A4", "fa"), ValueError, r"strategy of target 'fa': 'W4A4', .* of MXFP4, FP8, FLOAT$"),
    ((0, "static", None), TypeError, r"target: None \(NoneType\), expected a str$"),
    ((0, "static", "mlp"), ValueError, r"target: 'mlp', expected one of w8a8_.*, fa, linear$"),
    (((0, 1), "static"), TypeError, r"step_range: \(0, 1\) \(tuple\), expected an int, a list or "),
    ((True, "static"), TypeError, r"step_range: True \(bool\), expected an int, a list or a range"),
    ((None, "static"), TypeError, r"step_range: None \(NoneType\), expected an int, a list or"),
    (([0, True], "static"), TypeError, r"step_range: an item is True \(bool\), expected an int$"),
    (([0, "1"], "static"), TypeError, r"step_range: an item is '1' \(str\), expected an int$"),
    ((-1, "static"), ValueError, r"step_range: step -1, expected steps from 0$"),
    (([0, -2], "static"), ValueError, r"step_range: step -2, expected steps from 0$"),
    ((range(-1, 3), "static"), ValueError, r"step_range: step -1, expected steps from 0$"),
    ((range(3, -3, -1), "static"), ValueError, r"step_range: step -2, expected steps from 0$"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_REGISTRATIONS)
def test_refused_registrations_change_nothing(arguments, error, message):
    policy = TimestepPolicyConfig()
    with pytest.raises(error, match="^" + message) as caught:
        policy.register(*arguments)
    assert caught.type is error
    assert {policy.get_strategy(0, target) for target in STRATEGIES} == {"dynamic", "W4A4", "MXFP4"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), BadArgumentError, r"step: None \(NoneType\), expected an int of at least 0$"),
        ((True,), BadArgumentError, r"step: True \(bool\), expected an int of at least 0$"),
        ((1.0,), BadArgumentError, r"step: 1.0 \(float\), expected an int of at least 0$"),
        ((-1,), BadArgumentError, r"step: -1 \(int\), expected an int of at least 0$"),
        ((0, "linear"), ValueError, r"target: 'linear', expected one of w8a8_.*, w4a4_linear, fa$"),
        ((0, 0), TypeError, r"target: 0 \(int\), expected a str$"),
    ],
)
def test_refused_questions(arguments, error, message):
    with pytest.raises(error, match="^" + message) as caught:
        TimestepPolicyConfig().get_strategy(*arguments)
    assert caught.type is error


@pytest.mark.parametrize(
    ("defaults", "error", "message"),
    [
        ({"default_strategy": "W4A4"}, ValueError, "'W4A4', expected one of dynamic, static$"),
        ({"w4a4_default_strategy": "FP8"}, ValueError, "'FP8', expected one of W4A4, W4A8$"),
        ({"fa_default_strategy": None}, TypeError, r"None \(NoneType\), expected a str$"),
    ],
)
def test_refused_defaults(defaults, error, message):
    with pytest.raises(error, match=f"^{next(iter(defaults))}: {message}") as caught:
        TimestepPolicyConfig(**defaults)
    assert caught.type is error


def test_mindspore_is_not_imported(package_environment):
    modules = "ms_quant.timestep, ms_quant.statistics.histogram"
    code = f"import sys, {modules}; sys.exit('mindspore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=package_environment, check=True, timeout=60)


def test_a_step_for_a_while():
    TimestepManager.set_timestep_idx_max(4)
    TimestepManager.set_timestep_idx(1)
    with TimestepManager.at(3):
        assert TimestepManager.get_timestep_idx() == 3
    assert TimestepManager.get_timestep_idx() == 1
    with (
        pytest.raises(MsQuantError, match=r"timestep_idx: 4, expected 0\.\.3"),
        TimestepManager.at(4),
    ):
        pass
    assert TimestepManager.get_timestep_idx() == 1


def test_attention_is_left_alone_where_a_policy_does_not_speak_of_it():
    policy = TimestepPolicyConfig("static")
    assert not policy.says("fa") and policy.chosen(0, "fa") is None
    assert policy.get_strategy(0, "fa") == "MXFP4"
    policy.register(range(2), "FLOAT", target="fa")
    assert policy.says("fa")
    assert [policy.chosen(step, "fa") for step in range(3)] == ["FLOAT", "FLOAT", None]
    given = TimestepPolicyConfig(fa_default_strategy="MXFP4")
    assert given.says("fa") and given.chosen(7, "fa") == "MXFP4"
