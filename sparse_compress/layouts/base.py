"""What every target's layout shares: the tensors of a rank, and what a target may decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms import has, is_known
from ms_quant.errors import BadArgumentError, UnsupportedError
from ms_quant.files.writer import shard_names
from ms_quant.formats.golden_stick import format as golden_stick
from ms_quant.models.block_spec import BlockSpec, LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from sparse_compress.codec.fractal import most_bytes, tile_count
from sparse_compress.layouts.fp16 import FLOAT16
from sparse_compress.layouts.partition import VOCAB_MULTIPLE, fused_shape, vocab_rows

MAX_DESCRIPTION_BYTES = 256 << 20
MAX_RANKS = 1024
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
INDEX_RECORD = 8
STORE_GRAIN = 128

Length = Callable[[int, str], int]
"""Gives the length of a coded tensor from its rank and name."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a rank must be.

    Attributes:
        dtype: its type.
        shape: its shape; None for coded weights, whose length depends on their content.
        most: the largest length of a coded weight.
    """

    dtype: np.dtype
    shape: tuple[int, ...] | None
    most: int = 0

    def problem(self, dtype: np.dtype, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a tensor of this type and shape, or None."""
        found = f"found {dtype} {list(shape)}"
        if self.shape is not None:
            if (dtype, shape) == (self.dtype, self.shape):
                return None
            return f"{found}, expected {self.dtype} {list(self.shape)}"
        good = dtype == self.dtype and len(shape) == 1 and 0 < shape[0] <= self.most
        if good and shape[0] % STORE_GRAIN == 0:
            return None
        return (
            f"{found}, expected {self.dtype} of one dimension, a multiple of {STORE_GRAIN} up to "
            f"{self.most}"
        )


@dataclass(frozen=True)
class Target:
    """How one runtime wants a W8A8SC checkpoint. Each target is one module.

    Attributes:
        name: what ``--target`` calls it.
        runtime: who serves it, with the options to give.
        claim: how the sentence about families begins that are not among ``families``.
        families: those that the runtime is known to serve.
        description: name of the description file.
        ranks: glob of what holds the ranks' tensors.
        rank_path: path of a rank's directory, or of its file where it has only one.
        one_file: whether a rank is one file; otherwise a directory, with a file for each block.
        per_channel_input: whether ``input_scale`` and ``input_offset`` have a value for each
            input channel, or a single one.
        info: whether a compressed linear has the tensor ``info``.
        refusal: why a model cannot be written for so many ranks, or None.
        describe: the content of the description file.
        found: whether a directory has a description of this target.
        read: the layout that a directory's description states.
        fused: whether linears that read the same input are one, as the family table fuses them.
        vocab_multiple: the vocabulary is padded with zero rows to a multiple of this.
        offset_dtype: type of ``input_offset``.
        folds_bias: whether the bias of a compressed linear is part of ``quant_bias``.
        stores_tied_head: whether a head that is tied to the embedding is stored as well.
    """

    name: str
    runtime: str
    claim: str
    families: tuple[str, ...]
    description: str
    ranks: str
    rank_path: Callable[[int], str]
    one_file: bool
    per_channel_input: bool
    info: bool
    refusal: Callable[[ModelConfig, int], str | None]
    describe: Callable[[Layout, Length], dict[str, Any]]
    found: Callable[[Path], bool]
    read: Callable[[Path, ModelConfig], Layout]
    fused: bool = True
    vocab_multiple: int = VOCAB_MULTIPLE
    offset_dtype: np.dtype = INT8
    folds_bias: bool = False
    stores_tied_head: bool = False

    def check(self, config: ModelConfig, tp: int, algorithm: str) -> None:
        """Refuses what this target cannot hold.

        Args:
            config: the model.
            tp: how many ranks there are.
            algorithm: name of the quantization algorithm.

        Raises:
            MsQuantError: names the target and the reason.
        """
        if is_known(algorithm) and has(algorithm, "moves_codes"):
            raise BadArgumentError(
                f"algorithm {algorithm} chooses codes or scales itself, which sparse compression "
                "does, expected minmax, smoothquant, osl, awq or clip"
            )
        smooths = is_known(algorithm) and has(algorithm, "smooths")
        if smooths and not self.per_channel_input:
            raise UnsupportedError(
                f"target {self.name} holds one input_scale for all channels, so it has no place "
                f"for the smoothing of algorithm {algorithm}, expected minmax"
            )
        reason = self.refusal(config, tp)
        if reason:
            raise UnsupportedError(f"target {self.name} cannot hold this model: {reason}")

    def not_served_by(self, family: str) -> list[str]:
        """Why the runtime is not known to load a family, in sentences."""
        if family in self.families:
            return []
        if not self.families:
            return [self.claim]
        return [f"{self.claim} only for {' and '.join(self.families)}, not {family}"]

    def groups(self, block: BlockSpec) -> tuple[LinearGroup, ...]:
        """The linears of a block as they are stored. A linear that is not fused keeps the name of
        its group, by which calibration results go."""
        if self.fused:
            return block.groups
        return tuple(group.only(member) for group in block.groups for member in group.members)

    def linears(self, config: ModelConfig) -> Iterator[tuple[int, LinearGroup, str]]:
        """(block, group, path) of every linear as it is stored, in model order."""
        for block in config.blocks:
            for group in self.groups(block):
                yield block.index, group, f"{block_prefix(block.index)}{group.fused}"

    def rank_files(self, config: ModelConfig, rank: int) -> list[str]:
        """Paths of a rank's files."""
        if self.one_file:
            return [self.rank_path(rank)]
        return block_files(config, self.rank_path(rank))

    def linear_specs(self, n: int, k: int) -> dict[str, TensorSpec]:
        """Suffix to specification of a compressed linear's tensors on a rank, less its bias."""
        channels = k if self.per_channel_input else 1
        specs = {
            "weight": TensorSpec(INT8, None, most_bytes(n, k)),
            "index": TensorSpec(INT8, (INDEX_RECORD * tile_count(n, k),)),
            "deq_scale": TensorSpec(INT64, (n,)),
            "quant_bias": TensorSpec(INT32, (n,)),
            "input_scale": TensorSpec(FLOAT16, (channels,)),
            "input_offset": TensorSpec(self.offset_dtype, (channels,)),
        }
        return {**specs, "info": TensorSpec(INT64, (5,))} if self.info else specs


@dataclass(frozen=True)
class Layout:
    """Which tensors a checkpoint holds.

    Attributes:
        config: the model.
        tp: how many ranks there are.
        compressed: fused paths of the compressed linears, such as
            ``"model.layers.0.self_attn.qkv_proj"``.
        target: whom it is for.
    """

    config: ModelConfig
    tp: int
    compressed: frozenset[str]
    target: Target

    def linears(self) -> Iterator[tuple[int, LinearGroup, str]]:
        """(block, group, fused path) of every fused linear, in model order."""
        return self.target.linears(self.config)

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        """The linears of a block as they are stored."""
        return self.target.groups(self.config.block(index))

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables over the vocabulary that are stored."""
        if self.config.tied and not self.target.stores_tied_head:
            return (EMBEDDING,)
        return EMBEDDING, HEAD

    def table_source(self, name: str) -> str:
        """The source's name of a table."""
        return EMBEDDING if name == HEAD and self.config.tied else name

    def vocab_rows(self, rank: int) -> slice:
        """The rows of the tables that a rank holds; those after the vocabulary are zero."""
        return vocab_rows(self.config, self.tp, rank, self.target.vocab_multiple)

    def stores_bias(self, index: int, group: LinearGroup) -> bool:
        """Whether a group has a bias that is a tensor of its own."""
        folded = self.target.folds_bias and (
            f"{block_prefix(index)}{group.fused}" in self.compressed
        )
        return group.bias and not folded

    def norms(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name to shape of the tensors of a block that belong to no group."""
        return {
            f"{block_prefix(index)}{name}": shape
            for name, shape in self.config.block(index).loose_tensors.items()
        }

    def float_names(self) -> list[str]:
        """Hugging Face names of the tensors that become float16, in model order."""
        suffixes = ("weight", "bias") if self.target.folds_bias else ("weight",)
        coded = {
            f"{block_prefix(index)}{member}.{suffix}"
            for index, group, fused in self.linears()
            if fused in self.compressed
            for member in group.members
            for suffix in suffixes
        }
        return [name for name in self.config.parameter_shapes() if name not in coded]

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a rank by its runtime name. All ranks hold the same names and shapes,
        but for the length of coded weights."""
        specs: dict[str, TensorSpec] = {}
        for index in range(self.config.num_layers):
            specs.update(self.block_tensors(index))
        rows, hidden = self.vocab_rows(0), self.config.hidden_size
        specs[NORM] = TensorSpec(FLOAT16, (hidden,))
        for name in self.tables:
            specs[name] = TensorSpec(FLOAT16, (rows.stop, hidden))
        return specs

    def block_tensors(self, index: int) -> dict[str, TensorSpec]:
        """The tensors of one block on a rank."""
        specs = {name: TensorSpec(FLOAT16, shape) for name, shape in self.norms(index).items()}
        for group in self.groups(index):
            fused = f"{block_prefix(index)}{group.fused}"
            n, k = fused_shape(group, self.tp)
            if fused in self.compressed:
                found = self.target.linear_specs(n, k)
                specs.update({f"{fused}.{suffix}": spec for suffix, spec in found.items()})
            else:
                specs[f"{fused}.weight"] = TensorSpec(FLOAT16, (n, k))
            if self.stores_bias(index, group):
                specs[f"{fused}.bias"] = TensorSpec(FLOAT16, (n,))
        return specs


def rank_name(rank: int) -> str:
    """What messages call a rank, and the directory of its blocks."""
    return f"rank_{rank}"


def block_files(config: ModelConfig, directory: str) -> list[str]:
    """Paths of the files of a rank's directory: one for each block, the last for the rest."""
    return [f"{directory}/{name}" for name in shard_names("model", config.num_layers + 1)]


def proof_file(index: int) -> str:
    """Path of a block's proof. Its suffix keeps loaders from taking it for weights."""
    return f"proof/block-{index:05d}.proof"


def model_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the output, the same for every target."""
    return golden_stick.model_config(config, FLOAT16)
