"""Weight clipping: a smaller range for each output row, chosen by that row's output error.

Source: the clip search of AWQ (Lin et al., arXiv 2306.00978), for whole rows.
"""

from __future__ import annotations

import numpy as np

from ms_quant.numerics import affine

RATIOS = tuple(round(1.0 - 0.05 * i, 2) for i in range(10))  # 1, 0.95, ..., 0.55


def search_clip(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The clipping factor of each row with the smallest output error.

    Args:
        weight: float32 (out, in), as it will be quantized (smoothing applied).
        inputs: float32 (tokens, in), as the linear will see them.

    Returns:
        float32 (out, 1). The mean over tokens of (x . (dq(q(w)) - w))^2 is smallest, sums in
        float32; a tie goes to the larger factor.
    """
    best = np.full(len(weight), np.inf)
    chosen = np.ones((len(weight), 1), np.float32)
    for ratio in RATIOS:
        scale = affine.per_channel_scale(weight, ratio)
        error = affine.dequantize(affine.quantize(weight, scale), scale) - weight
        loss = np.square(inputs @ error.T).mean(axis=0, dtype=np.float64)
        better = loss < best
        best[better] = loss[better]
        chosen[better] = ratio
    return chosen
