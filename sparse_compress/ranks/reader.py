"""W8A8SC checkpoints decoded in software. What is read is checked: a defect is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.reader import CHUNK_ELEMENTS
from ms_quant.formats.opening import ServedModel, static_linear
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.config import load_config
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear
from sparse_compress.codec import CORES
from sparse_compress.layouts import EMBEDDING, HEAD, Layout, find_target, rank_name
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.partition import (
    Shard,
    fused_rows,
    join,
    same_bits,
    shard,
)
from sparse_compress.ranks.pack import deq_floats, plain_quant_bias, unfold_bias
from sparse_compress.ranks.tensors import (
    RankTensors,
    check_input_scale,
    decode_weight,
    open_ranks,
    structure_problems,
)


class SparseModel:
    """A W8A8SC checkpoint as evaluation and generation see it.

    Args:
        directory: the checkpoint.
        layout: what it holds.
        ranks: its ranks, whose structure is right.
        workers: how many threads decode a linear.

    Attributes:
        config: the model's shape.
        format: such as ``"W8A8SC TP2"``.
    """

    def __init__(
        self, directory: Path, layout: Layout, ranks: list[RankTensors], workers: int = CORES
    ):
        self.directory, self.layout, self.ranks = directory, layout, ranks
        self.workers = workers
        self.config = layout.config
        self.format = f"W8A8SC TP{layout.tp}"
        self._groups = {
            f"{block_prefix(index)}{member}": (index, group)
            for index, group, _ in layout.linears()
            for member in group.members
        }
        self._cached: tuple[str, dict[str, QuantizedLinear]] = ("", {})

    def tensor(self, name: str) -> np.ndarray:
        """A float tensor by its Hugging Face name, float32."""
        return self.tensor_float16(name).astype(np.float32)

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The same in pieces: (first row, float32 rows)."""
        for start, rows in self.float16_chunks(name):
            yield start, rows.astype(np.float32)

    def tensor_float16(self, name: str) -> np.ndarray:
        """A float tensor by its Hugging Face name, merged from the ranks.

        Raises:
            MsQuantError: ranks that should hold the same values do not, or the vocabulary's
                padding is not zero.
        """
        path, _, suffix = name.rpartition(".")
        if path in self._groups:
            return self._part_of_fused(path, suffix)
        if name in (EMBEDDING, HEAD):
            return self._vocabulary(name)
        parts = [rank.read(name) for rank in self.ranks]
        whole = tuple(slice(0, size) for size in parts[0].shape)
        return join(parts, [whole] * len(parts), parts[0].shape, name)

    def linear(self, path: str) -> QuantizedLinear | None:
        """The int8 linear at a path, with its bias; None when it is float."""
        if path not in self._groups:
            raise BadFileError(f"{self.directory}: {path!r} is not a linear of the model")
        index, group = self._groups[path]
        fused = f"{block_prefix(index)}{group.fused}"
        if fused not in self.layout.compressed:
            return None
        if self._cached[0] != fused:
            self._cached = ("", {})  # the old one goes before the new one comes
            self._cached = (fused, self.group(index, group))
        return self._cached[1][path.removeprefix(block_prefix(index))]

    phased = False

    def cache_scales(self, index: int) -> None:
        """Keys and values are cached as they are."""

    def group(self, index: int, group: LinearGroup) -> dict[str, QuantizedLinear]:
        """The int8 linears of a compressed group, decoded and merged from the ranks.

        Returns:
            Path relative to the block to the linear.

        Raises:
            MsQuantError: a tile, a scale or a bias is wrong, or ranks disagree.
        """
        fused = f"{block_prefix(index)}{group.fused}"
        coded = [self.decode(rank, fused, group) for rank in range(self.layout.tp)]
        scales = [self._deq_scale(rank, fused) for rank in range(self.layout.tp)]
        linears = {}
        for member in group.members:
            shards = self._shards(group, member)
            rows = fused_rows(group, self.layout.tp)[member]
            shape = self.config.block(index).linears[member].shape
            name = f"{block_prefix(index)}{member}"
            out = [(shard.rows,) for shard in shards]
            both = [(shard.rows, shard.columns) for shard in shards]
            weight = join([part[rows] for part in coded], both, shape, f"{fused}.weight")
            deq = join([part[rows] for part in scales], out, shape[:1], f"{fused}.deq_scale")
            quant_bias = self._fused_bias(f"{fused}.quant_bias", index, group, member)
            offset = self._input_offset(fused, shards, shape[1])
            bias = None
            if self.layout.stores_bias(index, group):
                bias = self.tensor(f"{name}.bias")
            elif group.bias:
                bias = unfold_bias(quant_bias, weight, offset, deq)
                quant_bias = plain_quant_bias(weight, offset)
            scale = self._input_scale(fused, shards, shape[1])
            linears[member] = static_linear(name, weight, deq, quant_bias, scale, offset, bias)
        return linears

    def decode(self, rank: int, fused: str, group: LinearGroup) -> np.ndarray:
        """A rank's fused int8 weight."""
        return decode_weight(self.layout, self.ranks[rank], fused, group, self.workers)

    def _deq_scale(self, rank: int, fused: str) -> np.ndarray:
        name = f"{fused}.deq_scale"
        return deq_floats(self.ranks[rank].read(name), f"{rank_name(rank)}: {name}")

    def _input_scale(self, fused: str, shards: list[Shard], size: int) -> np.ndarray:
        name = f"{fused}.input_scale"
        scale = self._input(name, shards, size)
        check_input_scale(scale, name)
        return scale.astype(np.float32)

    def _input_offset(self, fused: str, shards: list[Shard], size: int) -> np.ndarray:
        name = f"{fused}.input_offset"
        offset = self._input(name, shards, size)
        with np.errstate(invalid="ignore"):
            found = offset.astype(np.int8)
        wrong = int(np.count_nonzero(found != offset))
        if wrong:
            raise BadFileError(f"{name}: {wrong} of {size} values are not those of an int8")
        return found

    def _input(self, name: str, shards: list[Shard], size: int) -> np.ndarray:
        """A tensor over the input channels."""
        parts = [rank.read(name) for rank in self.ranks]
        if not self.layout.target.per_channel_input:
            one = join(parts, [(slice(0, 1),)] * len(parts), (1,), name)
            return np.repeat(one, size)
        return join(parts, [(shard.columns,) for shard in shards], (size,), name)

    def _fused_bias(self, name: str, index: int, group: LinearGroup, member: str) -> np.ndarray:
        """A bias of one linear: of row-parallel ones the first rank has it, the others zeros."""
        parts = [rank.read(name) for rank in self.ranks]
        if group.parallel == "row":
            for rank, part in enumerate(parts[1:], 1):
                if part.any():
                    raise BadFileError(
                        f"{rank_name(rank)}: {name}: holds {np.count_nonzero(part)} values that "
                        "are not 0, expected zeros: ranks add up, and rank_0 holds the bias"
                    )
            return parts[0]
        rows = fused_rows(group, self.layout.tp)[member]
        slices = [(shard.rows,) for shard in self._shards(group, member)]
        size = self.config.block(index).linears[member].shape[:1]
        return join([part[rows] for part in parts], slices, size, name)

    def _part_of_fused(self, path: str, suffix: str) -> np.ndarray:
        index, group = self._groups[path]
        name = f"{block_prefix(index)}{group.fused}.{suffix}"
        member = path.removeprefix(block_prefix(index))
        if suffix == "bias":
            return self._fused_bias(name, index, group, member)
        rows = fused_rows(group, self.layout.tp)[member]
        slices = [(shard.rows, shard.columns) for shard in self._shards(group, member)]
        parts = [rank.read(name)[rows] for rank in self.ranks]
        shape = self.config.block(index).linears[member].shape
        return join(parts, slices, shape, name)

    def float16_chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """A float tensor as :meth:`tensor_float16` gives it, embedding and head in pieces.

        Returns:
            Iterator of (first row, rows).

        Raises:
            MsQuantError: as :meth:`tensor_float16` does; of padding, after the last rows.
        """
        if name not in (EMBEDDING, HEAD):
            yield 0, self.tensor_float16(name)
            return
        if name not in self.layout.tables:
            name = EMBEDDING
        size, padding = self.config.vocab_size, False
        for start, part in self._stored_vocabulary(name):
            rows = part[: max(0, size - start)]
            padding |= bool(part[len(rows) :].any())
            if len(rows):
                yield start, rows
        if name == HEAD and self.config.tied:
            self._check_tied()
        if padding:
            raise BadFileError(f"{name}: rows {size} and on are padding, expected zeros")

    def _stored_vocabulary(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, CHUNK_ELEMENTS // self.config.hidden_size)
        for index, rank in enumerate(self.ranks):
            rows = self.layout.vocab_rows(index)
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                yield start, rank.read_rows(name, start - rows.start, stop - rows.start)

    def _check_tied(self) -> None:
        tables = (self._stored_vocabulary(name) for name in (EMBEDDING, HEAD))
        for (_, first), (_, second) in zip(*tables, strict=True):
            if not same_bits(first, second):
                raise BadFileError(f"{HEAD}: differs from {EMBEDDING}, to which it is tied")

    def _vocabulary(self, name: str) -> np.ndarray:
        table = np.empty((self.config.vocab_size, self.config.hidden_size), FLOAT16)
        for start, rows in self.float16_chunks(name):
            table[start : start + len(rows)] = rows
        return table

    def _shards(self, group: LinearGroup, member: str) -> list[Shard]:
        tp = self.layout.tp
        return [shard(group.linears[member], tp, rank) for rank in range(tp)]


def open_w8a8sc(directory: Path, workers: int = CORES) -> ServedModel | None:
    """Opens a W8A8SC checkpoint of any target.

    Args:
        directory: the checkpoint.
        workers: how many threads decode a linear.

    Returns:
        The model, decoded in software as it is read; None when the directory has no target's
        description.

    Raises:
        MsQuantError: the description, a rank or a tensor is not what it should be.
    """
    directory = Path(directory)
    target = find_target(directory)
    if target is None:
        return None
    layout = target.read(directory, load_config(directory))
    ranks = open_ranks(directory, target, layout.tp)
    problems = structure_problems(layout, ranks)
    if problems:
        raise BadFileError(problems[0])
    return SparseModel(directory, layout, ranks, workers)
