"""The vllm-mindspore W8A8SC layout: files, fused runtime names, tensors and the description.

    config.json, tokenizer files, quant_model_description_w8a8sc.json, ms_quant.json
    rank_K/model-0000I-of-0000N.safetensors   one file for each block, the last for the rest
    proof/block-0000I.proof                   what recomputing the int8 weights needs

docs/w8a8sc.md says what is known of it and what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.checkpoint import golden_stick
from ms_quant.checkpoint.writer import shard_names
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.strict_json import read_json
from sparse_compress.fp16 import FLOAT16
from sparse_compress.fractal import COLUMNS, ROWS, tile_count
from sparse_compress.partition import fused_shape, padded_vocab

DESCRIPTION = "quant_model_description_w8a8sc.json"
DEVICE = "310P"
KIND = "W8A8S"
MAX_DESCRIPTION_BYTES = 256 << 20
MAX_RANKS = 1024
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
INDEX_RECORD = 8
STORE_GRAIN = 128


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
class Layout:
    """Which tensors a checkpoint holds.

    Attributes:
        config: the model.
        tp: how many ranks there are.
        compressed: fused paths of the compressed linears, such as
            ``"model.layers.0.self_attn.qkv_proj"``.
    """

    config: ModelConfig
    tp: int
    compressed: frozenset[str]

    def linears(self) -> Iterator[tuple[int, LinearGroup, str]]:
        """(block, group, fused path) of every fused linear, in model order."""
        for index in range(self.config.num_layers):
            for group in self.config.family.groups:
                yield index, group, f"{block_prefix(index)}{group.fused}"

    def has_bias(self, group: LinearGroup) -> bool:
        """Whether the linears of a group have a bias."""
        return f"{group.members[0]}.bias" in self.config.block_shapes()

    def norms(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name to shape of the tensors of a block that belong to no linear."""
        return {
            f"{block_prefix(index)}{name}": shape
            for name, shape in self.config.block_shapes().items()
            if name.rpartition(".")[0] not in self.config.linear_shapes()
        }

    def float_names(self) -> list[str]:
        """Hugging Face names of the tensors that become float16, in model order."""
        coded = {
            f"{block_prefix(index)}{member}.weight"
            for index, group, fused in self.linears()
            if fused in self.compressed
            for member in group.members
        }
        return [name for name in self.config.parameter_shapes() if name not in coded]

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a rank by its runtime name. All ranks hold the same names and shapes,
        but for the length of coded weights."""
        specs: dict[str, TensorSpec] = {}
        for index in range(self.config.num_layers):
            specs.update(self.block_tensors(index))
        rows = padded_vocab(self.config) // self.tp
        hidden = self.config.hidden_size
        specs[EMBEDDING] = TensorSpec(FLOAT16, (rows, hidden))
        specs["model.norm.weight"] = TensorSpec(FLOAT16, (hidden,))
        if not self.config.tied:
            specs[HEAD] = TensorSpec(FLOAT16, (rows, hidden))
        return specs

    def block_tensors(self, index: int) -> dict[str, TensorSpec]:
        """The tensors of one block on a rank."""
        specs = {name: TensorSpec(FLOAT16, shape) for name, shape in self.norms(index).items()}
        for group in self.config.family.groups:
            fused = f"{block_prefix(index)}{group.fused}"
            n, k = fused_shape(self.config, self.tp, group)
            if fused in self.compressed:
                found = linear_specs(n, k)
                specs.update({f"{fused}.{suffix}": spec for suffix, spec in found.items()})
            else:
                specs[f"{fused}.weight"] = TensorSpec(FLOAT16, (n, k))
            if self.has_bias(group):
                specs[f"{fused}.bias"] = TensorSpec(FLOAT16, (n,))
        return specs


def linear_specs(n: int, k: int) -> dict[str, TensorSpec]:
    """Suffix to specification of a compressed linear's tensors on a rank, without its bias."""
    return {
        "weight": TensorSpec(INT8, None, -(-n // ROWS) * ROWS * (-(-k // COLUMNS) * COLUMNS)),
        "index": TensorSpec(INT8, (INDEX_RECORD * tile_count(n, k),)),
        "deq_scale": TensorSpec(INT64, (n,)),
        "quant_bias": TensorSpec(INT32, (n,)),
        "input_scale": TensorSpec(FLOAT16, (k,)),
        "input_offset": TensorSpec(INT8, (k,)),
    }


def rank_name(rank: int) -> str:
    return f"rank_{rank}"


def rank_files(config: ModelConfig, rank: int) -> list[str]:
    """Paths of a rank's files: one for each block, and the last for the rest."""
    names = shard_names("model", config.num_layers + 1)
    return [f"{rank_name(rank)}/{name}" for name in names]


def proof_file(index: int) -> str:
    """Path of a block's proof. Its suffix keeps loaders from taking it for weights."""
    return f"proof/block-{index:05d}.proof"


def model_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the output."""
    return golden_stick.model_config(config.raw, FLOAT16)


def description(layout: Layout, length: Callable[[int, str], int]) -> dict[str, Any]:
    """The description of a checkpoint.

    Args:
        layout: the checkpoint.
        length: gives the length of a coded tensor from its rank and name.

    Returns:
        JSON; a linear that its rank's entry does not list is read as float16.
    """
    result: dict[str, Any] = {"device_type": DEVICE}
    for rank in range(layout.tp):
        entries: dict[str, Any] = {}
        for _, _, fused in layout.linears():
            if fused in layout.compressed:
                entries[f"{fused}.weight"] = KIND
                for suffix in ("weight", "index"):
                    name = f"{fused}.{suffix}"
                    entries[f"{name}.shape"] = [length(rank, name)]
        result[rank_name(rank)] = entries
    return result


def read_layout(directory: Path, config: ModelConfig) -> Layout:
    """The layout that a directory's description states.

    Args:
        directory: the checkpoint.
        config: its model.

    Raises:
        MsQuantError: the description is malformed, or its ranks differ.
    """
    path = directory / DESCRIPTION
    value = read_json(path, MAX_DESCRIPTION_BYTES)
    if value.get("device_type") != DEVICE:
        raise MsQuantError(
            f"{path}: device_type is {value.get('device_type')!r}, expected {DEVICE!r}"
        )
    ranks = {key: entry for key, entry in value.items() if key != "device_type"}
    if not ranks or len(ranks) > MAX_RANKS or set(ranks) != set(map(rank_name, range(len(ranks)))):
        raise MsQuantError(f"{path}: describes {sorted(ranks)!r:.80}, expected rank_0, rank_1, ...")
    compressed = [_compressed(entry, f"{path}: {key}") for key, entry in sorted(ranks.items())]
    for key, found in zip(sorted(ranks), compressed, strict=True):
        if found != compressed[0]:
            name = min(found ^ compressed[0])
            raise MsQuantError(f"{path}: {key} and rank_0 differ in {name}, expected the same kind")
    layout = Layout(config, len(ranks), compressed[0])
    unknown = layout.compressed - {fused for _, _, fused in layout.linears()}
    if unknown:
        raise MsQuantError(f"{path}: names {min(unknown)}, expected a linear of the model")
    return layout


def _compressed(entry: Any, where: str) -> frozenset[str]:
    """Fused paths that a rank's entry lists, each with both shapes."""
    if not isinstance(entry, dict):
        raise MsQuantError(f"{where} is {entry!r:.80}, expected an object")
    found = []
    for key, value in entry.items():
        if key.endswith(".shape"):
            good = isinstance(value, list) and len(value) == 1 and type(value[0]) is int
            if not good:
                raise MsQuantError(f"{where}: {key} is {value!r:.80}, expected one number")
        elif value == KIND and key.endswith(".weight"):
            found.append(key.removesuffix(".weight"))
        else:
            raise MsQuantError(f"{where}: {key} is {value!r:.80}, expected {KIND!r}")
    expected = {f"{path}.{suffix}" for path in found for suffix in ("weight.shape", "index.shape")}
    wrong = expected ^ {key for key in entry if key.endswith(".shape")}
    if wrong:
        name = min(wrong)
        hint = "is missing, the runtime reads the linear as FLOAT without it"
        raise MsQuantError(f"{where}: {name} {hint if name in expected else 'has no linear'}")
    return frozenset(found)
