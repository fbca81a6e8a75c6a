"""The layout of msModelSlim: one directory, the model's own names, not split over ranks.

    config.json, tokenizer files, quant_model_description_w8a8sc.json, ms_quant.json
    quant_model_weight_w8a8sc.safetensors     all tensors
    proof/block-0000I.proof                   what recomputing the int8 weights needs

docs/w8a8sc.md says what is known of it and what is not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ms_quant.models.config import ModelConfig
from sparse_compress.layouts import typed
from sparse_compress.layouts.base import Layout, Target

DESCRIPTION = "quant_model_description_w8a8sc.json"
WEIGHTS = "quant_model_weight_w8a8sc.safetensors"


def refusal(config: ModelConfig, tp: int) -> str | None:
    """Why a model cannot be written for so many ranks, or None."""
    if tp == 1:
        return None
    return f"it is one directory that is not split over ranks, tp is {tp}, expected 1 (--tp 1)"


def read_layout(directory: Path, config: ModelConfig) -> Layout:
    """The layout that a directory's description states.

    Args:
        directory: the checkpoint.
        config: its model.

    Raises:
        MsQuantError: an entry of the description is missing, unknown or of another type.
    """
    return typed.read_layout(directory / DESCRIPTION, config, 1, TARGET)


TARGET = Target(
    name="msmodelslim",
    runtime="",
    claim="no runtime is documented to load the directory of msModelSlim as it is",
    families=(),
    description=DESCRIPTION,
    ranks="quant_model_weight*.safetensors",
    rank_path=lambda rank: WEIGHTS,
    one_file=True,
    per_channel_input=False,
    info=True,
    refusal=refusal,
    describe=lambda layout, length: typed.describe(layout),
    found=lambda directory: typed.kind_of(directory / DESCRIPTION) == typed.CODED,
    read=read_layout,
    fused=False,
    vocab_multiple=1,
    offset_dtype=np.dtype(np.float16),
    folds_bias=True,
    stores_tied_head=True,
)
