"""The tensors of one rank, made from a finished job and the source: slice, fuse, compress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.files.writer import TensorPlan
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, folded_bias
from sparse_compress.codec import CORES, TooLongError, compress_matrix
from sparse_compress.codec.fractal import TILE_ROWS
from sparse_compress.layouts import INT64, NORM, Layout
from sparse_compress.layouts.fp16 import FLOAT16, Floats, to_float16
from sparse_compress.layouts.partition import fused_shape, shard
from sparse_compress.ranks.staging import Arrays, Tensors


def deq_bits(scale: np.ndarray) -> np.ndarray:
    """float32 scales as the runtime reads them: their bits as int32, widened to int64."""
    return scale.astype(np.float32, copy=False).view(np.int32).astype(INT64)


def deq_floats(bits: np.ndarray, name: str) -> np.ndarray:
    """The float32 scales that int64 values stand for.

    Raises:
        MsQuantError: a value is not the bits of a positive, finite, normal float32.
    """
    low, high = (int(np.float32(x).view(np.int32)) for x in (np.finfo("f4").tiny, np.inf))
    wrong = int(np.count_nonzero((bits < low) | (bits >= high)))
    if wrong:
        raise MsQuantError(
            f"{name}: {wrong} of {bits.size} values are not the bits of a positive finite float32"
        )
    return bits.astype(np.int32).view(np.float32)


def plain_quant_bias(weight: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """``quant_bias`` of a linear without a bias, int32 (n,)."""
    return (-int(offset[0]) * weight.sum(axis=1, dtype=np.int64)).astype(np.int32)


def unfold_bias(
    quant_bias: np.ndarray, weight: np.ndarray, offset: np.ndarray, deq_scale: np.ndarray
) -> np.ndarray:
    """The bias that :func:`folded_bias` left of a float bias: float32 (n,)."""
    units = quant_bias.astype(np.float64) - plain_quant_bias(weight, offset)
    return (units * deq_scale).astype(np.float32)


class Linears(Protocol):
    """Where the int8 linears come from."""

    def linear(self, index: int, path: str) -> QuantizedLinear:
        """The linear of a block at a path relative to it."""


@dataclass(frozen=True)
class Packer:
    """Makes the tensors of a rank's files. In memory are those of one file and one linear.

    Attributes:
        layout: what the output holds.
        checkpoint: the source, for what stays float.
        job: the finished int8 linears.
        workers: how many threads code a linear.
    """

    layout: Layout
    checkpoint: Floats
    job: Linears
    workers: int = CORES

    def block(self, rank: int, index: int) -> Arrays:
        """The tensors of a block, by runtime name."""
        tensors = {name: self._float16(name) for name in self.layout.norms(index)}
        for group in self.layout.groups(index):
            fused = f"{block_prefix(index)}{group.fused}"
            if fused in self.layout.compressed:
                tensors.update(self._compressed(rank, index, group))
            else:
                tensors[f"{fused}.weight"] = self._float_weight(rank, index, group)
            if self.layout.stores_bias(index, group):
                tensors[f"{fused}.bias"] = self._bias(rank, index, group)
        return tensors

    def rest(self, rank: int) -> Tensors:
        """The embedding, the last norm and the head. Tables are read as they are written."""
        norm = self._float16(NORM)
        tensors: Tensors = {NORM: (TensorPlan(NORM, norm.dtype, norm.shape), lambda: norm)}
        rows = self.layout.vocab_rows(rank)
        shape = (rows.stop - rows.start, self.layout.config.hidden_size)
        for name in self.layout.tables:
            plan = TensorPlan(name, FLOAT16, shape)
            tensors[name] = plan, partial(self._table, self.layout.table_source(name), rows)
        return tensors

    def _table(self, name: str, rows: slice) -> Iterator[np.ndarray]:
        """Rows of a table, those after its end zero, in pieces."""
        count, width = self.checkpoint.info(name).shape
        found = slice(min(rows.start, count), min(rows.stop, count))
        for _, chunk in self.checkpoint.float_chunks(name, found):
            yield to_float16(chunk.astype(np.float32, copy=False), name)
        missing = rows.stop - rows.start - (found.stop - found.start)
        yield np.zeros((missing, width), FLOAT16)

    def _float16(self, name: str) -> np.ndarray:
        return to_float16(self.checkpoint.read_float32(name), name)

    def _float_weight(self, rank: int, index: int, group: LinearGroup) -> np.ndarray:
        parts = []
        for member in group.members:
            where = shard(group.linears[member], self.layout.tp, rank)
            weight = self._float16(f"{block_prefix(index)}{member}.weight")
            parts.append(weight[where.rows, where.columns])
        return np.concatenate(parts)

    def _bias(self, rank: int, index: int, group: LinearGroup) -> np.ndarray:
        parts = []
        for member in group.members:
            where = shard(group.linears[member], self.layout.tp, rank)
            parts.append(self._float16(f"{block_prefix(index)}{member}.bias")[where.rows])
        return _once(np.concatenate(parts), rank, group)

    def too_long(self, rank: int, index: int, group: LinearGroup) -> str | None:
        """Why a rank's weight cannot be stored compressed, if it codes so badly, or None.

        The last tile of a weight whose rows are not a multiple of 128 holds padding. If that tile
        does not compress, the whole may be longer than the runtimes accept.
        """
        n, _ = fused_shape(group, self.layout.tp)
        if n % TILE_ROWS == 0:
            return None
        try:
            compress_matrix(self._int8_weight(rank, index, group), threads=self.workers)
        except TooLongError as error:
            return str(error)
        return None

    def _int8_weight(self, rank: int, index: int, group: LinearGroup) -> np.ndarray:
        parts = []
        for member in group.members:
            where = shard(group.linears[member], self.layout.tp, rank)
            weight = self.job.linear(index, member).weight
            parts.append(weight[where.rows, where.columns])
        return np.concatenate(parts)

    def _compressed(self, rank: int, index: int, group: LinearGroup) -> Arrays:
        weights, scales, biases = [], [], []
        for member in group.members:
            where = shard(group.linears[member], self.layout.tp, rank)
            linear = self.job.linear(index, member)
            weights.append(linear.weight[where.rows, where.columns])
            scales.append(linear.deq_scale[where.rows])
            biases.append(
                self._quant_bias(linear, f"{block_prefix(index)}{member}", group)[where.rows]
            )
        fused = f"{block_prefix(index)}{group.fused}"
        weight = np.concatenate(weights)
        coded, tiles, info = compress_matrix(weight, threads=self.workers)
        return {
            f"{fused}.weight": coded,
            f"{fused}.index": tiles,
            f"{fused}.deq_scale": deq_bits(np.concatenate(scales)),
            f"{fused}.quant_bias": _once(np.concatenate(biases), rank, group),
            **self._input(fused, linear.static, where.columns),
            **({f"{fused}.info": info} if self.layout.target.info else {}),
        }

    def _quant_bias(self, linear: QuantizedLinear, path: str, group: LinearGroup) -> np.ndarray:
        if not (self.layout.target.folds_bias and group.bias):
            return linear.quant_bias
        bias = self.checkpoint.read_float32(f"{path}.bias")
        return folded_bias(replace(linear, bias=bias), path)

    def _input(self, fused: str, activation: StaticActivation, columns: slice) -> Arrays:
        """How a rank's input is quantized: for each channel, or by one value for all."""
        scale = to_float16(activation.input_scale, fused)
        if self.layout.target.per_channel_input:
            scale = scale[columns]
        elif (scale == scale[0]).all():
            scale = scale[:1]
        else:
            raise MsQuantError(
                f"{fused}.input_scale: differs between channels, expected one value as target "
                f"{self.layout.target.name} holds"
            )
        offset = np.full(scale.shape, activation.offset, self.layout.target.offset_dtype)
        return {f"{fused}.input_scale": scale, f"{fused}.input_offset": offset}


def _once(bias: np.ndarray, rank: int, group: LinearGroup) -> np.ndarray:
    """Ranks add up the outputs of row-parallel linears: only the first may add the bias."""
    return np.zeros_like(bias) if rank and group.parallel == "row" else bias
