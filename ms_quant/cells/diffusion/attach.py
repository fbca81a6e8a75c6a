"""Attaching attention functions to a network, and taking them off again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import nn

from ms_quant.cells.diffusion.adapters import put, refusal, remove
from ms_quant.cells.diffusion.function import AttentionFunction
from ms_quant.cells.diffusion.hook import Hook, LatentShapes, hook_of
from ms_quant.cells.diffusion.sites import AttentionSite, attention_sites, chosen_sites
from ms_quant.cells.tree import get_cell
from ms_quant.errors import BadArgumentError

FunctionOf = Callable[[AttentionSite], AttentionFunction | None]
"""Gives what is attached to an attention, None for one that stays as it is."""


def attach_attention(
    network: nn.Cell,
    function_of: FunctionOf,
    *,
    layers: Sequence[str] = ("*",),
) -> nn.Cell:
    """Puts attention functions in the place of a network's self attention; in PyNative.

    Cross attention, attention over text alone, and calls whose keys are not as many as the queries
    stay the network's own. :func:`detach_attention` undoes it.

    Args:
        network (Cell): any network that :func:`attention_sites` finds attention in.
        function_of (Callable): called with the site of each that `layers` match.
        layers (Sequence[str]): patterns of paths or of class names, such as
            ``"transformer_blocks.*.attn"`` or ``"*Attention"``. Default: ``("*",)``.

    Returns:
        Cell, `network`.

    Raises:
        MsQuantError: a pattern matches nothing, nothing that is matched can be taken over, or
            something is attached already. Nothing is attached then.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """
    usable = usable_sites(network, layers)
    found = [(site, function_of(site)) for site in usable]
    hooks = [Hook(site, function) for site, function in found if function is not None]
    if not hooks:
        raise BadArgumentError(
            f"layers: no attention function for {usable[0].path} or another, expected one at least"
        )
    _put_all(network, hooks)
    return network


def usable_sites(network: nn.Cell, layers: Sequence[str]) -> list[AttentionSite]:
    """The attentions that patterns match and that something may be attached to.

    Raises:
        MsQuantError: a pattern matches nothing, nothing that is matched can be taken over, or
            something is attached already.
    """
    chosen = [(site, why_float(site)) for site in chosen_sites(network, tuple(layers))]
    usable = [site for site, reason in chosen if not reason]
    if not usable:
        site, reason = chosen[0]
        raise BadArgumentError(
            f"layers: {site.path} ({site.kind}) is left float ({reason}), and so is what else "
            "matches, expected self attention"
        )
    for site in usable:
        if hook_of(site.cell) is not None:
            raise BadArgumentError(
                f"{site.path}: has an attention function already, expected detach_attention first"
            )
    return usable


def why_float(site: AttentionSite) -> str:
    """Why nothing is attached to an attention; "" where something may be."""
    return (site.tokens if not site.is_self else "") or refusal(site.cell)


def _put_all(network: nn.Cell, hooks: list[Hook]) -> None:
    shapes: dict[str, LatentShapes] = {}
    done = []
    try:
        for hook in hooks:
            put(hook)
            done.append(hook)
            model = hook.site.model
            if model is None:
                continue
            if model not in shapes:
                shapes[model] = LatentShapes(get_cell(network, model) if model else network)
            hook.shapes = shapes[model]
    except Exception:
        _take_off(done)
        raise


def detach_attention(network: nn.Cell) -> nn.Cell:
    """Gives every attention of a network back what it was before :func:`attach_attention`.

    Args:
        network (Cell): any network.

    Returns:
        Cell, `network`.
    """
    found = (hook_of(site.cell) for site in attention_sites(network))
    _take_off([hook for hook in found if hook is not None])
    return network


def _take_off(hooks: list[Hook]) -> None:
    for shapes in {id(h.shapes): h.shapes for h in hooks}.values():
        if shapes is not None:
            shapes.remove()
    for hook in hooks:
        remove(hook)
