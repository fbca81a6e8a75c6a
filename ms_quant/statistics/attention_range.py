"""What calibration sees of an attention whose queries, keys and values get static int8 scales."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.numerics.affine import symmetric_scale
from ms_quant.statistics.recall_window import head_maxima

OUTSIDE = {"q": 10_000, "k": 10_000, "v": 0}
"""In msModelSlim's ranges one in so many values of a head may lie outside; of values none may."""


@dataclass
class AttentionRange:
    """How far the heads of q, k and v reach within their recall windows; mergeable.

    Each item of a batch is a window, and the one that reaches furthest counts.

    Attributes:
        reach: by "q", "k" and "v", float32 (heads,).
    """

    reach: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Looks at what attention is given, float32 (batch, heads, length, size), rotated if it
        will be.

        Raises:
            MsQuantError: a value is NaN or inf; nothing of the three is counted then.
        """
        arrays = {"q": q, "k": k, "v": v}
        for name, x in arrays.items():
            if not np.isfinite(x).all():
                raise BadArgumentError(
                    f"{name} of a calibration input has NaN or inf, expected finite values"
                )
        self._widen({name: head_maxima(x, OUTSIDE[name])[1] for name, x in arrays.items()})

    def merge(self, other: AttentionRange) -> None:
        """Counts what another one saw."""
        self._widen(other.reach)

    def _widen(self, reach: dict[str, np.ndarray]) -> None:
        for name, found in reach.items():
            self.reach[name] = np.maximum(self.reach.get(name, np.float32(0)), found)

    def scales(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """reach / 127, float32 (heads, 1) of queries, keys and values.

        Raises:
            MsQuantError: nothing was seen.
        """
        if not self.reach:
            raise BadArgumentError("no calibration input reached it, expected some")
        q, k, v = (symmetric_scale(self.reach[name])[:, None] for name in "qkv")
        return q, k, v
