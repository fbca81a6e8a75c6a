"""Keys and values cached in int8."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_quant.cells.direct import floats
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.families import CACHED
from ms_quant.numerics.affine import QMAX, QMIN, SMALLEST_SCALE


class Int8KeyValueCache(KeyValueCache):
    """C8: codes of all tokens, with one scale for each channel or one for each token.

    What is not in int8 is only what :meth:`append` gives. Codes and values are bit-equal to those
    of :mod:`ms_quant.numerics.kv_cache`.

    Args:
        scales (dict, optional): float32 (kv heads * head_dim,) arrays, static scales of the keys
            and the values by the linears of ``CACHED``. Default: ``None``, one scale for each
            token's keys and one for its values, of what they are.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """

    def __init__(self, scales: Mapping[str, np.ndarray] | None = None):
        super().__init__()
        self.scales: list[Tensor | None] = [None, None]
        self.static = scales is not None
        if scales is not None:
            self.scales = [Tensor.from_numpy(scales[path]) for path in CACHED]

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = self.append(Tensor.from_numpy(keys), Tensor.from_numpy(values))
        return floats(whole[0]), floats(whole[1])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, S, D) keys and values, and gives what the codes of all stand for."""
        self.length += keys.shape[2]
        self.keys, whole_keys = self._append(0, self.keys, keys)
        self.values, whole_values = self._append(1, self.values, values)
        return whole_keys, whole_values

    def _append(self, which: int, codes: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes with those of ``x``, and what they stand for."""
        scale = self._scale(which, x)
        steps = ops.round(x.astype(ms.float32) / scale)
        new = ops.clip_by_value(steps, float(QMIN), float(QMAX)).astype(ms.int8)
        codes = new if codes is None else ops.concat((codes, new), 2)
        if not self.static:
            old = self.scales[which]
            scale = scale if old is None else ops.concat((old, scale), 2)
            self.scales[which] = scale
        return codes, (codes.astype(ms.float32) * scale).astype(x.dtype)

    def _scale(self, which: int, x: Tensor) -> Tensor:
        """Of new keys or values, (1, heads, 1, D) or (B, 1, S, 1)."""
        if self.static:
            return ops.reshape(self.scales[which], (1, x.shape[1], 1, x.shape[3]))
        scale = ops.amax(ops.abs(x.astype(ms.float32)), (1, 3), True) / float(QMAX)
        return ops.select(scale >= float(SMALLEST_SCALE), scale, ops.ones_like(scale))
