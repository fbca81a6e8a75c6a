"""What searches look at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ms_quant.budget import BUDGET, Budget
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import parse_config
from ms_quant.models.linear_forward import QuantizedForward
from ms_quant.numerics.activation import ObservedRange, Phased
from ms_quant.numerics.linear import quantize_linear
from ms_quant.statistics.search_windows import BlockErrors, SearchWindows

F32 = np.dtype(np.float32)
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
}


@pytest.mark.parametrize(
    ("count", "length", "tokens", "chosen"),
    [
        (8, 256, 1024, [0, 2, 4, 6]),
        (7, 256, 1024, [0, 1, 3, 5]),
        (3, 256, 2048, [0, 1, 2]),
        (5, 1500, 2048, [0]),
        (4, 4096, 2048, [0]),  # one window at least
        (4, 64, 0, []),
    ],
)
def test_searched_windows_are_spread_over_all(count, length, tokens, chosen):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, count, length, 2)).astype("f4")
    for batch in (1, 3, count):
        windows = SearchWindows((count, length, 2), 3, tokens)
        for start in range(0, count, batch):
            windows.add(start, *states[:, start : start + batch])
        assert list(windows.chosen) == chosen
        held = windows.holds(1, count)
        assert held.tolist() == [index in chosen for index in range(1, count + 1)]
        found = np.concatenate([states[:, :0], *windows.batches(BUDGET)], axis=1)
        assert np.array_equal(found, states[:, chosen])


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (2, [0]), (3, [0, 1]), (7, [0, 1, 3, 5]), (16, range(0, 16, 2))]
)
def test_half_of_them_make_the_ranges(count: int, chosen: list[int]) -> None:
    assert list(SearchWindows((count, 256, 2), 3, 2048, apart=True).chosen) == list(chosen)


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_errors_are_those_of_the_whole_block(name):
    """From what calibration kept, whatever is computed only once for all candidates.

    BLAS may round a row otherwise among other rows (docs/kernels.md), so the middle of the block,
    kept from batches of calibration, differs from one made of a search's batch.
    """
    config = parse_config(SHAPE)
    at, windows = Positions(config, 7), SearchWindows((5, 7, 24), 3, 21)
    group = config.block(0).group(name)
    rng, shapes = np.random.default_rng(0), config.parameter_shapes()
    block = BlockForward.load(
        config,
        0,
        lambda name: rng.normal(1, 0.1, shapes[name]).astype("f4"),
        budget=Budget(batch_tokens=14),
    )
    for start in range(0, 5, 2):
        hidden = rng.normal(size=(min(2, 5 - start), 7, 24)).astype("f4")
        middle = block.branch(0, hidden, at)
        windows.add(start, hidden, middle, block.branch(1, middle, at))
    errors = BlockErrors(block, at, group, windows)
    for clip in (1.0, 0.5):
        candidate = {
            path: quantize_linear(
                block.arrays[f"{path}.weight"], None, None, np.dtype(np.float32), clip
            )
            for path in group.members
        }
        linears = {path: QuantizedForward(linear) for path, linear in candidate.items()}
        other = block.with_linears(linears)
        found = list(errors.pairs(candidate))
        assert sum(len(error) for error, _ in found) == 3
        for (error, exact), states in zip(found, windows.batches(block.budget), strict=True):
            attended = other.branch(0, states[0], at)
            if name in ("gate_up", "down"):
                np.testing.assert_allclose(states[1], attended, rtol=1e-5, atol=1e-5)
                attended = states[1]
            whole = other.branch(1, attended, at)
            np.testing.assert_array_equal(exact, states[2])
            np.testing.assert_array_equal(error, whole - exact)
            assert error.any()
        squares = np.concatenate([error.ravel() for error, _ in found]).astype(np.float64) ** 2
        assert errors.mse(candidate) == pytest.approx(squares.mean(), rel=1e-6)


def test_a_token_with_huge_activations_counts_as_any_other(monkeypatch) -> None:
    """Its squared output is larger than that of all others together; the error is a share. The
    largest share counts once more."""
    rng = np.random.default_rng(0)
    output = rng.normal(size=(2, 16, 64))
    error = 0.1 * rng.normal(size=output.shape)

    def token_error(*pairs: tuple[np.ndarray, np.ndarray]) -> float:
        monkeypatch.setattr(BlockErrors, "pairs", lambda *asked, decode: iter(pairs))
        return BlockErrors.token_error(object.__new__(BlockErrors), {})

    before = token_error((error, output))
    shares = np.square(error).sum(axis=2) / np.square(output).sum(axis=2)
    assert before == pytest.approx(shares.mean() + 0.02 * shares.max())
    worse = error.copy()
    worse[1, 0] = output[1, 0]  # one of 32 tokens is lost
    assert token_error((worse, output)) == pytest.approx(1 / 32 + 0.02 + 0.01, rel=0.1)
    output[0, 3], error[0, 3] = 1e4 * output[0, 3], 1e4 * error[0, 3]
    assert token_error((error[:1], output[:1]), (error[1:], output[1:])) == pytest.approx(before)
    assert np.isfinite(token_error((0 * error, 0 * output)))


def test_static_ranges_of_decode_are_seen() -> None:
    """A linear that is static in decode alone is tried as it computes there."""
    config = parse_config(SHAPE)
    at, rng, shapes = Positions(config, 7), np.random.default_rng(0), config.parameter_shapes()
    block = BlockForward.load(config, 0, lambda name: rng.normal(1, 0.1, shapes[name]).astype("f4"))
    windows, group = SearchWindows((2, 7, 24), 3, 14), config.block(0).group("down")
    hidden = rng.normal(size=(2, 7, 24)).astype("f4")
    middle = block.branch(0, hidden, at)
    windows.add(0, hidden, middle, block.branch(1, middle, at))
    errors, found = BlockErrors(block, at, group, windows), {}
    plain = quantize_linear(block.arrays["mlp.down_proj.weight"], None, None, F32)
    for reach in (1e5, 1e-2):
        seen = ObservedRange(-reach * np.ones(40, "f4"), reach * np.ones(40, "f4"), F32, "down")
        activation = Phased().fit(seen, None)
        candidate = {"mlp.down_proj": replace(plain, activation=activation)}
        found[reach] = errors.token_error(candidate), errors.mse(candidate)
    assert found[1e-2][0] > 5 * found[1e5][0]
    assert found[1e-2][1] == found[1e5][1]  # in prefill each token has its range
