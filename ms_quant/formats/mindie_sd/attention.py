"""Quantized attention in the mindie-sd format: its types, and the tensors of each.

=================  ==============================  ==============================================
type               computed as                     tensors of attention ``X``
=================  ==============================  ==============================================
FP8_DYNAMIC        the kind of that name           ``X.q_rot``, ``X.k_rot``
MXFP8_DYNAMIC      the kind of that name           ``X.q_rot``, ``X.k_rot``
MXFP4_DYNAMIC      the kind of that name           ``X.q_rot``, ``X.k_rot``, or neither
INT8_DYNAMIC       the kind of that name           ``X.q_rot``, ``X.k_rot``, or neither
FAQUANT, FAKQUANT  INT8, static, by head           ``X.fa_q.scale``, ``fa_k``, ``fa_v``, and zero
                                                   points that are 0
=================  ==============================  ==============================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ms_quant.attention.fa_quant import Scales
from ms_quant.attention.rotation import check_pair
from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.files.reader import MODEL_CODES
from ms_quant.formats.mindie_sd.attention_types import ATTENTION_TYPES
from ms_quant.formats.mindie_sd.reading import Tensors

ROTATED = ("FP8_DYNAMIC", "MXFP8_DYNAMIC")
OPERANDS = ("fa_q", "fa_k", "fa_v")


@dataclass(frozen=True)
class StoredAttention:
    """What a file says of one attention.

    Attributes:
        kind: of ``ms_quant.attention.fa_quant.KINDS``.
        rotations: q_rot and k_rot, float32; None where there are none.
        scales: of queries, keys and values, float32; None where they are dynamic.
    """

    kind: str
    rotations: tuple[np.ndarray, np.ndarray] | None = None
    scales: Scales | None = None


def read_attention(
    tensors: Tensors, path: str, type: str, heads: int | None, head_size: int | None
) -> StoredAttention:
    """Reads the tensors of an attention.

    Args:
        tensors: of the file.
        path: of the attention.
        type: of ``ATTENTION_TYPES``.
        heads, head_size: of the network's; None where it does not say them.

    Raises:
        MsQuantError: a tensor is missing, or has a wrong type, shape or value; names it.
    """
    kind = ATTENTION_TYPES[type]
    if kind == "INT8":
        q, k, v = (_scale(tensors, path, name, heads, type) for name in OPERANDS)
        return StoredAttention(kind, None, (q, k, v))
    names = [f"{path}.q_rot", f"{path}.k_rot"]
    if type not in ROTATED and not any(name in tensors.names for name in names):
        return StoredAttention(kind)
    size = head_size or (tensors.shape(names[0]) or (0,))[0]
    q_rot, k_rot = (tensors.read(name, MODEL_CODES, (size, size), type) for name in names)
    try:
        check_pair(q_rot, k_rot, size)
    except MsQuantError as error:
        raise BadFileError(f"{tensors.checkpoint.place(names[0])}: {error}") from None
    return StoredAttention(kind, (q_rot, k_rot))


def _scale(tensors: Tensors, path: str, name: str, heads: int | None, type: str) -> np.ndarray:
    found, stored = tensors.shape(f"{path}.{name}.scale"), f"{path}.{name}.scale"
    count = heads or (found or (1,))[0]
    allowed = [(count, 1), (count,), (1, 1), (1,)]
    scale = tensors.read(stored, MODEL_CODES, found if found in allowed else allowed[0], type)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise BadFileError(
            f"{tensors.checkpoint.place(stored)}: a scale is not positive and finite, expected "
            "positive finite ones"
        )
    offset = f"{path}.{name}.offset"
    if offset in tensors.names:
        zero = tensors.read(offset, (*MODEL_CODES, "I8"), tensors.shape(offset) or (), type)
        if np.asarray(zero, np.float32).any():
            raise BadFileError(
                f"{tensors.checkpoint.place(offset)}: is not 0, expected symmetric codes"
            )
    return scale
