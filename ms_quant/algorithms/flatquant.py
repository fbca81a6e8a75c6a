"""FlatQuant: an invertible Kronecker transform that makes 4-bit rounding harm a group less.

Linears of one input x (tokens, K) are deployed as

    y = dq(q(x')) @ dq(q(W'))^T,   x' = x @ kron(left, right),   W' = W @ inverse(kron)^T,

with a symmetric scale for each token of x', absmax * clip_ratio / 7, and for each row of W',
absmax * weight_clip / 7. The factors and the clipping are trained on the squared error of y
against x @ W^T with straight-through rounding, and start where a closed form puts them.

**The start.** With M = kron @ kron^T, the error that rounding of x' makes is proportional to
tr(M Sx) tr(M^-1 Sw), with Sx and Sw the second moments of the inputs and of the weights' rows; so
is that of W'. It is least where M is the geometric mean of Sx^-1 and Sw. As a Kronecker product,
one factor is solved for while the other is held, in turns. Any orthogonal matrix may follow
sqrt(M); a random Hadamard one spreads outliers.

**The training.** Adam with a cosine decay. A factor moves by P <- P (I - step), as its gradient is
taken in the frame of P: a step changes x' by a fraction of x', whatever the condition of P. One
clipping ratio of the tokens and one of the weights' rows are trained along, as sigmoids; then each
weight row takes its best ratio of a grid, given how the inputs are rounded. A step looks at some
tokens and some outputs, so that its cost does not grow with the linears.

Source: Sun et al., FlatQuant, arXiv 2410.09426. Different here: the start; plain matrices in place
of SVD factors; the rows' clipping, which is trained row by row there; and no scaling of single
channels beside the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ms_quant.algorithms.problem import Problem, Solution, prepared, seen_inputs
from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine, rotation
from ms_quant.numerics.activation import PerToken
from ms_quant.numerics.affine import check_finite
from ms_quant.numerics.linear import Kronecker

CLIPS = (1.0, 0.9, 0.8, 0.7)  # of all tokens and rows alike, for what is not trained
LARGEST_CLIP = 0.98  # where training may start: the sigmoid of 1 is far off
SMALLEST_ROW_CLIP = 0.5
BALANCING_TURNS = 6
DAMPING = 1e-6  # of a second moment's mean, added to each; channels may be all zeros
WARMUP = 0.05  # of the steps
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-12
TINY = 1e-30  # in place of the maximum of an all-zero row


@dataclass(frozen=True)
class FlatOptions:
    """How to train.

    Attributes:
        steps: of Adam; 0 returns the best start.
        batch_tokens: tokens of one step, drawn without replacement.
        batch_rows: weight rows of one step, drawn likewise.
        learning_rate: largest change of a factor in a step, relative to the factor; divided by
            the square root of the factor's order.
        clip_learning_rate: of the clipping logits.
        row_clips: how many ratios from 0.5 to 1 are tried for each weight row at the end.
        seed: of the Hadamard matrices' signs and of the batches.
    """

    steps: int = 400
    batch_tokens: int = 128
    batch_rows: int = 256
    learning_rate: float = 0.15
    clip_learning_rate: float = 0.05
    row_clips: int = 41
    seed: int = 0


DEFAULTS = FlatOptions()


@dataclass(frozen=True)
class Flat:
    """What is deployed.

    Attributes:
        left: float32 (a, a).
        right: float32 (b, b), a * b = K.
        clip_ratio: in (0, 1], the factor on each token's absmax.
        weight_clip: linear name to float32 (out, 1) in (0, 1], the factor on each row's absmax.
        loss: of these values on the inputs they were trained on, computed as they are deployed:
            the mean over linears of squared error over squared output, both summed over tokens.
    """

    left: np.ndarray
    right: np.ndarray
    clip_ratio: np.float32
    weight_clip: Mapping[str, np.ndarray]
    loss: float


def train(
    inputs: np.ndarray,
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    act_bits: int = 4,
    weight_bits: int = 4,
    options: FlatOptions = DEFAULTS,
) -> Flat:
    """Trains the transform of linears that read the same input.

    Args:
        inputs: float32 (tokens, K).
        weights: linear name to float32 (out, K).
        name: the group's name, for errors.
        act_bits: 4 or 8, of the inputs.
        weight_bits: 4 or 8, of the weights.
        options: how to train.

    Returns:
        The least loss of what was trained and of every start: the identity, a random Hadamard
        matrix, and the balanced one, each with every one of ``CLIPS``. The same arguments give
        the same bits on one machine with as many threads. MindSpore is much faster with
        ``mindspore.runtime.launch_blocking()``, which is the caller's to choose.

    Raises:
        MsQuantError: a value is NaN or inf, a shape or an option is wrong, or K is twice an odd
            number, which has no balanced factors.
    """
    group = _Group(inputs, weights, name, act_bits, weight_bits)
    _check_options(options, name)
    starts = [group.deploy(*start) for start in _starts(group, options.seed)]
    best = min(starts, key=lambda flat: flat.loss)
    if best.loss > 0:
        refined = group.refine(best, options.row_clips)
        trained = _descend(group, best, options) if options.steps else None
        candidates = [best, refined]
        if trained is not None:
            candidates.append(group.refine(trained, options.row_clips))
        best = min(candidates, key=lambda flat: flat.loss)
    return best


def solve(problem: Problem, solution: Solution, options: FlatOptions) -> Solution:
    """Factors are rounded to the type that stores them before the weights take their inverse."""
    activation = problem.scheme.activation
    assert isinstance(activation, PerToken)
    flat = train(
        seen_inputs(problem, solution),
        prepared(problem, solution),
        problem.name,
        act_bits=activation.bits,
        weight_bits=problem.scheme.weight.bits,
        options=options,
    )
    factors = (m.astype(problem.dtype).astype(np.float32) for m in (flat.left, flat.right))
    return replace(
        solution,
        kronecker=Kronecker(*factors),
        input_clip=float(flat.clip_ratio),
        clip=flat.weight_clip,
        note={**solution.note, "flat_loss": flat.loss},
    )


def _check_tensors(inputs: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> None:
    if np.ndim(inputs) != 2 or not np.size(inputs):
        raise MsQuantError(f"{name}: inputs of shape {np.shape(inputs)}, expected (tokens, K)")
    if not weights:
        raise MsQuantError(f"{name}: no weights, expected one linear or several")
    check_finite(inputs, f"{name}: inputs")
    for key, weight in weights.items():
        if np.ndim(weight) != 2 or not np.size(weight) or weight.shape[1] != inputs.shape[1]:
            raise MsQuantError(
                f"{key}: weight of shape {np.shape(weight)}, expected (out, {inputs.shape[1]})"
            )
        check_finite(weight, key)


def _check_options(options: FlatOptions, name: str) -> None:
    least = {"steps": 0, "batch_tokens": 1, "batch_rows": 1, "row_clips": 1, "seed": 0}
    for key, smallest in least.items():
        if getattr(options, key) < smallest:
            found = getattr(options, key)
            raise MsQuantError(f"{name}: {key} is {found}, expected at least {smallest}")
    for key in ("learning_rate", "clip_learning_rate"):
        rate = getattr(options, key)
        if not 0 < rate < math.inf:
            raise MsQuantError(f"{name}: {key} is {rate}, expected a positive number")


class _Group:
    """The linears, and what any candidate does to their outputs. Arguments as of :func:`train`."""

    def __init__(
        self,
        inputs: np.ndarray,
        weights: Mapping[str, np.ndarray],
        name: str,
        act_bits: int,
        weight_bits: int,
    ):
        _check_tensors(inputs, weights, name)
        for bits in (act_bits, weight_bits):
            if bits not in affine.LIMITS:
                raise MsQuantError(f"{name}: {bits} bits, expected 4 or 8")
        self.name, self.act_bits, self.weight_bits = name, act_bits, weight_bits
        self.factors = rotation.balanced_factors(inputs.shape[1], name)
        self.inputs = np.asarray(inputs, np.float32)
        self.weights = {key: np.asarray(weight, np.float32) for key, weight in weights.items()}
        self.outputs, self.energies = {}, {}
        wide = self.inputs.astype(np.float64)
        for key, weight in self.weights.items():
            outputs = wide @ weight.astype(np.float64).T
            self.energies[key] = float(np.square(outputs).sum()) or 1.0
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                self.outputs[key] = outputs.astype(np.float32)
            check_finite(self.outputs[key], f"{key}: outputs")

    def transformed(self, flat: Flat) -> np.ndarray:
        """The inputs as they are rounded, float32 (tokens, K)."""
        x = rotation.apply_kronecker(self.inputs, flat.left, flat.right, self.name)
        return _rounded(x.astype(np.float32), flat.clip_ratio, self.act_bits)

    def folded(self, flat: Flat, key: str) -> np.ndarray:
        """W' of one linear, float32 (out, K)."""
        weight = rotation.fold_kronecker(self.weights[key], flat.left, flat.right, key)
        return weight.astype(np.float32)

    def deploy(
        self,
        left: np.ndarray,
        right: np.ndarray,
        clip_ratio: float | np.float32,
        weight_clip: Mapping[str, np.ndarray],
    ) -> Flat:
        """A candidate with its loss."""
        factors = left.astype(np.float32), right.astype(np.float32)
        flat = Flat(*factors, np.float32(clip_ratio), weight_clip, math.inf)
        x, loss = self.transformed(flat), 0.0
        for key, outputs in self.outputs.items():
            weight = _rounded(self.folded(flat, key), weight_clip[key], self.weight_bits)
            error = np.square(x @ weight.T - outputs, dtype=np.float64).sum()
            loss += float(error) / (self.energies[key] * len(self.outputs))
        return replace(flat, loss=loss) if math.isfinite(loss) else flat

    def same_clip(self, ratio: float) -> dict[str, np.ndarray]:
        """One factor for every row."""
        return {key: np.full((len(w), 1), ratio, np.float32) for key, w in self.weights.items()}

    def refine(self, flat: Flat, count: int) -> Flat:
        """Gives each weight row the clipping of the smallest error, of ``count`` and its own."""
        x, clips = self.transformed(flat), {}
        for key, outputs in self.outputs.items():
            rows, targets = _compressed(x, outputs)
            weight = self.folded(flat, key)
            own = flat.weight_clip[key]
            clips[key] = _search_rows(weight, own, rows, targets, count, self.weight_bits)
        return self.deploy(flat.left, flat.right, flat.clip_ratio, clips)


def _rounded(x: np.ndarray, clip: np.ndarray | np.float32, bits: int) -> np.ndarray:
    """What the codes of each row stand for, float32; ``clip`` is a number or (rows, 1)."""
    absmax = np.abs(x).max(axis=-1, keepdims=True) * clip
    scale = affine.symmetric_scale(absmax, affine.LIMITS[bits][1])
    return affine.dequantize(affine.quantize(x, scale, bits=bits), scale)


def _compressed(x: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer rows with the same squared errors up to a constant, if there are more than columns.

    With x = Q R, |x w - y|^2 = |R w - Q^T y|^2 + constant.

    Args:
        x: float32 (tokens, K).
        outputs: float32 (tokens, out).

    Returns:
        float32 (n, K) and (n, out), n = min(tokens, K).
    """
    if len(x) <= x.shape[1]:
        return x, outputs
    q, r = np.linalg.qr(x.astype(np.float64))
    return r.astype(np.float32), (q.T @ outputs).astype(np.float32)


def _search_rows(
    weight: np.ndarray,
    own: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray,
    count: int,
    bits: int,
) -> np.ndarray:
    """Clipping of each weight row with the smallest error against the targets.

    Args:
        weight: float32 (out, K).
        own: float32 (out, 1), tried first.
        rows: float32 (n, K).
        targets: float32 (n, out).
        count: how many ratios are tried beside.
        bits: of the weight.

    Returns:
        float32 (out, 1).
    """
    chosen = own.copy()
    least = np.full(len(weight), np.inf)
    for ratio in [own, *np.linspace(SMALLEST_ROW_CLIP, 1, count, dtype=np.float32)]:
        error = rows @ _rounded(weight, ratio, bits).T - targets
        loss = np.square(error, dtype=np.float64).sum(axis=0)
        better = loss < least
        least[better] = loss[better]
        chosen[better] = np.broadcast_to(ratio, own.shape)[better]
    return chosen


def _starts(group: _Group, seed: int) -> Iterator[tuple]:
    """Arguments of :meth:`_Group.deploy`; the identity without clipping is the first."""
    a, b = group.factors
    turns = [_orthogonal(a, 2 * seed), _orthogonal(b, 2 * seed + 1)]
    balanced = _balanced(group)
    for left, right in (
        (np.eye(a), np.eye(b)),
        (turns[0], turns[1]),
        (balanced[0] @ turns[0], balanced[1] @ turns[1]),
    ):
        for clip in CLIPS:
            yield left, right, clip, group.same_clip(clip)


def _orthogonal(n: int, seed: int) -> np.ndarray:
    """A random Hadamard matrix, or a random orthogonal one where there is none; float64 (n, n)."""
    try:
        return rotation.random_hadamard(n, seed)
    except MsQuantError:
        return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def _balanced(group: _Group) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the least tr(M Sx) tr(M^-1 Sw); see the module. float64, symmetric."""
    a, b = group.factors
    x = group.inputs.astype(np.float64).reshape(-1, a, b)
    w = np.concatenate(
        [weight / math.sqrt(group.energies[key]) for key, weight in group.weights.items()]
    ).reshape(-1, a, b)
    left, right = np.eye(a), np.eye(b)  # of M = kron(left, right)
    for _ in range(BALANCING_TURNS):
        left = _geometric_mean(_moment(x, right), _moment(w, np.linalg.inv(right)))
        x_turned, w_turned = x.transpose(0, 2, 1), w.transpose(0, 2, 1)
        right = _geometric_mean(_moment(x_turned, left), _moment(w_turned, np.linalg.inv(left)))
    return _power(left, 0.5), _power(right, 0.5)


def _moment(rows: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """The sum of R @ metric @ R^T over rows R, damped and of trace n.

    Args:
        rows: float64 (count, n, m).
        metric: (m, m).

    Returns:
        float64 (n, n), positive definite; the identity if all rows are zero.
    """
    n = rows.shape[1]
    products = (rows @ metric).transpose(1, 0, 2).reshape(n, -1)
    moment = products @ rows.transpose(1, 0, 2).reshape(n, -1).T
    mean = np.trace(moment) / n
    if not mean > 0:
        return np.eye(n)
    return (moment + moment.T) / (2 * mean) + DAMPING * np.eye(n)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, values.max() * 1e-14) ** exponent @ vectors.T


def _geometric_mean(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The M with M x M = w, the geometric mean of x^-1 and w; symmetric, of trace n."""
    root, inverse = _power(x, 0.5), _power(x, -0.5)
    mean = inverse @ _power(root @ w @ root, 0.5) @ inverse
    return (mean + mean.T) * (len(x) / (2 * np.trace(mean)))


def _descend(group: _Group, start: Flat, options: FlatOptions) -> Flat | None:
    """Trains from a start; None if a factor became singular on the way."""
    parameters = {
        "left": start.left.astype(np.float64),
        "right": start.right.astype(np.float64),
        "clip": _logit(start.clip_ratio),
        "weight_clip": _logit(start.clip_ratio),
    }
    gradients = _gradient_function(group)
    adam = _Adam(parameters)
    for step, batch in enumerate(_batches(group, options)):
        try:
            directions = adam.directions(gradients(parameters, *batch))
        except np.linalg.LinAlgError:
            return None
        rate = _schedule(step, options.steps)
        for key in ("left", "right"):
            factor = parameters[key]
            change = rate * options.learning_rate / math.sqrt(len(factor))
            parameters[key] = factor - change * (factor @ directions[key])
        for key in ("clip", "weight_clip"):
            parameters[key] = parameters[key] - rate * options.clip_learning_rate * directions[key]
    return _deployed(group, parameters)


def _normalized(group: _Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, outputs and stacked weights, scaled so that the loss is the squared error.

    Neither the scale of the inputs nor that of a weight's row changes how they are rounded.

    Returns:
        float32 (tokens, K), (tokens, sum of out) and (sum of out, K); the mean over tokens of the
        squared error summed over the outputs is :attr:`Flat.loss`.
    """
    count, tokens = len(group.weights), len(group.inputs)
    size = float(np.sqrt(np.square(group.inputs, dtype=np.float64).mean())) or 1.0
    scales = {key: math.sqrt(tokens / (count * group.energies[key])) for key in group.weights}
    weights = [_scaled(weight, scales[key] * size) for key, weight in group.weights.items()]
    outputs = [_scaled(y, scales[key]) for key, y in group.outputs.items()]
    return (
        _scaled(group.inputs, 1 / size),
        np.concatenate(outputs, axis=1),
        np.concatenate(weights),
    )


def _scaled(x: np.ndarray, factor: float) -> np.ndarray:
    """float32; the factor alone may be too large for it."""
    return (x.astype(np.float64) * factor).astype(np.float32)


def _batches(group: _Group, options: FlatOptions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of each step's tokens and weight rows."""
    rng = np.random.default_rng(options.seed)
    tokens = _draws(len(group.inputs), options.batch_tokens, rng)
    rows = _draws(sum(map(len, group.weights.values())), options.batch_rows, rng)
    for _ in range(options.steps):
        yield next(tokens), next(rows)


def _draws(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """``size`` numbers below ``count`` at a time, or all; none comes twice from one shuffling."""
    order = np.arange(0)
    while True:
        if len(order) < min(size, count):
            order = rng.permutation(count)
        yield np.sort(order[:size])
        order = order[size:]


def _schedule(step: int, steps: int) -> float:
    """A short linear rise, then a cosine to 0."""
    return min(1.0, (step + 1) / (WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _sigmoid(logit: np.ndarray) -> float:
    return 1 / (1 + math.exp(-logit.item()))


def _logit(ratio: np.float32) -> np.ndarray:
    """float64 (1, 1)."""
    inside = min(float(ratio), LARGEST_CLIP)
    return np.full((1, 1), math.log(inside / (1 - inside)))


def _deployed(group: _Group, parameters: Mapping[str, np.ndarray]) -> Flat | None:
    """What was trained, with factors of the size of orthogonal ones; None if it is of no use."""
    left, right = (
        parameters[key] * (math.sqrt(len(parameters[key])) / np.linalg.norm(parameters[key]))
        for key in ("left", "right")
    )
    clips = _sigmoid(parameters["clip"]), _sigmoid(parameters["weight_clip"])
    try:
        return group.deploy(left, right, clips[0], group.same_clip(clips[1]))
    except MsQuantError:  # not finite, or singular
        return None


class _Adam:
    """Adam's directions for a few small arrays; Kingma and Ba, arXiv 1412.6980."""

    def __init__(self, parameters: Mapping[str, np.ndarray]):
        self.mean = {key: np.zeros_like(value) for key, value in parameters.items()}
        self.square = {key: np.zeros_like(value) for key, value in parameters.items()}
        self.step = 0

    def directions(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.step += 1
        result = {}
        for key, gradient in gradients.items():
            self.mean[key] += (1 - BETA1) * (gradient - self.mean[key])
            self.square[key] += (1 - BETA2) * (gradient**2 - self.square[key])
            mean = self.mean[key] / (1 - BETA1**self.step)
            square = self.square[key] / (1 - BETA2**self.step)
            result[key] = mean / (np.sqrt(square) + EPSILON)
        return result


Gradients = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray], dict[str, np.ndarray]]


def _gradient_function(group: _Group) -> Gradients:
    """What gives the gradient of the loss on some tokens and weight rows.

    MindSpore has the gradient with respect to the factors and to their inverses; the two are put
    together here. For P -> P (I + D) and N = inverse(P)^T, which becomes N (I + D)^-T, the
    gradient with respect to D at 0 is P^T gP - gN^T N.
    """
    from mindspore import Tensor

    objective = _objective(group.act_bits, group.weight_bits)
    x, y, w = _normalized(group)

    def tensor(array: np.ndarray) -> Tensor:
        return Tensor(np.ascontiguousarray(array, np.float32))

    def gradients(
        parameters: Mapping[str, np.ndarray], tokens: np.ndarray, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        left, right = parameters["left"], parameters["right"]
        inverses = [np.linalg.inv(factor).T for factor in (left, right)]
        batch = x[tokens], y[np.ix_(tokens, rows)], w[rows]
        moving = left, right, *inverses, parameters["clip"], parameters["weight_clip"]
        found = objective(*map(tensor, (*batch, *moving)))[1]
        parts = [part.asnumpy().astype(np.float64) for part in found]
        return {
            "left": _traceless(left.T @ parts[0] - parts[2].T @ inverses[0]),
            "right": _traceless(right.T @ parts[1] - parts[3].T @ inverses[1]),
            "clip": parts[4],
            "weight_clip": parts[5],
        }

    return gradients


def _traceless(gradient: np.ndarray) -> np.ndarray:
    """Without what is rounding noise: the loss does not depend on the scale of a factor."""
    return gradient - np.trace(gradient) / len(gradient) * np.eye(len(gradient))


def _objective(act_bits: int, weight_bits: int) -> Callable[..., Any]:
    """Loss and gradient of a batch, in MindSpore.

    Returns:
        A function of x (n, K), y (n, out), w (out, K), left (a, a), right (b, b), inverse(left)^T,
        inverse(right)^T, and the logits of clipping, (1, 1) each. It gives the loss, that is the
        mean over tokens of the squared error, and its gradient in all but the first three.
    """
    import mindspore as ms
    from mindspore import ops

    ones, round_inputs, round_rows = _ones(), _fake_quant(act_bits), _fake_quant(weight_bits)
    transposed_first = ops.BatchMatMul(transpose_a=True)
    transposed_second = ops.MatMul(transpose_b=True)

    def kronecker(x, left, right):
        # A transpose costs ten times the copies of ``left`` that a batched product needs.
        n, a, b = x.shape[0], left.shape[0], right.shape[0]
        copies = ops.matmul(ones(n, 1), left.reshape(1, -1)).reshape(n, a, a)
        return transposed_first(
            copies, ops.matmul(x.reshape(-1, b), right).reshape(n, a, b)
        ).reshape(n, a * b)

    def loss(x, y, w, left, right, left_inverse, right_inverse, clip, weight_clip):
        n, m = y.shape
        clips = ops.matmul(ones(n, 1), ops.sigmoid(clip))
        weight_clips = ops.matmul(ones(m, 1), ops.sigmoid(weight_clip))
        inputs = round_inputs(kronecker(x, left, right), clips)
        rows = round_rows(kronecker(w, left_inverse, right_inverse), weight_clips)
        error = transposed_second(inputs, rows) - y
        sums = ops.matmul(error * error, ones(m, 1))
        return (ops.matmul(ones(1, n), sums) / n).reshape(())

    return ms.value_and_grad(loss, (3, 4, 5, 6, 7, 8))


def _ones() -> Callable[..., Any]:
    """Ones by shape, made once: sums and copies are products with them, which are fast on CPU."""
    import mindspore as ms
    from mindspore import ops

    made: dict[tuple[int, ...], ms.Tensor] = {}

    def ones(*shape: int) -> ms.Tensor:
        if shape not in made:
            made[shape] = ops.ones(shape, ms.float32)
        return made[shape]

    return ones


def _fake_quant(bits: int) -> Callable[..., Any]:
    """Symmetric rounding of each row, with the gradient of straight-through rounding.

    The gradient of a row's absmax goes to the element that has it, in equal parts if several do.

    Returns:
        A function of x (n, k) and clip (n, 1), that gives dq(q(x)), (n, k).
    """
    from mindspore import nn, ops

    ones = _ones()
    smallest, largest = affine.LIMITS[bits]

    class FakeQuant(nn.Cell):
        def construct(self, x, clip):
            magnitude = ops.abs(x)
            absmax = ops.maximum(ops.amax(magnitude, -1, keepdims=True), TINY)
            scale, row = absmax * clip / largest, ones(1, x.shape[1])
            steps = x * ops.matmul(1 / scale, row)
            rounded = ops.round(steps)
            codes = ops.maximum(ops.minimum(rounded, float(largest)), float(smallest))
            saved = (magnitude, absmax, steps, rounded, codes)
            return codes * ops.matmul(scale, row), saved

        def bprop(self, x, clip, out, gradients):
            magnitude, absmax, steps, rounded, codes = out[1]
            row, column = ones(1, x.shape[1]), ones(x.shape[1], 1)
            g = gradients[0]
            through = g * (1 - ops.minimum(ops.abs(rounded - codes), 1.0))
            g_scale = ops.matmul(g * codes - through * steps, column) / largest
            # 1 at the maximum and 0 elsewhere; comparisons are slow.
            top = ops.maximum(1 - (ops.matmul(absmax, row) - magnitude) * 1e35, 0.0)
            share = g_scale * clip / (absmax * ops.maximum(ops.matmul(top, column), 1.0))
            return through + top * x * ops.matmul(share, row), g_scale * absmax

    cell = FakeQuant()
    return lambda x, clip: cell(x, clip)[0]
