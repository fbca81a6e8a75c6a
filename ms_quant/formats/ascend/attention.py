"""What vllm-ascend asks of the linears of latent attention whose cache is in int8."""

from __future__ import annotations

from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.plan import Plan

FUSED, PER_TOKEN = "W8A8", "W8A8_DYNAMIC"


def why_no_cache(plan: Plan) -> str:
    """Why vllm-ascend fails on the int8 cache of a plan, with the first linear; or "".

    Without fused preprocessing, which takes static W8A8 alone, it reads the ``weight_scale`` of
    what makes queries and latent vectors, which of the schemes of attention W8A8_DYNAMIC has.
    """
    for block in plan.config.blocks:
        cached = plan.cached(block.index).values()
        if not any(spec.heads for spec in cached):
            continue
        before = [g for g in block.groups if (e := block.producer_of(g)) is not None and e.norm]
        groups = [group for group in before if group.part == "attention"]
        layers = [plan.layers[GroupId(block.index, group.name)] for group in groups]
        names = ["FLOAT" if layer is None else layer.scheme.name for layer in layers]
        path = f"{block_prefix(block.index)}{groups[0].members[0]}"
        if plan.config.latent is not None and not plan.config.latent.q_rank:
            return (
                f"{path}: q_lora_rank is null, expected a rank: vllm-ascend reads scales of "
                "fused_qkv_a_proj for latent attention with an int8 cache"
            )
        if set(names) not in ({FUSED}, {PER_TOKEN}):
            wrong = next((i for i, n in enumerate(names) if n not in (FUSED, PER_TOKEN)), 1)
            return (
                f"{block_prefix(block.index)}{groups[wrong].members[0]}: is {names[wrong]}, "
                f"expected {FUSED} of all that is before latent attention, or {PER_TOKEN} of all: "
                "with an int8 cache vllm-ascend reads their scales"
            )
    return ""
