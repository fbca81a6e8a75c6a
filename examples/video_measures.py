"""How far the clips and velocities of one network are from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from moving_shapes import clips, noise, to_tokens
from video_dit import STEPS

from ms_quant import TimestepManager

TIMES = (0.9, 0.5, 0.2)
HELD_OUT = 10**6
"""Clips of this seed and of larger ones are not trained on."""


def psnr(found: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal to noise ratio in dB, the mean over clips; the peak is a clip's own range."""
    return float(np.mean([_psnr(a, b) for a, b in zip(found, exact, strict=True)]))


def _psnr(found: np.ndarray, exact: np.ndarray) -> float:
    error = float(np.mean((found.astype(np.float64) - exact) ** 2))
    return 10 * math.log10(float(np.ptp(exact)) ** 2 / error) if error else math.inf


def cosine(found: np.ndarray, exact: np.ndarray) -> float:
    """Of the angle between all values of the two."""
    a, b = found.ravel().astype(np.float64), exact.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def relative_l2(found: np.ndarray, exact: np.ndarray) -> float:
    """Length of the difference over that of the exact values."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def velocities(
    network: nn.Cell, count: int = 2, times: Sequence[float] = TIMES, steps: int = STEPS
) -> list[np.ndarray]:
    """What a network says of held-out clips at some times, each as the step that it belongs to."""
    videos, words = clips(count, HELD_OUT)
    tokens, eps = to_tokens(videos), noise(count, HELD_OUT)
    found = []
    for time in times:
        TimestepManager.set_timestep_idx(round((1 - time) * steps))
        x = Tensor(((1 - time) * tokens + time * eps).astype(np.float32))
        at = Tensor(np.full(count, time), ms.float32)
        found.append(network(x, at, Tensor(words)).asnumpy())
    TimestepManager.set_timestep_idx(None)
    return found
