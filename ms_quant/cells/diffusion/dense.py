"""Attention as the network itself computes it."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ms_quant.attention.dense import attention
from ms_quant.attention.layouts import from_heads_first, heads_first
from ms_quant.cells.diffusion.function import AttentionCall
from ms_quant.cells.direct import as_type, floats


def float_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str,
    mask: Tensor | None,
    scale: float | None,
    call: AttentionCall,
) -> Tensor:
    """The network's own attention, or dense attention on the host where it has none.

    Raises:
        MsQuantError: a mask of numbers where the network has no attention of its own.
    """
    if call.original is not None:
        return call.original(q, k, v)
    arrays = (heads_first(floats(x), layout, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    out = attention(*arrays, scale=scale, mask=None if mask is None else mask.asnumpy())
    return as_type(np.ascontiguousarray(from_heads_first(out, layout)), q.dtype)
