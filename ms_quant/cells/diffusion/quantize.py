"""Quantizing and thinning out the attention of a network: from patterns to what is attached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspore import nn

from ms_quant.cells.diffusion.attach import attach_attention
from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.plan import AttentionPlan, attention_plan
from ms_quant.cells.diffusion.sites import AttentionSite, chosen_sites, is_matched
from ms_quant.errors import BadArgumentError
from ms_quant.timestep import TimestepPolicyConfig

Attention = Mapping[str, "AttentionPlan | str | Mapping[str, Any] | None"]
"""Pattern of paths or class names to what such attentions become; None for what stays float."""


class AttentionJob:
    """What the attention of a network becomes, checked before anything is attached.

    Args:
        network: it; left as it is.
        wishes: by pattern; of several that match, the last counts.
        policy: which step is quantized how.

    Raises:
        MsQuantError: a pattern matches nothing, a plan is malformed, or a head's size is none that
            the plan's rotation can have.
    """

    def __init__(
        self, network: nn.Cell, wishes: Attention, policy: TimestepPolicyConfig | None = None
    ):
        if not isinstance(wishes, Mapping) or not wishes:
            raise BadArgumentError(
                f"attention: {wishes!r:.80}, expected a dict of patterns and what attentions that "
                "they match become"
            )
        self.network, self.layers = network, tuple(wishes)
        plans = {
            pattern: wish if wish is None else attention_plan(wish, f"attention {pattern!r}")
            for pattern, wish in wishes.items()
        }
        self.cells: dict[str, DiffusionAttention] = {}
        for site in chosen_sites(network, self.layers):
            plan = [plans[pattern] for pattern in plans if is_matched(site, pattern)][-1]
            if plan is not None and site.is_self:
                cell = DiffusionAttention(plan, policy, head_size=site.head_size)
                self.cells[site.path] = cell

    def attach(self) -> None:
        """Attaches everything, or, after an error, nothing."""
        attach_attention(self.network, self._cell_of, layers=self.layers)

    def _cell_of(self, site: AttentionSite) -> DiffusionAttention | None:
        return self.cells.get(site.path)
