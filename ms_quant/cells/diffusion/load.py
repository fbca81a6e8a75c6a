"""Quantized attention from files, as MindIE-SD reads them."""

from __future__ import annotations

from collections.abc import Iterable

from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.plan import AttentionPlan
from ms_quant.cells.diffusion.sites import AttentionSite
from ms_quant.formats.mindie_sd.attention import read_attention
from ms_quant.formats.mindie_sd.description import Description
from ms_quant.formats.mindie_sd.reading import Tensors
from ms_quant.timestep import TimestepPolicyConfig


def stored_attention(
    description: Description,
    tensors: Tensors,
    sites: Iterable[AttentionSite],
    policy: TimestepPolicyConfig | None,
) -> dict[str, DiffusionAttention]:
    """What a description makes of the self attention of a network, by path.

    Raises:
        MsQuantError: a tensor is missing or wrong; names it.
    """
    made = {}
    for site in sites:
        type = description.attention_of(site.path)
        if type is None or not site.is_self:
            continue
        stored = read_attention(tensors, site.path, type, site.heads, site.head_size)
        steps = description.float_steps.get(site.path, ())
        rotates = stored.rotations is not None
        plan = AttentionPlan(stored.kind, rotates=rotates, float_steps=steps)
        made[site.path] = DiffusionAttention(plan, policy, stored.rotations, stored.scales)
    return made
