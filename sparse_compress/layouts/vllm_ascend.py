"""The layout of vllm-ascend.

    config.json, tokenizer files, quant_model_description.json, ms_quant.json
    model-rank-R-part-0.safetensors           one file for each rank
    proof/block-0000I.proof                   what recomputing the int8 weights needs

docs/w8a8sc.md says what is known of it and what is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.models.config import ModelConfig
from sparse_compress.layouts import typed
from sparse_compress.layouts.base import MAX_RANKS, Layout, Length, Target
from sparse_compress.layouts.partition import VOCAB_MULTIPLE

DESCRIPTION = "quant_model_description.json"
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
    for block in config.blocks:
        biased = next((group.fused for group in block.groups if group.bias), None)
        if biased:
            return (
                f"{biased} has a bias, and whether the file holds it beside quant_bias is "
                "not documented"
            )
    if config.tied:
        return "lm_head is tied to the embedding, and how it is stored then is not documented"
    if config.vocab_size % VOCAB_MULTIPLE:
        return (
            f"vocab_size is {config.vocab_size}, expected a multiple of {VOCAB_MULTIPLE}: how it "
            "is padded is not documented"
        )
    for division in config.divisions:
        if division.copied and division.units % tp:
            return (
                f"tp is {tp}, expected a divisor of {division.unit}, which is {division.units}: "
                "how ranks share a head is not documented"
            )
    return None


def describe(layout: Layout, length: Length | None = None) -> dict[str, Any]:
    """The description of a checkpoint; no length is stated in it."""
    return {**typed.describe(layout), "version": VERSION}


def is_described(directory: Path) -> bool:
    """Whether a directory has such a description; other formats use the same file name."""
    whole = any(directory.glob("quant_model_weight*"))  # msModelSlim's own
    return not whole and typed.kind_of(directory / DESCRIPTION) == typed.CODED


def read_layout(directory: Path, config: ModelConfig) -> Layout:
    """The layout that a directory's description and its files state.

    Args:
        directory: the checkpoint.
        config: its model.

    Raises:
        MsQuantError: an entry of the description is missing, unknown or of another type, or there
            are too many files or none.
    """
    tp = len(list(directory.glob(RANKS)))
    if not 1 <= tp <= MAX_RANKS:
        raise BadFileError(f"{directory}: has {tp} files {RANKS}, expected 1 to {MAX_RANKS}")
    return typed.read_layout(directory / DESCRIPTION, config, tp, TARGET)


TARGET = Target(
    name="vllm-ascend",
    runtime="vllm-ascend on Atlas 300I Duo (--quantization ascend --load-format sharded_state)",
    claim="vllm-ascend documents W8A8SC",
    families=("qwen3",),
    description=DESCRIPTION,
    ranks=RANKS,
    rank_path=rank_file,
    one_file=True,
    per_channel_input=False,
    info=True,
    refusal=refusal,
    describe=describe,
    found=is_described,
    read=read_layout,
)
