"""Attention by the names and arguments that MindIE-SD gives it, for code that calls it so.

Each takes NumPy arrays, or Tensors of MindSpore, and gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ms_quant.attention import arm as classes
from ms_quant.attention import fa_quant as quantized
from ms_quant.attention import operands as codes
from ms_quant.attention.computing import block_attention
from ms_quant.attention.dense import attention
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.layouts import from_heads_first, operands
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.sparse import attend
from ms_quant.errors import BadArgumentError

PRECISIONS = {"bf16": "", "fp8": "FP8_DYNAMIC", "mix": "MIX", "mxfp4": "MXFP4_DYNAMIC"}
"""Name of MindIE-SD to the kind of quantized operands, "" for those that are given."""
SPARSE_TYPES = ("rf_v1", "rf_v2", "rf_v3", "ada_bsa")
MOST_PAIRS = 1 << 28
"""Of one head, in a mask of pairs of tokens."""


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    head_num: int = 1,
    input_layout: str = "BNSD",
    inner_precise: int = 0,
    sparse_type: str | None = None,
    txt_len: int = 0,
    block_size: int = 128,
    latent_shape_q: Sequence[int] | None = None,
    latent_shape_k: Sequence[int] | None = None,
    keep_sink: bool = True,
    keep_recent: bool = True,
    cdf_threshold: float = 1.0,
    sparsity: float = 0.0,
    video_spans: Sequence[Mapping[str, Any]] | None = None,
    precision: str = "bf16",
) -> Any:
    """Sparse attention, by the signature of MindIE-SD's function.

    Args:
        q, k, v: float Tensors or arrays of four axes in ``input_layout``.
        attn_mask: bool, true for keys that count: (batch, keys) or (batch, 1, 1, keys); without a
            sparse type anything that broadcasts to (batch, heads, queries, keys). Rows of no key
            give zeros.
        scale: of scores, 1 / sqrt(size) when None.
        is_causal: a query sees no later key; without a sparse type only.
        head_num: the heads, or 1 where the shapes say it.
        input_layout: "BNSD" (batch, heads, length, size) or "BSND".
        inner_precise: a choice of the device's kernel, 0 to 4, which changes nothing here.
        sparse_type: "rf_v1" (RainFusion with ARM), "rf_v2", "rf_v3" (RainFusion 2), "ada_bsa",
            or None for dense attention.
        txt_len: leading tokens that are text.
        block_size: tokens of a block; ada_bsa has 128.
        latent_shape_q, latent_shape_k: frames, height and width of the latent after patching,
            equal. Not asked of ada_bsa, nor beside ``video_spans``.
        keep_sink, keep_recent, cdf_threshold: of ada_bsa.
        sparsity: the share of pairs to leave out, 0 to 1.
        video_spans: several clips, {"start": first token, "latent_shape": [frames, height,
            width]} each; with rf_v2 and rf_v3.
        precision: of queries, keys and values: "bf16" (as given), "fp8", "mix" (int8 queries and
            keys, FP8 values) or "mxfp4".

    Returns:
        What ``q`` is, a Tensor of its dtype or a float32 array, of its shape.

    Raises:
        MsQuantError: an argument has no such value or does not go with another, or a value is not
            finite.

    Supported Platforms:
        ``CPU``; arrays are computed on the host wherever they are.

    Examples:
        >>> import numpy as np, ms_quant
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 512, 32), np.float32)
        >>> y = ms_quant.sparse_attention(
        ...     q, k, v, sparse_type="rf_v3", latent_shape_q=(8, 8, 8), latent_shape_k=(8, 8, 8),
        ...     sparsity=0.5,
        ... )
        >>> y.shape
        (1, 2, 512, 32)
    """
    _check_device_options(inner_precise, precision)
    queries, keys, values = operands(_array(q), _array(k), _array(v), input_layout)
    if head_num not in (1, queries.shape[1]):
        raise BadArgumentError(f"head_num: {head_num}, expected {queries.shape[1]} as q has")
    mask = None if attn_mask is None else _array(attn_mask)
    if sparse_type is None:
        out = _dense(queries, keys, values, mask, scale, is_causal, precision)
    else:
        if is_causal:
            raise BadArgumentError(f"is_causal: True with {sparse_type}, expected False")
        rule = _rule(
            sparse_type,
            block_size,
            sparsity=sparsity,
            keep_sink=keep_sink,
            keep_recent=keep_recent,
            cdf_threshold=cdf_threshold,
        )
        shapes = latent_shape_q, latent_shape_k
        grid = _grid(sparse_type, queries.shape[2], txt_len, shapes, video_spans)
        kept = None if mask is None else _of_keys(mask, len(keys), keys.shape[2])
        made = make_mask(rule, queries, keys, grid, scale=scale, kept=kept)
        kind = PRECISIONS[precision]
        prepare = quantized.decoded(kind) if kind else None
        out = attend(queries, keys, values, made, scale=scale, kept=kept, prepare=prepare)
    return _as_given(from_heads_first(out, input_layout), q)


def fa_quant(
    q: Any,
    k: Any,
    v: Any,
    q_rot: Any = None,
    k_rot: Any = None,
    kind: str = "FP8_DYNAMIC",
    layout: str = "BNSD",
) -> Any:
    """Attention of quantized queries, keys and values, as MindIE-SD's ``fa_quant`` computes it.

    Args:
        q, k, v: float Tensors or arrays of four axes in ``layout``, any batch and length.
        q_rot, k_rot: orthogonal (size, size), the same for both, by which queries and keys are
            multiplied before; both or none.
        kind: "FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC", "INT8_DYNAMIC" or "MIX".
        layout: "BNSD" or "BSND".

    Returns:
        What ``q`` is, a Tensor of its dtype or a float32 array, of its shape.

    Raises:
        MsQuantError: an argument has no such value, shapes do not go together, a rotation is not
            orthogonal, or a value is not finite.

    Supported Platforms:
        ``CPU``; arrays are computed on the host wherever they are.

    Examples:
        >>> import numpy as np, ms_quant
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 300, 64), np.float32)
        >>> ms_quant.fa_quant(q, k, v, kind="FP8_DYNAMIC").shape
        (1, 2, 300, 64)
    """
    q_rot, k_rot = (None if x is None else _array(x) for x in (q_rot, k_rot))
    arrays = _array(q), _array(k), _array(v)
    out = quantized.fa_quant(*arrays, q_rot=q_rot, k_rot=k_rot, kind=kind, layout=layout)
    return _as_given(out, q)


def fa_block_quant(
    x: Any, block_size: int, col_block_size: int = codes.COLUMNS, layout: str = "BNSD"
) -> tuple[np.ndarray, np.ndarray]:
    """FP8 codes of blocks of tokens, as MindIE-SD's ``fa_block_quant_preprocess`` makes them.

    Args:
        x: float Tensor or array of four axes in ``layout``.
        block_size: tokens of a block: 128 for queries, 256 for keys and values.
        col_block_size: channels of a block.
        layout: "BNSD" or "BSND".

    Returns:
        uint8 e4m3 codes (batch, heads, length, size) and float32 scales (batch, heads,
        ceil(length / block_size), ceil(size / col_block_size)), arrays, heads first for either
        layout.

    Raises:
        MsQuantError: the layout is unknown, or a value is not finite.

    Examples:
        >>> import numpy as np, ms_quant
        >>> codes, scales = ms_quant.fa_block_quant(np.ones((1, 2, 300, 64), np.float32), 128)
        >>> scales.shape
        (1, 2, 3, 1)
    """
    return codes.fa_block_quant(_array(x), block_size, col_block_size, layout)


def block_mask(
    q: Any,
    k: Any,
    latent_shape: Sequence[int] | None = None,
    *,
    sparse_type: str = "rf_v3",
    sparsity: float = 0.5,
    txt_len: int = 0,
    block_size: int = 128,
    video_spans: Sequence[Mapping[str, Any]] | None = None,
    cdf_threshold: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    input_layout: str = "BNSD",
) -> np.ndarray:
    """What a sparse type keeps.

    Args:
        q, k: float Tensors or arrays of four axes in ``input_layout``.
        latent_shape: frames, height and width of the latent after patching.
        sparse_type, sparsity, txt_len, block_size: as of :func:`sparse_attention`.
        video_spans, cdf_threshold, keep_sink, keep_recent, input_layout: likewise.

    Returns:
        bool (batch or 1, heads, query blocks, key blocks), of tokens in the order of the sparse
        type; of rf_v1 bool (1, heads, tokens, tokens), of tokens as they come.

    Raises:
        MsQuantError: an argument has no such value, or q, k and the latent do not go together.

    Examples:
        >>> import numpy as np, ms_quant
        >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 512, 32), np.float32)
        >>> ms_quant.block_mask(q, k, (8, 8, 8)).shape
        (1, 2, 4, 4)
    """
    queries, keys, _ = operands(_array(q), _array(k), _array(k), input_layout)
    rule = _rule(
        sparse_type,
        block_size,
        sparsity=sparsity,
        keep_sink=keep_sink,
        keep_recent=keep_recent,
        cdf_threshold=cdf_threshold,
    )
    tokens = queries.shape[2]
    grid = _grid(sparse_type, tokens, txt_len, (latent_shape, latent_shape), video_spans)
    if sparse_type == "rf_v1" and tokens * tokens > MOST_PAIRS:
        raise BadArgumentError(
            f"q: {tokens} tokens, expected at most {int(MOST_PAIRS**0.5)} for a mask of pairs"
        )
    mask = make_mask(rule, queries, keys, grid)
    if mask.blocks is not None:
        return mask.blocks.astype(bool)
    return mask.pairs_of_tokens()


def arm(
    q: Any,
    k: Any,
    latent_shape: Sequence[int],
    *,
    txt_len: int = 0,
    mode: str = "best",
    sparsity: float = 0.5,
    input_layout: str = "BNSD",
) -> classes.HeadMasks:
    """Which kind each head is of, by RainFusion's ARM.

    Args:
        q, k: float Tensors or arrays of four axes in ``input_layout``.
        latent_shape: frames, height and width of the latent after patching.
        txt_len: leading tokens that are text.
        mode: "best" (ours), "arm2" (as shipped), "arm3" (as in the paper) or "plus".
        sparsity: the share of pairs that bands leave out.
        input_layout: "BNSD" or "BSND".

    Returns:
        HeadMasks, ``classes`` of the heads ("temporal", "spatial", "textural" or "dense") and
        ``recall``, float64 (heads, 3), the share of a head's probability that the temporal, the
        spatial and the textural mask would keep.

    Raises:
        MsQuantError: an argument has no such value, or q, k and the latent do not go together.

    Examples:
        >>> import numpy as np, ms_quant
        >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 512, 32), np.float32)
        >>> ms_quant.arm(q, k, (8, 8, 8)).classes
        ('dense', 'dense')
    """
    queries, keys, _ = operands(_array(q), _array(k), _array(k), input_layout)
    grid = TokenGrid.of(latent_shape, queries.shape[2], txt_len)
    return classes.arm(queries, keys, grid, mode=mode, sparsity=sparsity)


def _array(x: Any) -> np.ndarray:
    """An array, or a Tensor's values."""
    if not hasattr(x, "asnumpy"):
        return np.asarray(x)
    return np.asarray((x if "bool" in str(x.dtype).lower() else x.float()).asnumpy())


def _as_given(out: np.ndarray, like: Any) -> Any:
    if not hasattr(like, "asnumpy"):
        return out
    return type(like).from_numpy(np.ascontiguousarray(out)).astype(like.dtype)


def _check_device_options(inner_precise: int, precision: str) -> None:
    if inner_precise not in range(5):
        raise BadArgumentError(f"inner_precise: {inner_precise!r}, expected 0 to 4")
    if precision not in PRECISIONS:
        raise BadArgumentError(f"precision: {precision!r}, expected one of {', '.join(PRECISIONS)}")


def _rule(sparse_type: str, block_size: int, **options: Any) -> SparseRule:
    if sparse_type not in SPARSE_TYPES:
        raise BadArgumentError(
            f"sparse_type: {sparse_type!r}, expected one of {', '.join(SPARSE_TYPES)} or None"
        )
    return SparseRule(sparse_type, block_shape=(block_size, block_size), **options)


def _grid(
    sparse_type: str,
    tokens: int,
    text: int,
    shapes: tuple[Sequence[int] | None, Sequence[int] | None],
    spans: Sequence[Mapping[str, Any]] | None,
) -> TokenGrid:
    """Which tokens are video."""
    if spans is not None:
        if sparse_type not in ("rf_v2", "rf_v3") or text or shapes != (None, None):
            raise BadArgumentError(
                f"video_spans: with {sparse_type}, expected rf_v2 or rf_v3 and neither txt_len nor "
                "a latent shape"
            )
        return TokenGrid.of_spans(spans, tokens)
    own, other = shapes
    if own is None and other is None and sparse_type == "ada_bsa":
        return TokenGrid.of((1, 1, max(1, tokens - text)), tokens, text)
    if own is None or other is None or tuple(own) != tuple(other):
        raise BadArgumentError(
            f"latent_shape_q, latent_shape_k: {own} and {other}, expected frames, height and "
            "width, equal for both"
        )
    return TokenGrid.of(own, tokens, text)


def _of_keys(mask: np.ndarray, batch: int, keys: int) -> np.ndarray:
    """A padding mask as bool (batch, keys)."""
    alone = mask.dtype == np.bool_ and mask.ndim in (2, 4) and mask.shape[-1] == keys
    if alone and mask.size == mask.shape[0] * keys and mask.shape[0] in (1, batch):
        return np.array(np.broadcast_to(mask.reshape(-1, keys), (batch, keys)))
    raise BadArgumentError(
        f"attn_mask: {mask.dtype} of shape {mask.shape}, expected bool ({batch}, {keys}) or "
        f"({batch}, 1, 1, {keys}) with a sparse type"
    )


def _dense(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    scale: float | None,
    is_causal: bool,
    precision: str,
) -> np.ndarray:
    kind = PRECISIONS[precision]
    plain = mask is None and not is_causal
    if kind:
        made = quantized.quantize_operands(q, k, v, kind=kind)
        if plain:
            return quantized.attend_quantized(made, scale=scale)
        q, k, v = (part.values() for part in (made.q, made.k, made.v))
    if plain:
        return block_attention(q, k, v, scale=scale)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    if is_causal:
        seen = np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool)
        mask = seen if mask is None else mask & seen
    return attention(q, k, v, scale=scale, mask=mask)
