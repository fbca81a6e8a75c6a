"""Ascend operators behind DiffusionAttention. Never run on a device.

MindSpore 2.10 has the operators for float attention and for the FP8 codes; a recording double on
CPU binds arguments as those do. It has none for attention on FP8, whose codes its
FusedInferAttentionScore does not take: version 2 of it is looked for by the name that MindSpore
would give it, with the arguments of torch_npu's npu_fused_infer_attention_score_v2. Both are
assumed.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops import auto_generate

from ms_quant.attention.fa_quant import KV_ROWS, Q_ROWS
from ms_quant.attention.operands import COLUMNS
from ms_quant.cells.diffusion.plan import AttentionPlan
from ms_quant.errors import BadArgumentError, UnsupportedError

WHOLE = 2147483647
PER_BLOCK = 7
"""Quantization mode of blocks of tokens by channels."""
QUANTIZED = "FusedInferAttentionScoreV2"


class Operators:
    """The operators of one attention."""

    def __init__(self) -> None:
        self.block_quant = auto_generate.DynamicBlockQuant()
        self.quantized_kind = getattr(auto_generate, QUANTIZED, None)

    def attention(self, heads: int, scale: float) -> Any:
        """FusedInferAttentionScore of (B, N, S, D) in float16 or bfloat16."""
        return auto_generate.FusedInferAttentionScore(
            num_heads=heads,
            scale_value=scale,
            pre_tokens=WHOLE,
            next_tokens=WHOLE,
            input_layout="BNSD",
            num_key_value_heads=heads,
        )

    def quantized(self, *operands: Tensor, **arguments: Any) -> Any:
        """FusedInferAttentionScore of FP8 with a scale of each block."""
        if self.quantized_kind is None:
            raise UnsupportedError(
                f"MindSpore {ms.__version__} has no {QUANTIZED}, which attention on FP8 needs on "
                "Ascend, expected a MindSpore that has it, FLOAT steps, or a run on CPU"
            )
        return self.quantized_kind()(*operands, **arguments)


def operators(plan: AttentionPlan) -> Operators:
    """The operators of a plan.

    Raises:
        MsQuantError: there are none here for it.
    """
    check_kind(plan.label)
    return Operators()


def check_kind(name: str) -> None:
    """Refuses a plan or a kind that has no operators here."""
    if name != "FP8_DYNAMIC":
        raise UnsupportedError(
            f"attention: {name} has no Ascend operators here, expected FP8_DYNAMIC; on CPU every "
            "kind and rule runs"
        )


def dense(
    operators: Operators,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Float attention; the operator's mask is true where a pair is left out."""
    q, k, v = (_heads_first(x, layout) for x in (q, k, v))
    if mask is not None and mask.dtype != ms.bool_:
        raise UnsupportedError("mask: is added to scores, expected bool on Ascend")
    if mask is not None:
        left_out = np.logical_not(mask.asnumpy())
        shape = (left_out.shape[0], 1, q.shape[2], k.shape[2])
        mask = Tensor(np.ascontiguousarray(np.broadcast_to(left_out, shape)))
    attention = operators.attention(q.shape[1], _scale(scale, q))
    return _back(attention(q, [k], [v], None, mask)[0], layout)


def forward(
    cell: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    kept: np.ndarray | None,
    scale: float | None,
) -> Tensor:
    """What ``cell`` computes for float16 or bfloat16 queries, keys and values."""
    q, k, v = (_heads_first(x, layout) for x in (q, k, v))
    if kept is not None:  # the operator takes no mask beside scales of blocks
        if len(kept) > 1:
            raise UnsupportedError(
                "padding in a batch of several, expected one clip at a time on Ascend"
            )
        places = Tensor(np.flatnonzero(kept[0]).astype(np.int64))
        k, v = k.index_select(2, places), v.index_select(2, places)
    dtype = q.dtype
    if "q_rot" in cell._params:
        q = ms.ops.matmul(q, cell.q_rot.astype(dtype))
        k = ms.ops.matmul(k, cell.k_rot.astype(dtype))
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (
        _codes(cell.operators, x, rows) for x, rows in ((q, Q_ROWS), (k, KV_ROWS), (v, KV_ROWS))
    )
    out = cell.operators.quantized(
        q8,
        k8,
        v8,
        input_layout="BNSD",
        num_query_heads=q.shape[1],
        softmax_scale=_scale(scale, q),
        pre_tokens=WHOLE,
        next_tokens=WHOLE,
        query_quant_mode=PER_BLOCK,
        key_quant_mode=PER_BLOCK,
        value_quant_mode=PER_BLOCK,
        dequant_scale_query=q_scale,
        dequant_scale_key=k_scale,
        dequant_scale_value=v_scale,
        out_dtype=dtype,
    )[0]
    return _back(out, layout)


def _codes(operators: Operators, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes (B, N, S, D) and float32 scales (B, N, S / rows, D / 128), rounded up.

    The operator takes at most three axes.
    """
    batch, heads, length, size = x.shape
    flat = x.reshape(batch * heads, length, size)
    codes, scales = operators.block_quant(flat, 0.0, "rint", ms.float8_e4m3fn, rows, COLUMNS)
    return codes.reshape(x.shape), scales.reshape(batch, heads, *scales.shape[1:])


def _heads_first(x: Tensor, layout: str) -> Tensor:
    if layout not in ("BNSD", "BSND"):
        raise BadArgumentError(f"layout: {layout!r}, expected BNSD or BSND")
    return x if layout == "BNSD" else x.swapaxes(1, 2)


def _back(x: Tensor, layout: str) -> Tensor:
    return x if layout == "BNSD" else x.swapaxes(1, 2)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
