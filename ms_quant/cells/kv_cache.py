"""The key-value caches of :mod:`ms_quant.models.cache` for Cells.

A Cell that launches MindSpore's operators calls ``append`` with tensors, one that calls native
kernels ``extend`` with arrays; one generation does one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_quant.models import cache
from ms_quant.numerics.affine import QMAX, QMIN, SMALLEST_SCALE


class KeyValueCache(cache.KeyValueCache):
    """Keys and values of one attention layer, for the tokens seen so far.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return super().length if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, S, D) keys and values, and gives all of them, (B, heads, T, D)."""
        if self.keys is not None:
            keys = ops.concat((self.keys, keys), 2)
            values = ops.concat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values


class Int8KeyValueCache(cache.Int8KeyValueCache):
    """C8: codes of all tokens, with one scale for each channel or one for each token.

    What is not in int8 is only what is given. Codes and values are bit-equal to those of
    :mod:`ms_quant.numerics.kv_cache`.

    Args:
        scales (dict, optional): float32 (kv heads * head_dim,) arrays, static scales of the keys
            and the values by the linears that make them, in this order. Default: ``None``, one
            scale for each token's keys and one for its values, of what they are.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """

    def __init__(self, scales: Mapping[str, np.ndarray] | None = None):
        super().__init__(scales)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.static = scales is not None
        self.scales: list[Tensor | None] = [None, None]
        if scales is not None:
            self.scales = [Tensor.from_numpy(scale) for scale in scales.values()]

    @property
    def length(self) -> int:
        return super().length if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, S, D) keys and values, and gives what the codes of all stand for."""
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
