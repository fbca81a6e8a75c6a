"""What quantized and sparse attention would change in each layer, head and step of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from ms_quant.analysis.attention import AttentionError, AttentionSensitivity
from ms_quant.attention.layouts import heads_first
from ms_quant.attention.schedule import StepWindow
from ms_quant.cells.diffusion.attach import attach_attention, detach_attention
from ms_quant.cells.diffusion.dense import float_attention
from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.function import AttentionCall
from ms_quant.cells.diffusion.plan import STATIC, AttentionPlan, attention_plan
from ms_quant.cells.direct import floats
from ms_quant.errors import BadArgumentError
from ms_quant.timestep import TimestepManager


def analyze_attention(
    network: nn.Cell,
    sample: Callable[[nn.Cell], object],
    modes: Sequence[Any] | Mapping[str, Any],
    *,
    layers: Sequence[str] = ("*",),
) -> AttentionSensitivity:
    """How far off each attention of a network is in each mode, while the network samples in float.

    Every call of a self attention is computed as the network does, which is what goes on in the
    network, and in each mode beside it. Windows of steps and intervals between masks are left
    out: every step is measured, with a mask of its own.

    Args:
        network (Cell): a network in float, in which nothing is attached.
        sample (Callable): called once with `network`; runs the sampling loop, and says the step
            by :class:`ms_quant.TimestepManager`.
        modes (Union[Sequence, Mapping[str, Any]]): what ``attention`` of :func:`ms_quant.quantize`
            takes: ``"FP8_DYNAMIC"``, ``{"sparse": "rf_v3", "sparsity": 0.5}``; a mapping has names
            of yours for them.
        layers (Sequence[str]): patterns of paths or of class names. Default: ``("*",)``.

    Returns:
        AttentionSensitivity, relative L2 errors of outputs by layer, step, mode and head, and the
        densities; printed, it is a table. Its ``recommend`` says which layers and steps to leave
        float, its ``heat_map`` what each head computes.

    Raises:
        MsQuantError: a mode is unknown or static, a pattern matches nothing, the loop calls no
            attention that matches, or a value is not finite.

    Supported Platforms:
        ``CPU`` (tested)

    Examples:
        >>> import numpy as np, ms_quant
        >>> from mindspore import Tensor, nn
        >>> class Attention(nn.Cell):
        ...     fa_quant = None
        ...     heads = 2
        ...     def construct(self, x):
        ...         return self.fa_quant(x, x, x, layout="BNSD") if self.fa_quant else x
        >>> network = nn.SequentialCell(Attention())
        >>> x = Tensor(np.random.default_rng(0).standard_normal((1, 2, 64, 16)).astype(np.float32))
        >>> def sample(network):
        ...     for step in range(2):
        ...         with ms_quant.TimestepManager.at(step):
        ...             network(x)
        >>> found = ms_quant.analyze_attention(network, sample, ["FP8_DYNAMIC", "INT8_DYNAMIC"])
        >>> [round(value, 2) for value in found.by_step("FP8_DYNAMIC")]
        [0.04, 0.04]
    """
    plans = dict(_plans(modes))
    if not plans:
        raise BadArgumentError("modes: none, expected a kind or a sparse rule at least")
    found: list[AttentionError] = []
    attach_attention(network, lambda site: _Compared(plans, found), layers=layers)
    try:
        sample(network)
    finally:
        detach_attention(network)
    if not found:
        raise BadArgumentError(
            "sample: called no self attention that layers match, expected a run of the network"
        )
    return AttentionSensitivity(tuple(found), {name: plan.wish for name, plan in plans.items()})


def _plans(modes: Sequence[Any] | Mapping[str, Any]) -> Iterator[tuple[str, AttentionPlan]]:
    """Names and plans, each of every step."""
    named = modes.items() if isinstance(modes, Mapping) else [("", wish) for wish in modes]
    for name, wish in named:
        plan = attention_plan(wish, f"modes: {name}" if name else "modes")
        if plan.kind == STATIC:
            raise BadArgumentError(
                f"modes: {name or plan.label} has static scales, which calibration makes, expected "
                "INT8_DYNAMIC or another kind"
            )
        window = StepWindow(refresh=1) if plan.sparse is not None else StepWindow()
        yield name or plan.label, replace(plan, window=window, float_steps=())


class _Compared:
    """Stands in the place of an attention, computes as the network, and compares."""

    def __init__(self, plans: Mapping[str, AttentionPlan], found: list[AttentionError]):
        self.cells = {name: DiffusionAttention(plan) for name, plan in plans.items()}
        self.found = found

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
    ) -> Tensor:
        step = TimestepManager.get_timestep_idx()
        exact = float_attention(q, k, v, layout=layout, mask=mask, scale=scale, call=call)
        wanted = heads_first(floats(exact), layout)
        for name, cell in self.cells.items():
            if cell.plan.sparse is not None and step is None:
                raise BadArgumentError(
                    f"{call.path}: no timestep is set, expected TimestepManager.at(step) around "
                    "each call of the network"
                )
            output = cell(q, k, v, layout=layout, mask=mask, scale=scale, call=call)
            errors = _relative(heads_first(floats(output), layout), wanted)
            made = cell.last_mask
            density = float(np.mean(made.densities)) if made.densities else 1.0
            of_heads = errors, density, made.densities, made.kinds
            self.found.append(AttentionError(call.path, step, name, *of_heads))
        return exact


def _relative(found: np.ndarray, wanted: np.ndarray) -> tuple[float, ...]:
    """The relative L2 error of each head, over batch, tokens and channels."""
    off = np.square(found - wanted, dtype=np.float64).sum(axis=(0, 2, 3))
    whole = np.square(wanted, dtype=np.float64).sum(axis=(0, 2, 3))
    return tuple(np.sqrt(off / np.where(whole > 0, whole, 1)).tolist())
