"""The UNZIP codec: int8 weights as the Atlas 300I Duo (Ascend 310P) stores them.

Two backends give the same bytes and the same errors: ``native`` (C++) and ``reference`` (NumPy).
The format is described in ``docs/unzip_format.md``.
"""

from sparse_compress.codec.backends import CORES, backend_name, backend_note
from sparse_compress.codec.format import CodecError
from sparse_compress.codec.matrix import (
    CompressedMatrix,
    TooLongError,
    compress_matrix,
    decompress_matrix,
    encoded_size,
    matrix_info,
    matrix_shape,
)
from sparse_compress.codec.pricing import Price, price
from sparse_compress.codec.tiles import decode_tiles, encode_tiles

__all__ = [
    "CORES",
    "CodecError",
    "CompressedMatrix",
    "Price",
    "TooLongError",
    "backend_name",
    "backend_note",
    "compress_matrix",
    "decode_tiles",
    "decompress_matrix",
    "encode_tiles",
    "encoded_size",
    "matrix_info",
    "matrix_shape",
    "price",
]
