"""What is said and recorded of the calibration data of a request."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ms_quant.models.config import ModelConfig
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.plan.plan import Plan


def data_record(options: QuantizeOptions, tokens: np.ndarray) -> dict[str, Any]:
    """Which calibration data it is."""
    return {
        "samples": len(tokens),
        "seq_len": tokens.shape[1],
        "seed": options.windows.seed,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        **({"all_tokens": True} if options.all_tokens else {}),
    }


def data_notes(
    options: QuantizeOptions, plan: Plan | None, config: ModelConfig, tokens: np.ndarray
) -> list[str]:
    """Sentences about calibration data: what for, and where less or poorer than asked for.

    Args:
        options: the request.
        plan: what is quantized; None where the data serve something else.
        config: the model.
        tokens: int32 (windows, tokens).
    """
    notes, (count, length) = [], tokens.shape
    if plan is not None and not plan.needs_calibration:
        notes.append(
            f"{options.calib}: scheme {plan.scheme_name} with {plan.algorithm} is not calibrated; "
            "the data only show whether float16 holds the activations"
        )
    if beyond := config.beyond(length):
        notes.append(f"{options.model}: {beyond}, the windows of {options.calib} have {length}")
    if count < options.windows.samples:
        notes.append(f"{options.calib}: holds {count} windows of {length} tokens, using all")
    from ms_quant.data.calibration import few_tokens

    if poor := few_tokens(tokens):
        notes.append(f"{options.calib}: {poor}")
    return notes
