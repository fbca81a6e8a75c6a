"""Quantizing and thinning out the attention of a network: from patterns to what is attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mindspore import nn

from ms_quant.cells.calls import Progress, collect
from ms_quant.cells.diffusion.attach import attach_attention, usable_sites
from ms_quant.cells.diffusion.calibrate import Ranges, watched
from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.plan import STATIC, AttentionPlan, attention_plan
from ms_quant.cells.diffusion.sites import AttentionSite, is_matched
from ms_quant.cells.float_forward import in_float32
from ms_quant.cells.observations import Observations
from ms_quant.errors import BadArgumentError
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig, kept_timesteps

Attention = Mapping[str, "AttentionPlan | str | Mapping[str, Any] | None"]
"""Pattern of paths or class names to what such attentions become; None for what stays float."""


class AttentionJob:
    """What the attention of a network becomes, checked before anything is attached.

    Args:
        network: it; left as it is.
        wishes: by pattern; of several that match, the last counts.
        policy: which step is quantized how.

    Raises:
        MsQuantError: a pattern matches nothing, nothing that is matched can be taken over, a plan
            is malformed, or a head's size is none that the plan's rotation can have.
    """

    def __init__(
        self, network: nn.Cell, wishes: Attention, policy: TimestepPolicyConfig | None = None
    ):
        if not isinstance(wishes, Mapping) or not wishes:
            raise BadArgumentError(
                f"attention: {wishes!r:.80}, expected a dict of patterns and what attentions that "
                "they match become"
            )
        self.network, self.layers, self.policy = network, tuple(wishes), policy
        plans = {
            pattern: wish if wish is None else attention_plan(wish, f"attention {pattern!r}")
            for pattern, wish in wishes.items()
        }
        self.plans: dict[str, AttentionPlan] = {}
        self.cells: dict[str, DiffusionAttention] = {}
        for site in usable_sites(network, self.layers):
            plan = [plans[pattern] for pattern in plans if is_matched(site, pattern)][-1]
            if plan is None:
                continue
            self.plans[site.path] = plan
            if plan.kind != STATIC:
                cell = DiffusionAttention(plan, policy, head_size=site.head_size)
                self.cells[site.path] = cell
        if not self.plans:
            raise BadArgumentError(
                "attention: every attention that a pattern matches stays float, expected a plan "
                "for one at least"
            )
        self.ranges = {path: Ranges(p) for path, p in self.plans.items() if p.kind == STATIC}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at what needs static scales while the network is called.

        Raises:
            MsQuantError: no call came to one of them.
        """
        if not self.ranges:
            yield
            return
        with watched(self.network, self.ranges):
            yield
        for path, ranges in self.ranges.items():
            scales = ranges.scales(path)
            self.cells[path] = DiffusionAttention(self.plans[path], self.policy, scales=scales)

    def call(self, calibration: Iterable | Observations | None, progress: Progress) -> None:
        """Calls the network, where static scales are needed and nothing else called it.

        Raises:
            MsQuantError: there is nothing to call it with.
        """
        if not self.ranges or any(ranges.seen.reach for ranges in self.ranges.values()):
            return
        if calibration is None or isinstance(calibration, Observations):
            found = type(calibration).__name__
            raise BadArgumentError(
                f"{next(iter(self.ranges))}: INT8 needs calibration inputs, found {found}, "
                "expected some, or INT8_DYNAMIC"
            )
        with kept_timesteps(), in_float32(self.network):
            calls = collect(calibration, progress)
            for done, call in enumerate(calls, 1):
                TimestepManager.set_timestep_idx(call.step)
                self.network(*call.arguments, **call.named)
                progress("calibrate", done, len(calls))

    def attach(self) -> None:
        """Attaches everything, or, after an error, nothing."""
        attach_attention(self.network, self._cell_of, layers=self.layers)

    def _cell_of(self, site: AttentionSite) -> DiffusionAttention | None:
        return self.cells.get(site.path)
