"""Quantized attention as MindIE-SD's files hold it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from mindspore import nn

from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.hook import hook_of
from ms_quant.cells.diffusion.plan import FLOAT
from ms_quant.cells.tree import host_array
from ms_quant.errors import BadArgumentError
from ms_quant.formats.mindie_sd.attention import ROTATED
from ms_quant.formats.mindie_sd.types import SERVED_ATTENTION


def attention_types(network: nn.Cell) -> dict[str, str]:
    """The type of each quantized attention of a network, by path.

    Raises:
        MsQuantError: MindIE-SD serves no such type, or something else than ours is attached.
    """
    return {path: cell.plan.kind for path, cell in _attached(network) if cell.plan.kind != FLOAT}


def _attached(network: nn.Cell) -> Iterator[tuple[str, DiffusionAttention]]:
    for path, cell in network.cells_and_names():
        hook = hook_of(cell)
        if hook is None:
            continue
        if not isinstance(hook.function, DiffusionAttention):
            raise BadArgumentError(
                f"{path}: has an attention function of its own, expected what quantize attaches, "
                "or detach_attention first"
            )
        kind = hook.function.plan.kind
        if kind not in (*SERVED_ATTENTION, FLOAT):
            raise BadArgumentError(
                f"{path}: MindIE-SD serves no attention in {kind}, expected "
                f"{', '.join(SERVED_ATTENTION)} or FLOAT"
            )
        yield path, hook.function


def attention_tensors(network: nn.Cell) -> dict[str, np.ndarray]:
    """The rotations of each quantized attention, by the names of their tensors.

    A type that MindIE-SD always rotates has the identity where nothing is rotated.

    Raises:
        MsQuantError: as :func:`attention_types`, or the size of a head is not known yet.
    """
    found = {}
    for path, cell in _attached(network):
        if cell.plan.kind == FLOAT:
            continue
        for name in ("q_rot", "k_rot"):
            if name in cell._params:
                found[f"{path}.{name}"] = host_array(cell._params[name])
            elif cell.plan.kind in ROTATED or cell.plan.is_rotated:
                found[f"{path}.{name}"] = np.eye(_head_size(path, cell), dtype=np.float32)
    return found


def _head_size(path: str, cell: DiffusionAttention) -> int:
    if cell.plan.is_rotated or cell.head_size is None:
        raise BadArgumentError(
            f"{path}: the size of its heads is not known, expected one call of the network first"
        )
    return cell.head_size


def float_steps(network: nn.Cell) -> dict[str, list[int]]:
    """The steps in which each quantized attention is float, by path; of those that have some."""
    plans = {path: cell.plan for path, cell in _attached(network) if cell.plan.kind != FLOAT}
    return {path: list(plan.float_steps) for path, plan in plans.items() if plan.float_steps}


def warn_of_what_is_not_read(network: nn.Cell) -> None:
    """Says once that files hold no sparse attention, and that the runtime reads no steps."""
    if steps := float_steps(network):
        warnings.warn(
            f"ms_quant: {next(iter(steps))} has steps in float, which ms_quant reads and MindIE-SD "
            "does not; ms-quant serve-check --runtime mindie-sd prints the policy that it takes",
            stacklevel=4,
        )
    sparse = [path for path, cell in _attached(network) if cell.plan.sparse is not None]
    if sparse:
        warnings.warn(
            f"ms_quant: {sparse[0]} is sparse, which MindIE-SD's files do not say; give the rule "
            "and the steps to the runtime itself",
            stacklevel=4,
        )
