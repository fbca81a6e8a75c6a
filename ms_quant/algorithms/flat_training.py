"""The gradient descent of FlatQuant, in MindSpore; what is trained: :mod:`flatquant`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ms_quant.algorithms.flat_group import Flat, Group
from ms_quant.algorithms.flat_options import FlatOptions
from ms_quant.errors import MsQuantError
from ms_quant.numerics import affine

LARGEST_CLIP = 0.98  # where training may start: the sigmoid of 1 is far off
WARMUP = 0.05  # of the steps
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-12
TINY = 1e-30  # in place of the maximum of an all-zero row


def descend(group: Group, start: Flat, options: FlatOptions) -> Flat | None:
    """Trains from a start; None if a factor became singular on the way."""
    parameters = {
        "left": start.left.astype(np.float64),
        "right": start.right.astype(np.float64),
        "clip": _logit(start.clip_ratio),
        "weight_clip": _logit(start.clip_ratio),
    }
    gradients = gradient_function(group)
    adam = _Adam(parameters)
    for step, batch in enumerate(batches(group, options)):
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


def normalized(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def batches(group: Group, options: FlatOptions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
    """Above 0, and at most 1 as float32, whatever the logit."""
    return 1 / (1 + math.exp(-float(np.clip(logit.item(), -20, 20))))


def _logit(ratio: np.float32) -> np.ndarray:
    """float64 (1, 1)."""
    inside = min(float(ratio), LARGEST_CLIP)
    return np.full((1, 1), math.log(inside / (1 - inside)))


def _deployed(group: Group, parameters: Mapping[str, np.ndarray]) -> Flat | None:
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


def gradient_function(group: Group) -> Gradients:
    """What gives the gradient of the loss on some tokens and weight rows.

    MindSpore has the gradient with respect to the factors and to their inverses; the two are put
    together here. For P -> P (I + D) and N = inverse(P)^T, which becomes N (I + D)^-T, the
    gradient with respect to D at 0 is P^T gP - gN^T N.
    """
    from mindspore import Tensor

    loss_and_gradient = objective(group.act_bits, group.weight_bits)
    x, y, w = normalized(group)

    def tensor(array: np.ndarray) -> Tensor:
        return Tensor(np.ascontiguousarray(array, np.float32))

    def gradients(
        parameters: Mapping[str, np.ndarray], tokens: np.ndarray, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        left, right = parameters["left"], parameters["right"]
        inverses = [np.linalg.inv(factor).T for factor in (left, right)]
        batch = x[tokens], y[np.ix_(tokens, rows)], w[rows]
        moving = left, right, *inverses, parameters["clip"], parameters["weight_clip"]
        found = loss_and_gradient(*map(tensor, (*batch, *moving)))[1]
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


def objective(act_bits: int, weight_bits: int) -> Callable[..., Any]:
    """Loss and gradient of a batch, in MindSpore.

    Returns:
        A function of x (n, K), y (n, out), w (out, K), left (a, a), right (b, b), inverse(left)^T,
        inverse(right)^T, and the logits of clipping, (1, 1) each. It gives the loss, that is the
        mean over tokens of the squared error, and its gradient in all but the first three.
    """
    import mindspore as ms
    from mindspore import ops

    ones, round_inputs, round_rows = _ones(), fake_quant(act_bits), fake_quant(weight_bits)
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


def fake_quant(bits: int) -> Callable[..., Any]:
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
