"""Static scales of attention, from what comes there while a network is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from mindspore import Tensor, nn

from ms_quant.attention.fa_quant import Scales
from ms_quant.attention.layouts import heads_first
from ms_quant.attention.rotation import rotate, walsh_rotation
from ms_quant.cells.diffusion.attach import attach_attention, detach_attention
from ms_quant.cells.diffusion.dense import float_attention
from ms_quant.cells.diffusion.function import AttentionCall
from ms_quant.cells.diffusion.plan import AttentionPlan
from ms_quant.cells.direct import floats
from ms_quant.errors import BadArgumentError
from ms_quant.statistics.attention_range import AttentionRange


class Ranges:
    """How far queries, keys and values of each head reach; computes as the network.

    Args:
        plan: of the attention; where it rotates, what is rotated counts.
    """

    def __init__(self, plan: AttentionPlan):
        self.plan = plan
        self.seen = AttentionRange()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
    ) -> Tensor:
        arrays = [heads_first(floats(x), layout) for x in (q, k, v)]
        self._see(call.path, arrays)
        return float_attention(q, k, v, layout=layout, mask=mask, scale=scale, call=call)

    def _see(self, path: str, arrays: list[np.ndarray]) -> None:
        q, k, v = arrays
        if self.plan.is_rotated:
            rotation = walsh_rotation(q.shape[3])
            q, k = rotate(q, rotation), rotate(k, rotation)
        with _naming(path):
            self.seen.add(q, k, v)

    def scales(self, path: str) -> Scales:
        """float32 (heads, 1) of queries, keys and values.

        Raises:
            MsQuantError: no call came there.
        """
        if not self.seen.reach:
            raise BadArgumentError(
                f"{path}: no calibration input reached it, expected some, or INT8_DYNAMIC"
            )
        return self.seen.scales()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except BadArgumentError as error:
        raise BadArgumentError(f"{path}: {error}") from None


@contextmanager
def watched(network: nn.Cell, ranges: Mapping[str, Ranges]) -> Iterator[None]:
    """Has some attentions of a network looked at while it is called."""
    attach_attention(network, lambda site: ranges.get(site.path))
    try:
        yield
    finally:
        detach_attention(network)
