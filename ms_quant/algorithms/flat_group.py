"""What FlatQuant works on: the linears of a group, and what any candidate does to their outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics import affine, rotation
from ms_quant.numerics.affine import check_finite

SMALLEST_ROW_CLIP = 0.5


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


class Group:
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
                raise BadArgumentError(f"{name}: {bits} bits, expected 4 or 8")
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
            rows, targets = compressed(x, outputs)
            weight = self.folded(flat, key)
            own = flat.weight_clip[key]
            clips[key] = search_rows(weight, own, rows, targets, count, self.weight_bits)
        return self.deploy(flat.left, flat.right, flat.clip_ratio, clips)


def _rounded(x: np.ndarray, clip: np.ndarray | np.float32, bits: int) -> np.ndarray:
    """What the codes of each row stand for, float32; ``clip`` is a number or (rows, 1)."""
    absmax = np.abs(x).max(axis=-1, keepdims=True) * clip
    scale = affine.symmetric_scale(absmax, affine.LIMITS[bits][1])
    return affine.dequantize(affine.quantize(x, scale, bits=bits), scale)


def compressed(x: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def search_rows(
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


def _check_tensors(inputs: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> None:
    if np.ndim(inputs) != 2 or not np.size(inputs):
        raise BadArgumentError(f"{name}: inputs of shape {np.shape(inputs)}, expected (tokens, K)")
    if not weights:
        raise BadArgumentError(f"{name}: no weights, expected one linear or several")
    check_finite(inputs, f"{name}: inputs")
    for key, weight in weights.items():
        if np.ndim(weight) != 2 or not np.size(weight) or weight.shape[1] != inputs.shape[1]:
            raise BadArgumentError(
                f"{key}: weight of shape {np.shape(weight)}, expected (out, {inputs.shape[1]})"
            )
        check_finite(weight, key)
