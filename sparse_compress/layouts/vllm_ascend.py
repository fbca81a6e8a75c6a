"""The layout of vllm-ascend.

    config.json, tokenizer files, quant_model_description.json, ms_quant.json
    model-rank-R-part-0.safetensors           one file for each rank
    proof/block-0000I.proof                   what recomputing the int8 weights needs

docs/w8a8sc.md says what is known of it and what is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.strict_json import read_json
from sparse_compress.layouts.base import (
    MAX_DESCRIPTION_BYTES,
    MAX_RANKS,
    Layout,
    Length,
    Target,
    fused_linears,
    has_bias,
)
from sparse_compress.partition import VOCAB_MULTIPLE

DESCRIPTION = "quant_model_description.json"
CODED, PARAMETER, FLOAT = "W8A8SC", "W8A8S", "FLOAT"
CODED_SUFFIXES = ("weight", "index", "info")
VERSION = "1.0.0"
RANKS = "model-rank-*"


def rank_file(rank: int) -> str:
    return f"model-rank-{rank}-part-0.safetensors"


def refusal(config: ModelConfig, tp: int) -> str | None:
    """Why a model cannot be written: it needs what is not documented.

    Args:
        config: the model.
        tp: how many ranks there are.
    """
    for group in config.family.groups:
        if has_bias(config, group):
            return (
                f"{group.fused} has a bias, and whether the file holds it beside quant_bias is "
                "not documented"
            )
    if config.tied:
        return "lm_head is tied to the embedding, and how it is stored then is not documented"
    if config.vocab_size % VOCAB_MULTIPLE:
        return (
            f"vocab_size is {config.vocab_size}, expected a multiple of {VOCAB_MULTIPLE}: how it "
            "is padded is not documented"
        )
    if config.num_kv_heads % tp:
        return (
            f"tp is {tp}, expected a divisor of num_key_value_heads, which is "
            f"{config.num_kv_heads}: how ranks share a head is not documented"
        )
    return None


def describe(layout: Layout, length: Length | None = None) -> dict[str, Any]:
    """The description of a checkpoint.

    Args:
        layout: the checkpoint.
        length: not used; no length is stated.

    Returns:
        JSON: a type for each tensor by its fused name, and for the weight of each linear in a
        fused one, by which the runtime looks types up.
    """
    result: dict[str, Any] = {"model_quant_type": CODED, "version": VERSION}
    for name in layout.tensors():
        path, _, suffix = name.rpartition(".")
        if path in layout.compressed:
            result[name] = CODED if suffix in CODED_SUFFIXES else PARAMETER
        else:
            result[name] = FLOAT
    for index, group, fused in layout.linears():
        for member in group.members:
            result[f"{block_prefix(index)}{member}.weight"] = result[f"{fused}.weight"]
    return result


def is_described(directory: Path) -> bool:
    """Whether a directory has such a description; other formats use the same file name."""
    path = directory / DESCRIPTION
    if not path.exists():
        return False
    return read_json(path, MAX_DESCRIPTION_BYTES).get("model_quant_type") == CODED


def read_layout(directory: Path, config: ModelConfig) -> Layout:
    """The layout that a directory's description and its files state.

    Args:
        directory: the checkpoint.
        config: its model.

    Raises:
        MsQuantError: an entry of the description is missing, unknown or of another type, or there
            are too many files or none.
    """
    path = directory / DESCRIPTION
    value = read_json(path, MAX_DESCRIPTION_BYTES)
    tp = len(list(directory.glob(RANKS)))
    if not 1 <= tp <= MAX_RANKS:
        raise MsQuantError(f"{directory}: has {tp} files {RANKS}, expected 1 to {MAX_RANKS}")
    fused = (name for _, _, name in fused_linears(config))
    compressed = frozenset(name for name in fused if value.get(f"{name}.weight") == CODED)
    layout = Layout(config, tp, compressed, TARGET)
    expected = describe(layout)
    for key in sorted({*expected, *value}):
        if value.get(key) != expected.get(key):
            raise MsQuantError(
                f"{path}: {key} is {value.get(key)!r:.80}, expected {expected.get(key)!r}"
            )
    return layout


TARGET = Target(
    name="vllm-ascend",
    runtime="vllm-ascend on Atlas 300I Duo (--quantization ascend --load-format sharded_state)",
    claim="vllm-ascend documents W8A8SC",
    families=("qwen3",),
    description=DESCRIPTION,
    ranks=RANKS,
    rank_place=rank_file,
    one_file=True,
    per_channel_input=False,
    info=True,
    refusal=refusal,
    describe=describe,
    found=is_described,
    read=read_layout,
)
