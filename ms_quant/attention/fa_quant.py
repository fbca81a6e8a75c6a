"""Attention with quantized queries, keys and values ("FA quant"): what a device's kernel computes.

=================  =======================  =======================  ========================
kind               q and k                  v                        source
=================  =======================  =======================  ========================
``FP8_DYNAMIC``    e4m3, blocks of 128 and  e4m3, blocks of 256      MindIE-SD
                   256 tokens x 128         tokens x 128
``MXFP8_DYNAMIC``  32 channels, e4m3        32 tokens, e4m3          MindIE-SD
``MXFP4_DYNAMIC``  32 channels, e2m1        32 tokens, e2m1          MindIE-SD
``INT8``           int8, a scale of each    int8, a scale of each    msModelSlim, FAQuant:
                   head from calibration    head from calibration    static
``INT8_DYNAMIC``   int8 of each token       int8 of each token       msModelSlim: per token
``MIX``            int8, blocks of 128 and  e4m3 of each channel     MindIE-SD, precision
                   256 tokens                                        "mix"
=================  =======================  =======================  ========================

Queries and keys may be rotated before (:mod:`ms_quant.attention.rotation`), values never. Scores
and probabilities are float32. Open, as no page says it: in which precision a device keeps
probabilities (``p_e4m3`` emulates e4m3), and the blocks of ``MIX`` (we take those of FP8_DYNAMIC).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ms_quant.attention import operands as quantized
from ms_quant.attention.computing import block_attention
from ms_quant.attention.dense import attention
from ms_quant.attention.layouts import check_kept, from_heads_first, operands
from ms_quant.attention.operands import COLUMNS, QuantizedOperand
from ms_quant.attention.rotation import check_pair, rotate
from ms_quant.errors import BadArgumentError
from ms_quant.numerics.minifloat import E2M1, E4M3
from ms_quant.numerics.mx_rules import RULES

KINDS = ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC", "INT8", "INT8_DYNAMIC", "MIX")
MX_RULES = {"MXFP8_DYNAMIC": "mxfp8_cann0", "MXFP4_DYNAMIC": "mxfp4_cann0"}
Q_ROWS, KV_ROWS = 128, 256
PADDED_LENGTH = 512

Scales = tuple[ArrayLike, ...]  # of q, k and v
Operands = tuple[QuantizedOperand, QuantizedOperand, QuantizedOperand]
Prepare = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], Operands]
"""Takes q, k, v (batch, heads, tokens, size) and an order, (1 or heads, tokens), or None."""


@dataclass(frozen=True)
class QuantizedAttention:
    """Quantized operands of one attention.

    Attributes:
        kind: of ``KINDS``.
        q, k, v: heads first.
        length, keys: of the queries and keys that were given; with the vendor's padding q, k and v
            are longer.
    """

    kind: str
    q: QuantizedOperand
    k: QuantizedOperand
    v: QuantizedOperand
    length: int
    keys: int


def quantize_operands(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    q_rot: ArrayLike | None = None,
    k_rot: ArrayLike | None = None,
    kind: str = "FP8_DYNAMIC",
    layout: str = "BNSD",
    *,
    scales: Scales | None = None,
    mx_rule: str | None = None,
    vendor_padding: bool = False,
    order: np.ndarray | None = None,
) -> QuantizedAttention:
    """Rotates and quantizes; the arguments are those of :func:`fa_quant`.

    Args:
        order: int64 (1 or heads, tokens), the token at each place, by which codes are stored and
            share scales; without ``vendor_padding``.
    """
    if kind not in KINDS:
        raise BadArgumentError(f"kind: {kind!r}, expected one of {', '.join(KINDS)}")
    _check_options(kind, scales, mx_rule, vendor_padding)
    queries, keys, values = operands(q, k, v, layout)
    check_pair(q_rot, k_rot, queries.shape[3])
    queries, keys = rotate(queries, q_rot), rotate(keys, k_rot)
    length, count = queries.shape[2], keys.shape[2]
    if vendor_padding:
        queries, keys, values = (_padded(x) for x in (queries, keys, values))
    made = _quantize(kind, (queries, keys, values), scales, mx_rule, order)
    return QuantizedAttention(kind, *made, length, count)


def fa_quant(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    q_rot: ArrayLike | None = None,
    k_rot: ArrayLike | None = None,
    kind: str = "FP8_DYNAMIC",
    layout: str = "BNSD",
    *,
    scale: float | None = None,
    kept: np.ndarray | None = None,
    p_e4m3: bool = False,
    scales: Scales | None = None,
    mx_rule: str | None = None,
    vendor_padding: bool = False,
) -> np.ndarray:
    """Attention of quantized queries, keys and values, float32 in the layout given.

    Args:
        q, k, v: float, of four axes in ``layout``; any batch and length.
        q_rot, k_rot: (size, size), orthogonal, both or none.
        kind: of ``KINDS``.
        layout: BNSD or BSND.
        scale: of scores, 1 / sqrt(size) when None.
        kept: bool (batch, keys), false for keys that are padding.
        p_e4m3: emulate probabilities in e4m3.
        scales: of q, k and v, for ``INT8`` alone: (heads,), (heads, 1) or one value each.
        mx_rule: a name of ``mx_rules.RULES`` in place of ``MX_RULES``.
        vendor_padding: for ``MXFP4_DYNAMIC`` alone: MindIE-SD pads the length with zeros to a
            multiple of 512 and has the zero keys take part in the softmax, with scores of 0.

    Raises:
        MsQuantError: an array is not finite or does not go with the others, a rotation is not
            orthogonal, or an option does not go with the kind.
    """
    made = quantize_operands(
        *(q, k, v, q_rot, k_rot, kind, layout),
        scales=scales,
        mx_rule=mx_rule,
        vendor_padding=vendor_padding,
    )
    return from_heads_first(attend_quantized(made, scale=scale, kept=kept, p_e4m3=p_e4m3), layout)


def attend_quantized(
    made: QuantizedAttention,
    *,
    scale: float | None = None,
    kept: np.ndarray | None = None,
    p_e4m3: bool = False,
) -> np.ndarray:
    """Attention over quantized operands, float32 (batch, heads, length, size)."""
    batch, _, keys, _ = made.k.codes.shape
    mask = check_kept(kept, batch, made.keys)
    if mask is not None:  # zero keys of the vendor's padding take part
        mask = np.pad(mask, ((0, 0), (0, keys - made.keys)), constant_values=True)
    if p_e4m3 or made.q.codes.shape[2] != made.length:
        q, k, v = (part.values() for part in (made.q, made.k, made.v))
        return attention(q[:, :, : made.length], k, v, scale=scale, kept=mask, p_e4m3=p_e4m3)
    return block_attention(made.q, made.k, made.v, scale=scale, kept=mask)


def decoded(
    kind: str,
    q_rot: ArrayLike | None = None,
    k_rot: ArrayLike | None = None,
    *,
    scales: Scales | None = None,
    mx_rule: str | None = None,
) -> Prepare:
    """What sparse attention is given as ``prepare`` to compute over quantized operands.

    Tokens are quantized in the order that a head has them in, as rf_v3 does: FP8's blocks are then
    those of the mask. The arguments are those of :func:`fa_quant`.
    """

    def prepare(q: np.ndarray, k: np.ndarray, v: np.ndarray, order: np.ndarray | None) -> Operands:
        given = q, k, v, q_rot, k_rot
        made = quantize_operands(*given, kind, scales=scales, mx_rule=mx_rule, order=order)
        return made.q, made.k, made.v

    return prepare


def _quantize(
    kind: str,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    scales: Scales | None,
    mx_rule: str | None,
    order: np.ndarray | None,
) -> Operands:
    q, k, v = arrays
    size = q.shape[3]
    if kind == "FP8_DYNAMIC":
        return (
            quantized.fp8_blocks(q, (Q_ROWS, COLUMNS), order),
            quantized.fp8_blocks(k, (KV_ROWS, COLUMNS), order),
            quantized.fp8_blocks(v, (KV_ROWS, COLUMNS), order),
        )
    if kind in MX_RULES:
        rule = RULES[mx_rule or MX_RULES[kind]]
        return (
            quantized.quantize_mx(q, rule, False, "q", order),
            quantized.quantize_mx(k, rule, False, "k", order),
            quantized.quantize_mx(v, rule, True, "v", order),
        )
    if kind == "INT8":
        assert scales is not None
        made = [
            quantized.int8_per_head(x, s, f"scales of {n}", order)
            for n, x, s in zip("qkv", arrays, scales, strict=True)
        ]
        return made[0], made[1], made[2]
    if kind == "INT8_DYNAMIC":
        token = (1, size)
        return (
            quantized.int8_blocks(q, token, order),
            quantized.int8_blocks(k, token, order),
            quantized.int8_blocks(v, token, order),
        )
    return (
        quantized.int8_blocks(q, (Q_ROWS, size), order),
        quantized.int8_blocks(k, (KV_ROWS, size), order),
        quantized.fp8_per_channel(v, order),
    )


def _check_options(
    kind: str, scales: Scales | None, mx_rule: str | None, vendor_padding: bool
) -> None:
    if (scales is not None) != (kind == "INT8"):
        given = "given" if scales is not None else "not given"
        raise BadArgumentError(f"scales: {given} for {kind}, expected them for INT8 alone")
    if scales is not None and len(scales) != 3:
        raise BadArgumentError(f"scales: {len(scales)}, expected three: of q, k and v")
    if vendor_padding and kind != "MXFP4_DYNAMIC":
        raise BadArgumentError(f"vendor_padding: with {kind}, expected MXFP4_DYNAMIC")
    if mx_rule is None:
        return
    element = {"MXFP8_DYNAMIC": E4M3, "MXFP4_DYNAMIC": E2M1}.get(kind)
    allowed = [name for name, rule in RULES.items() if rule.element is element]
    if mx_rule not in allowed:
        raise BadArgumentError(
            f"mx_rule: {mx_rule!r} with {kind}, expected {' or '.join(allowed) or 'none'}"
        )


def _padded(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % PADDED_LENGTH), (0, 0)))
