"""FlatQuant: gradients against finite differences, the loss against loops, better than its starts.

What straight-through rounding differentiates is the function in which the distance of each value
to its code, and which values are clipped, stay as they are. Finite differences are of that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from ms_quant.algorithms import flat_group, flat_training, flatquant
from ms_quant.algorithms.flatquant import Flat, FlatOptions, train
from ms_quant.errors import MsQuantError
from ms_quant.numerics import rotation

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
LIMITS = {4: (-8, 7), 8: (-128, 127)}
QUICK = FlatOptions(steps=12, batch_tokens=16, batch_rows=8, row_clips=5)


def correlated(tokens: int, columns: int, seed: int) -> np.ndarray:
    """Inputs with correlated channels, of which three or four are 40 times larger; float32."""
    mixing = np.random.default_rng(99).standard_normal((columns, columns)) / np.sqrt(columns)
    x = np.random.default_rng(seed).standard_normal((tokens, columns)) @ (mixing + np.eye(columns))
    x[:, :: columns // 3] *= 40
    return x.astype("f4")


def random_weights(columns: int, seed: int, **outs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal((out, columns)) * rng.uniform(0.2, 3, (out, 1))).astype("f4")
        for name, out in outs.items()
    }


def slow_round(row: list[float], clip: float, bits: int) -> list[float]:
    smallest, largest = LIMITS[bits]
    absmax = np.float32(max(abs(v) for v in row)) * np.float32(clip)
    scale = absmax / np.float32(largest) or np.float32(1)
    return [min(largest, max(smallest, round(float(np.float32(v) / scale)))) * scale for v in row]


def slow_loss(
    inputs: np.ndarray,
    weights: Mapping[str, np.ndarray],
    flat: Flat,
    bits: tuple[int, int] = (4, 4),
) -> float:
    """The definition, token by token and row by row, with the whole Kronecker product."""
    kron = np.kron(flat.left.astype("f8"), flat.right.astype("f8"))
    inverse = np.linalg.inv(kron).T
    losses = []
    for name, weight in weights.items():
        rows = [
            slow_round(list((row.astype("f8") @ inverse).astype("f4")), clip, bits[1])
            for row, clip in zip(weight, flat.weight_clip[name][:, 0], strict=True)
        ]
        error = energy = 0.0
        for token in inputs.astype("f8"):
            x = slow_round(list((token @ kron).astype("f4")), float(flat.clip_ratio), bits[0])
            for row, exact in zip(rows, weight.astype("f8") @ token, strict=True):
                found = sum(float(v) * float(w) for v, w in zip(x, row, strict=True))
                error, energy = error + (found - exact) ** 2, energy + exact**2
        losses.append(error / (energy or 1.0))
    return sum(losses) / len(losses)


def plain(group: flat_group.Group, left: np.ndarray, right: np.ndarray) -> float:
    return group.deploy(left, right, 1.0, group.same_clip(1.0)).loss


def frozen(x: np.ndarray, clip: np.ndarray, bits: int) -> Callable[..., np.ndarray]:
    """Rounding of rows around (x, clip), as straight-through gradients see it; float64."""
    smallest, largest = LIMITS[bits]

    def scale(x, clip):
        return np.abs(x).max(-1, keepdims=True) * clip / largest

    steps = x / scale(x, clip)
    codes = np.clip(np.rint(steps), smallest, largest)
    inside = np.rint(steps) == codes
    return lambda x, clip: np.where(
        inside, x + scale(x, clip) * (codes - steps), scale(x, clip) * codes
    )


def slope(function: Callable[[float], float], step: float = 1e-6) -> float:
    return (function(step) - function(-step)) / (2 * step)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_rounding(bits):
    import mindspore as ms

    rng = np.random.default_rng(bits)
    x, weighting = rng.standard_normal((2, 6, 10))
    clip = rng.uniform(0.5, 1, (6, 1))
    rounding = flat_training.fake_quant(bits)
    gradient = ms.grad(lambda x, c, w: (rounding(x, c) * w).sum(), (0, 1))
    found = gradient(*(ms.Tensor(v.astype("f4")) for v in (x, clip, weighting)))
    slow = frozen(x, clip, bits)
    for of, part in zip(found, (0, 1), strict=True):
        for index in np.ndindex(*of.shape):
            unit = np.zeros(of.shape)
            unit[index] = 1

            def value(t, unit=unit, part=part):
                moved = (x + t * unit, clip) if part == 0 else (x, clip + t * unit)
                return (slow(*moved) * weighting).sum()

            assert of.asnumpy()[index] == pytest.approx(slope(value), rel=1e-4, abs=1e-4)


def test_rounding_of_zeros_and_of_several_maxima():
    """Zeros have no gradient but their own; the maximum's is shared out."""
    import mindspore as ms

    x = np.float32([[0, 0, 0, 0], [2, -2, 0.3, 0], [1e-33, 0, 0, 0]])
    clip = np.float32([[0.8], [0.7], [1]])
    rounding = flat_training.fake_quant(4)
    found = rounding(ms.Tensor(x), ms.Tensor(clip)).asnumpy()
    np.testing.assert_allclose(found[:2], [[0] * 4, [1.4, -1.6, 0.4, 0]], rtol=1e-6)
    gx, gclip = ms.grad(lambda x, c: rounding(x, c).sum(), (0, 1))(ms.Tensor(x), ms.Tensor(clip))
    np.testing.assert_array_equal(gx.asnumpy()[0], 1)
    assert gclip.asnumpy()[0] == 0
    # The codes are 7, -8, 2 and 0 of steps of 0.2; the two that are not clipped are let through.
    of_scale = 7 - 8 + 2 - 0.3 / 0.2
    share = of_scale * 0.7 / 7 / 2
    np.testing.assert_allclose(gx.asnumpy()[1], [share, -share, 1, 1], rtol=1e-5, atol=1e-6)
    assert np.isfinite(gx.asnumpy()).all() and np.isfinite(gclip.asnumpy()).all()


@pytest.mark.parametrize(("columns", "bits"), [(12, (4, 4)), (15, (8, 4)), (7, (4, 8))])
def test_gradient_of_the_loss(columns, bits):
    """Of the factors in their own frames, inverses included, and of both clipping logits."""
    inputs = np.random.default_rng(1).standard_normal((9, columns)).astype("f4")
    group = flat_group.Group(inputs, random_weights(columns, 2, q=6, k=5), "qkv", *bits)
    a, b = group.factors
    rng = np.random.default_rng(3)
    point = {
        "left": np.eye(a) + 0.3 * rng.standard_normal((a, a)),
        "right": np.eye(b) + 0.3 * rng.standard_normal((b, b)),
        "clip": np.full((1, 1), 1.1),
        "weight_clip": np.full((1, 1), 0.6),
    }
    tokens, rows = np.array([0, 2, 3, 7, 8]), np.array([1, 4, 5, 8, 10])
    found = flat_training.gradient_function(group)(point, tokens, rows)
    x, y, w = (array.astype("f8") for array in flat_training.normalized(group))
    x, y, w = x[tokens], y[np.ix_(tokens, rows)], w[rows]

    def operands(left, right, clip, weight_clip):
        kron = np.kron(left, right)
        logits = (1 / (1 + np.exp(-value)) for value in (clip, weight_clip))
        return [x @ kron, w @ np.linalg.inv(kron).T, *logits]

    start = operands(*point.values())
    rounds = frozen(start[0], start[2], bits[0]), frozen(start[1], start[3], bits[1])

    def loss(*parameters):
        moved = operands(*parameters)
        product = rounds[0](moved[0], moved[2]) @ rounds[1](moved[1], moved[3]).T
        return np.square(product - y).sum() / len(x)

    for key in point:
        for index in np.ndindex(*point[key].shape):
            unit = np.zeros(point[key].shape)
            unit[index] = 1

            def value(t, key=key, unit=unit):
                change = unit if "clip" in key else point[key] @ unit
                return loss(*{**point, key: point[key] + t * change}.values())

            tolerance = 1e-3 * max(np.abs(found[key]).max(), 1e-3)
            assert found[key][index] == pytest.approx(slope(value), rel=1e-3, abs=tolerance)


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 8)])
def test_the_loss_is_that_of_the_definition(bits):
    inputs, weights = correlated(7, 12, 0), random_weights(12, 1, gate=5, up=3)
    flat = train(inputs, weights, "gate_up", act_bits=bits[0], weight_bits=bits[1], options=QUICK)
    assert flat.loss == pytest.approx(slow_loss(inputs, weights, flat, bits), rel=1e-4)


def test_what_is_minimized_is_the_loss():
    """One step's value on all tokens and rows, at a start without clipping, is its loss."""
    group = flat_group.Group(correlated(20, 16, 0), random_weights(16, 1, q=6, k=9), "qkv", 4, 4)
    left, right = flatquant._orthogonal(4, 0), flatquant._orthogonal(4, 1)
    flat = group.deploy(left, right, 0.75, group.same_clip(0.75))
    import mindspore as ms

    logit = np.log([[3.0]])
    moving = left, right, np.linalg.inv(left).T, np.linalg.inv(right).T, logit, logit
    arrays = (*flat_training.normalized(group), *moving)
    value, _ = flat_training.objective(4, 4)(*(ms.Tensor(v.astype("f4")) for v in arrays))
    assert value.asnumpy() == pytest.approx(flat.loss, rel=0.02)  # some codes are ties


def test_beats_its_starts_on_tokens_it_has_not_seen():
    inputs, unseen = correlated(512, 64, 0), correlated(512, 64, 1)
    weights = random_weights(64, 2, q=64, k=32)
    for weight in weights.values():
        weight[:, :: 64 // 3] /= 40  # or the outliers would be most of the output, too
    flat = train(inputs, weights, "qkv", options=FlatOptions(steps=100))
    seen, other = (flat_group.Group(x, weights, "qkv", 4, 4) for x in (inputs, unseen))
    hadamard = flatquant._orthogonal(8, 0), flatquant._orthogonal(8, 1)
    held_out = other.deploy(flat.left, flat.right, flat.clip_ratio, flat.weight_clip).loss
    for found, group in ((flat.loss, seen), (held_out, other)):
        assert found < 0.25 * plain(group, *hadamard)
        assert found < 0.35 * plain(group, np.eye(8), np.eye(8))
    untrained = train(inputs, weights, "qkv", options=FlatOptions(steps=0))
    assert flat.loss < 0.99 * untrained.loss  # 0.89 to 0.97, by the order of sums


@pytest.mark.parametrize("seed", range(3))
def test_balanced_factors_are_the_best_of_their_kind(seed):
    """The slope of log(tr(M Sx) tr(M^-1 Sw)) is 0 in every direction of either factor."""
    rng = np.random.default_rng(seed)
    inputs = (rng.standard_normal((80, 12)) @ rng.standard_normal((12, 12))).astype("f4")
    weights = random_weights(12, seed, q=30)
    group = flat_group.Group(inputs, weights, "qkv", 4, 4)
    x_moment = inputs.T.astype("f8") @ inputs
    w_moment = weights["q"].T.astype("f8") @ weights["q"]

    def product(left, right):
        kron = np.kron(left, right)
        metric = kron @ kron.T
        return np.log(np.trace(metric @ x_moment) * np.trace(np.linalg.solve(metric, w_moment)))

    found = flatquant._balanced(group)
    identity = [np.eye(len(factor)) for factor in found]
    assert product(*found) < product(*identity) - 0.1
    for part in (0, 1):
        for unit in np.eye(found[part].size).reshape(-1, *found[part].shape):

            def value(t, part=part, unit=unit):
                moved = list(found)
                moved[part] = found[part] @ (identity[part] + t * unit)
                return product(*moved)

            assert abs(slope(value)) < 0.01  # the turns are not run to the end


@pytest.mark.parametrize("columns", [1, 13, 16, 36, 64])
def test_the_function_is_preserved_without_rounding(columns):
    inputs = correlated(30, columns, 0) if columns > 3 else np.float32([[1], [-2], [3]])
    weights = random_weights(columns, 1, q=7)
    flat = train(inputs, weights, "qkv", options=QUICK)
    x = rotation.apply_kronecker(inputs, flat.left, flat.right, "x")
    w = rotation.fold_kronecker(weights["q"], flat.left, flat.right, "q")
    exact = inputs.astype("f8") @ weights["q"].T.astype("f8")
    np.testing.assert_allclose(x @ w.T, exact, rtol=1e-4, atol=1e-9 * np.abs(exact).max())


def test_the_same_twice():
    inputs, weights = correlated(60, 32, 0), random_weights(32, 1, q=20, k=10)
    first, second = (train(inputs, weights, "qkv", options=QUICK) for _ in range(2))
    for key in ("left", "right", "clip_ratio"):
        np.testing.assert_array_equal(getattr(first, key), getattr(second, key))
    for name in weights:
        np.testing.assert_array_equal(first.weight_clip[name], second.weight_clip[name])
    assert first.loss == second.loss
    other = train(inputs, weights, "qkv", options=FlatOptions(**{**vars(QUICK), "seed": 1}))
    assert (first.left != other.left).any()


def edited(change: Callable[[np.ndarray, np.ndarray], None]) -> tuple[np.ndarray, np.ndarray]:
    inputs, weight = correlated(20, 24, 0), random_weights(24, 1, o=10)["o"]
    change(inputs, weight)
    return inputs, weight


def scaled(row: object, factor: float) -> Callable[[np.ndarray, np.ndarray], None]:
    def change(inputs, weight):
        inputs[row] *= np.float32(factor)

    return change


EDGES = {
    "no input": scaled(..., 0),
    "no weight": lambda inputs, weight: weight.fill(0),
    "a dead token": scaled(3, 0),
    "dead channels": lambda inputs, weight: (inputs[:, 4:9].fill(0), weight[:, 7:].fill(0)),
    "dead rows": lambda inputs, weight: weight[2:5].fill(0),
    "an outlier of 1000": scaled((slice(None), 5), 1000),
    "a token of 1000": scaled(7, 1000),
    "tiny inputs": scaled(..., 1e-30),
    "large inputs": scaled(..., 1e25),
    "one value": lambda inputs, weight: (inputs.fill(3), weight.fill(-2)),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_end_in_numbers(edge):
    inputs, weight = edited(EDGES[edge])
    check_sound(inputs, {"o": weight})


@pytest.mark.parametrize(
    ("tokens", "columns", "out"), [(1, 24, 5), (9, 1, 4), (5, 13, 1), (1, 1, 1)]
)
def test_small_shapes_end_in_numbers(tokens, columns, out):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((tokens, columns)).astype("f4")
    check_sound(inputs, random_weights(columns, 1, o=out))


def check_sound(inputs: np.ndarray, weights: Mapping[str, np.ndarray]) -> None:
    """Right types and ranges, and no worse than the identity and the Hadamard matrix."""
    flat = train(inputs, weights, "o", options=QUICK)
    a, b = rotation.balanced_factors(inputs.shape[1], "o")
    assert flat.left.shape == (a, a) and flat.right.shape == (b, b)
    arrays = flat.left, flat.right, flat.clip_ratio, *flat.weight_clip.values()
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)
    assert 0 < flat.clip_ratio <= 1 and np.isfinite(flat.loss)
    for name, weight in weights.items():
        clip = flat.weight_clip[name]
        assert clip.shape == (len(weight), 1) and (clip > 0).all() and (clip <= 1).all()
    group = flat_group.Group(inputs, weights, "o", 4, 4)
    assert flat.loss <= plain(group, np.eye(a), np.eye(b))
    turns = flatquant._orthogonal(a, 0), flatquant._orthogonal(b, 1)
    assert flat.loss <= plain(group, *turns)


@pytest.mark.parametrize(
    "rates",
    [
        {"learning_rate": 5.0},
        {"learning_rate": 1e3},
        {"learning_rate": 1e200},
        {"clip_learning_rate": 1e9},
    ],
)
def test_training_that_goes_wrong_does_no_harm(rates):
    inputs, weights = correlated(60, 32, 0), random_weights(32, 1, q=20)
    with np.errstate(all="ignore"):
        wild = train(inputs, weights, "q", options=FlatOptions(steps=9, **rates))
    still = train(inputs, weights, "q", options=FlatOptions(steps=0))
    assert wild.loss <= still.loss


def test_what_int4_holds_exactly_is_left_alone():
    rng = np.random.default_rng(0)
    inputs, weight = (rng.integers(-6, 7, (n, 16)).astype("f4") for n in (8, 5))
    inputs[:, 0], weight[:, 3] = 7, -7
    flat = train(inputs, {"o": weight}, "o")
    np.testing.assert_array_equal(flat.left, np.eye(4))
    np.testing.assert_array_equal(flat.right, np.eye(4))
    assert flat.loss < 1e-12 and flat.clip_ratio == 1
    np.testing.assert_array_equal(flat.weight_clip["o"], 1)


@pytest.mark.parametrize("tokens", [6, 40])
def test_rows_take_their_best_ratio(tokens):
    """Against losses in float64 over all tokens, more of them than columns or fewer."""
    rng = np.random.default_rng(tokens)
    x, weight = rng.standard_normal((tokens, 16)).astype("f4"), random_weights(16, 1, o=9)["o"]
    weight[::2, 3] *= 5
    targets, own = x @ weight.T, np.full((9, 1), 0.83, np.float32)
    rows, compressed = flat_group.compressed(x, targets)
    assert len(rows) == min(tokens, 16)
    found = flat_group.search_rows(weight, own, rows, compressed, 11, 4)
    ratios = [0.83, *np.linspace(0.5, 1, 11, dtype=np.float32)]
    for row, target, ratio in zip(weight, targets.T, found[:, 0], strict=True):
        losses = [
            np.square(x @ np.array(slow_round(list(row), r, 4), "f8") - target).sum()
            for r in ratios
        ]
        assert losses[[np.float32(r) for r in ratios].index(ratio)] <= min(losses) * (1 + 1e-3)


def test_batches_go_through_all_before_any_comes_again():
    group = flat_group.Group(np.ones((10, 4), "f4"), random_weights(4, 1, q=3, k=3), "qkv", 4, 4)
    options = FlatOptions(steps=4, batch_tokens=5, batch_rows=99)
    tokens, rows = zip(*flat_training.batches(group, options), strict=True)
    for pair in (tokens[:2], tokens[2:]):
        assert sorted(np.concatenate(pair)) == list(range(10))
    assert all(row.tolist() == list(range(6)) for row in rows)


ONE, INPUTS = {"q": np.ones((2, 4), "f4")}, np.ones((3, 4), "f4")


@pytest.mark.parametrize(
    ("inputs", "weights", "options", "message"),
    [
        (INPUTS * np.float32(np.nan), ONE, {}, "qkv: inputs: 12 of 12 values are NaN or inf"),
        (INPUTS, {"q": np.full((2, 4), np.inf, "f4")}, {}, "q: 8 of 8 values are NaN or inf"),
        (INPUTS * np.float32(1e30), {"q": ONE["q"] * np.float32(1e30)}, {}, "q: outputs: 6 of 6"),
        (np.ones((3, 6), "f4"), {"q": np.ones((2, 6), "f4")}, {}, "qkv: K = 6 has no factors"),
        (np.ones((0, 4), "f4"), ONE, {}, r"qkv: inputs of shape \(0, 4\), expected \(tokens, K\)"),
        (np.ones(4, "f4"), ONE, {}, r"qkv: inputs of shape \(4,\), expected \(tokens, K\)"),
        (INPUTS, {}, {}, "qkv: no weights, expected one linear or several"),
        (INPUTS, {"q": np.ones((2, 5), "f4")}, {}, r"q: weight of shape \(2, 5\), expected \(out"),
        (INPUTS, {"q": np.ones((0, 4), "f4")}, {}, r"q: weight of shape \(0, 4\), expected \(out"),
        (INPUTS, ONE, {"act_bits": 5}, "qkv: 5 bits, expected 4 or 8"),
        (INPUTS, ONE, {"weight_bits": 16}, "qkv: 16 bits, expected 4 or 8"),
        (INPUTS, ONE, {"options": FlatOptions(steps=-1)}, "steps is -1, expected at least 0"),
        (INPUTS, ONE, {"options": FlatOptions(batch_tokens=0)}, "batch_tokens is 0, expected at"),
        (INPUTS, ONE, {"options": FlatOptions(batch_rows=0)}, "batch_rows is 0, expected at"),
        (INPUTS, ONE, {"options": FlatOptions(row_clips=0)}, "row_clips is 0, expected at"),
        (INPUTS, ONE, {"options": FlatOptions(seed=-1)}, "seed is -1, expected at least 0"),
        (INPUTS, ONE, {"options": FlatOptions(learning_rate=np.nan)}, "learning_rate is nan"),
        (INPUTS, ONE, {"options": FlatOptions(clip_learning_rate=0)}, "clip_learning_rate is 0"),
    ],
)
def test_refusals(inputs, weights, options, message):
    with pytest.raises(MsQuantError, match=message):
        train(inputs, weights, "qkv", **options)


def test_mindspore_is_needed_for_training_only(package_environment):
    script = (
        "import sys; sys.modules['mindspore'] = None\n"
        "import numpy as np\n"
        "from ms_quant.algorithms.flatquant import FlatOptions, train\n"
        "x, w = np.random.default_rng(0).standard_normal((2, 9, 16)).astype('f4')\n"
        "assert train(x, {'q': w}, 'q', options=FlatOptions(steps=0)).loss > 0\n"
        "try:\n    train(x, {'q': w}, 'q')\nexcept ImportError:\n    print('as expected')\n"
    )
    environment = {**os.environ, **package_environment}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.stdout == "as expected\n", run.stderr
