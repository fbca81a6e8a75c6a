"""W8A8_TIMESTEP: networks that are quantized from a loop over timesteps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.errors import MsQuantError
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


def tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def at(step: int | None, cell: nn.Cell, x: np.ndarray) -> np.ndarray:
    TimestepManager.set_timestep_idx(step)
    return cell(Tensor(x)).asnumpy()


# A loop whose inputs shrink from step to step, as a diffusion model's do

LATENT = tokens(64, 8)


def denoiser(seed: int = 0) -> nn.SequentialCell:
    rng = np.random.default_rng(seed)
    network = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 8))
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype("f4") * 0.3))
    return network


def inputs() -> list[np.ndarray]:
    """What each step sees: the range falls to 1/64 of the first."""
    return [np.float32(2.0 ** (-3 * t / 2)) * tokens(64, 8, seed=t) for t in range(STEPS)]


def sampling(network: nn.Cell) -> Iterator[Tensor]:
    """A user's loop: it sets the step and calls the network itself between two inputs."""
    for t, x in enumerate(inputs()):
        TimestepManager.set_timestep_idx(t)
        yield Tensor(x)
        network(Tensor(x))


def quantized(**options) -> nn.Cell:
    network = denoiser()
    options = {"calibration": sampling(network), "timestep_policy": ALL_STATIC, **options}
    return ms_quant.quantize(network, "W8A8_TIMESTEP", **options)


def outputs(network: nn.Cell) -> list[np.ndarray]:
    return [at(t, network, x) for t, x in enumerate(inputs())]


def errors(network: nn.Cell) -> np.ndarray:
    """Relative error of the output of each step, where no input clips."""
    exact = outputs(denoiser())
    pairs = zip(outputs(network), exact, strict=True)
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


def test_ranges_are_those_of_each_step():
    network = quantized()
    exact = denoiser()
    for t, x in enumerate(inputs()):
        for cell, seen in ((network[0], x), (network[2], exact[1](exact[0](Tensor(x))).asnumpy())):
            low, high = min(0, float(seen.min())), max(0, float(seen.max()))
            scale = cell.input_scale.asnumpy()[t, 0]
            np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6)
            offset = cell.input_offset.asnumpy()[t, 0]
            assert abs(offset - (-128 - low / float(scale))) <= 0.5 + 1e-4


def test_items_of_one_step_are_merged():
    def items() -> Iterator[Tensor]:
        for t, x in [(0, LATENT[:5]), (1, LATENT[5:9]), (0, LATENT[9:]), (1, LATENT[:1])]:
            TimestepManager.set_timestep_idx(t)
            yield Tensor(x)

    cell = quantized(calibration=items())[0]
    for t, parts in enumerate([(LATENT[:5], LATENT[9:]), (LATENT[5:9], LATENT[:1])]):
        seen = np.concatenate(parts)
        expected = (float(seen.max()) - float(seen.min())) / 255
        np.testing.assert_allclose(cell.input_scale.asnumpy()[t, 0], expected, rtol=1e-6)


def test_a_range_for_each_step_beats_one_for_all():
    """One range for all is that of the first step: where inputs are 2**6 times smaller its step is
    2**6 times too large, which costs the last step a good part of that factor. With 255 steps for
    6 standard deviations each of four roundings (two inputs, two weights) adds noise of 6 / 255 /
    sqrt(12) = 0.7 % or less."""
    static = errors(quantized())
    one = denoiser()
    one = ms_quant.quantize(one, "W8A8_PER_CHANNEL", calibration=[Tensor(x) for x in inputs()])
    single = errors(one)
    assert static[0] == single[0]
    assert static.max() < 0.02
    assert (static[1:] < single[1:]).all()
    assert single[-1] > 16 * static[-1]


@pytest.mark.parametrize("calibrated", [True, False])
def test_dynamic_steps_are_w8a8_dynamic(calibrated):
    TimestepManager.set_timestep_idx_max(STEPS)
    steps = policy()
    network = quantized(timestep_policy=steps, **({} if calibrated else {"calibration": None}))
    dynamic = ms_quant.quantize(denoiser(), "W8A8_DYNAMIC")
    for found, expected in zip(outputs(network), outputs(dynamic), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_some_steps_static_and_some_dynamic():
    mixed = outputs(quantized(timestep_policy=policy(1, 3)))
    static, dynamic = outputs(quantized()), outputs(quantized(timestep_policy=policy()))
    for t, found in enumerate(mixed):
        np.testing.assert_array_equal(found, static[t] if t in (1, 3) else dynamic[t])
        assert not np.array_equal(static[t], dynamic[t])


def test_only_static_steps_need_inputs():
    def part(network: nn.Cell) -> Iterator[Tensor]:
        for t in (1, 3):
            TimestepManager.set_timestep_idx(t)
            yield Tensor(inputs()[t])

    TimestepManager.set_timestep_idx_max(STEPS)
    network = quantized(calibration=part(denoiser()), timestep_policy=policy(1, 3))
    for found, expected in zip(
        outputs(network), outputs(quantized(timestep_policy=policy(1, 3))), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("algorithm", ["smoothquant", "osl", "awq", "gptq", "clip", "ssz+osl"])
def test_algorithms_have_one_weight_for_all_steps(algorithm):
    network = quantized(algorithm=algorithm)
    assert errors(network).max() < 0.03
    cell = network[0]
    assert cell.weight.shape == (16, 8) and cell.deq_scale.shape == (STEPS, 16)
    if algorithm == "smoothquant":
        assert cell.mul_scale.shape == (8,)
        seen = (np.stack(inputs()) * cell.mul_scale.asnumpy()).reshape(STEPS, -1)
        expected = (np.float64(seen.max(axis=1)) - seen.min(axis=1)) / 255
        np.testing.assert_allclose(cell.input_scale.asnumpy()[:, 0], expected, rtol=1e-6)


def test_the_manager_is_as_it_was():
    TimestepManager.set_timestep_idx(3)

    def counted(network: nn.Cell) -> Iterator[Tensor]:
        TimestepManager.set_timestep_idx_max(STEPS)
        yield from sampling(network)

    quantized(calibration=counted(denoiser()))
    assert TimestepManager.get_timestep_idx() == 3
    assert TimestepManager.get_timestep_idx_max() is None
    with pytest.raises(MsQuantError):
        quantized(calibration=[Tensor(LATENT)])
    assert TimestepManager.get_timestep_idx() == 3


def test_a_network_that_is_a_linear():
    linear = nn.Dense(8, 4)
    cell = ms_quant.quantize(
        linear, "W8A8_TIMESTEP", calibration=sampling(denoiser()), timestep_policy=ALL_STATIC
    )
    assert isinstance(cell, QuantLinear) and cell.input_scale.shape == (STEPS, 1)


def test_other_schemes_after_a_scheme_of_timesteps():
    """The rest of a network is calibrated with each input in its own step."""
    network, exact = denoiser(), denoiser()
    options = {"calibration": sampling(exact), "timestep_policy": ALL_STATIC}
    ms_quant.quantize(network, "W8A8_TIMESTEP", include=["0"], **options)
    hidden = [np.maximum(at(t, network[0], x), 0) for t, x in enumerate(inputs())]
    ms_quant.quantize(network, "W8A8_PER_CHANNEL", include=["2"], calibration=sampling(exact))
    np.testing.assert_allclose(
        network[2].input_scale.asnumpy(), max(h.max() for h in hidden) / 255, rtol=1e-6
    )


def test_a_network_names_the_linear_that_has_no_step():
    network = ms_quant.quantize(denoiser(), "W8A8_TIMESTEP", calibration=sampling(denoiser()))
    with pytest.raises(MsQuantError, match=r"^0\.weight: no timestep is set"):
        at(None, network, LATENT)


def kept_float(network: nn.Cell, message: str, scheme: str = "W8A8_TIMESTEP", **options) -> None:
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(network, scheme, **options)
    assert not any(isinstance(cell, QuantLinear) for _, cell in network.cells_and_names())
    assert isinstance(network[0], nn.Dense), "a recorder was left"


@pytest.mark.parametrize("calibration", [[Tensor(LATENT)], [LATENT, LATENT]])
def test_inputs_of_no_step_are_refused(calibration):
    TimestepManager.set_timestep_idx(2)  # what was set before says nothing of the inputs
    message = r"^calibration input 0: no timestep is set, expected TimestepManager\.set_timestep_i"
    kept_float(denoiser(), message, calibration=calibration)


@pytest.mark.parametrize("calibration", [None, []])
def test_no_inputs(calibration):
    message = r"^scheme W8A8_TIMESTEP: the number of timesteps is not known, expected calibration"
    kept_float(denoiser(), message, calibration=calibration)
    TimestepManager.set_timestep_idx_max(9)
    message = r"reached it in the static timesteps 0, 1, 2, 3, \.\.\.; expected some, or the strate"
    kept_float(denoiser(), message, calibration=calibration, timestep_policy=ALL_STATIC)
    if calibration is None:
        message = r"^algorithm smoothquant: needs calibration inputs, found None$"
        kept_float(denoiser(), message, algorithm="smoothquant")


def test_a_static_step_without_inputs_is_refused_before_the_network_is_called():
    TimestepManager.set_timestep_idx_max(STEPS + 2)

    class Never(nn.SequentialCell):
        def construct(self, x):
            raise AssertionError("called")

    network = Never(nn.Dense(8, 4))
    message = r"^scheme W8A8_TIMESTEP: no calibration input reached it in the static timesteps 6; e"
    options = {"calibration": sampling(denoiser()), "timestep_policy": policy(1, 6)}
    kept_float(network, message, **options)


def test_a_linear_that_a_static_step_does_not_reach_is_refused():
    class Sometimes(nn.SequentialCell):
        def construct(self, x):
            return self[1](x) if TimestepManager.get_timestep_idx() == 2 else self[0](x)

    message = r"^0: no calibration input reached it in the static timesteps 2; expected some"
    network = Sometimes(nn.Dense(8, 8), nn.Dense(8, 8))
    options = {"calibration": sampling(denoiser()), "timestep_policy": policy(2)}
    kept_float(network, message, **options)
    options = {"calibration": sampling(denoiser()), "timestep_policy": policy(2), "include": ["1"]}
    assert isinstance(ms_quant.quantize(network, "W8A8_TIMESTEP", **options)[1], QuantLinear)


def test_a_network_that_sets_a_step_of_its_own_beyond_the_inputs():
    class Own(nn.SequentialCell):
        def construct(self, x):
            TimestepManager.set_timestep_idx(7)
            return self[0](x)

    message = r"^0 input: timestep 7, expected 0\.\.4 as calibration inputs are of 5 timesteps$"
    kept_float(Own(nn.Dense(8, 8)), message, calibration=sampling(denoiser()))


def test_policies_of_other_kinds_and_for_other_schemes_are_refused():
    message = r"^timestep_policy: dict, expected a TimestepPolicyConfig$"
    kept_float(denoiser(), message, timestep_policy={"static": [1]})
    message = r"^timestep_policy: scheme W8A8_DYNAMIC takes none, expected scheme W8A8_TIM"
    kept_float(denoiser(), message, "W8A8_DYNAMIC", timestep_policy=ALL_STATIC)
