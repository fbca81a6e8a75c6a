"""Norms whose gains a runtime divides by the static input scales of what reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ms_quant.files.reader import Checkpoint
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.numerics.quotient import quotient_error
from ms_quant.plan.plan import Plan


def norm_of(plan: Plan, index: int, group: LinearGroup) -> str:
    """Full path of the norm whose gain is divided by a quantized group's input scales, or ""."""
    edge = plan.config.block(index).producer_of(group)
    holds = plan.layer(index, group).scheme.activation.holds_smoothing
    return f"{block_prefix(index)}{edge.producer}" if edge and edge.fused and holds else ""


def quotient_errors(plan: Plan, checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Path of each such norm, and the shares by which the quotients of its gain are off."""
    for index in range(plan.config.num_blocks):
        for group in plan.groups(index):
            norm = norm_of(plan, index, group)
            if norm:
                gain = checkpoint.read_float32(f"{norm}.weight")
                first = f"{block_prefix(index)}{group.members[0]}"
                scale = checkpoint.read_float32(f"{first}.input_scale")
                yield norm, quotient_error(gain, scale, plan.dtype)


def quotient_notes(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """How exactly gains survive to be divided, one sentence if any are."""
    found = list(quotient_errors(plan, checkpoint))
    if not found:
        return []
    worst, errors = max(found, key=lambda pair: float(pair[1].max(initial=0)))
    mean = float(np.sqrt(np.mean(np.square(np.concatenate([e for _, e in found])))))
    return [
        f"MindFormers divides the gains of {len(found)} norms by input_scale in {plan.dtype.name}: "
        f"quotients are off by {mean:.3%} in the root mean square, at most "
        f"{errors.max(initial=0):.2%}, in {worst}"
    ]
