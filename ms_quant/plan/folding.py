"""Which groups of a block are smoothed together: those that one producer feeds."""

from __future__ import annotations

from ms_quant.errors import MsQuantError
from ms_quant.models.block_spec import Edge, LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.schemes.storage import SmoothingTarget


def folded_edges(plan: Plan, index: int) -> dict[str, Edge]:
    """Quantized group to what makes its input, where a smoothing vector is folded into that.

    One vector divides a producer, so that every consumer's columns are multiplied by it, also
    those of a group that itself asks for no smoothing.
    """
    found: dict[str, Edge] = {}
    groups = plan.groups(index)
    for group in groups:
        edge = plan.producer(index, group) if plan.layer(index, group).folds else None
        if edge is not None:
            found |= {other.name: edge for other in groups if other.name in edge.consumers}
    return found


def float_readers(plan: Plan, index: int, edge: Edge) -> list[str]:
    """Paths in a block of the linears that read an edge and stay float."""
    readers = plan.config.block(index).readers(edge)
    return [path for path in readers if plan.layer_of(f"{block_prefix(index)}{path}") is None]


def check_edges(plan: Plan) -> None:
    """Refuses groups that one producer feeds and that could not have one smoothing vector.

    Raises:
        MsQuantError: names two such groups.
    """
    for block in plan.config.blocks:
        if all(len(edge.consumers) == 1 for edge in block.edges):
            continue
        for name, edge in folded_edges(plan, block.index).items():
            first = next(g for g in plan.groups(block.index) if _folds(plan, block.index, edge, g))
            _check_pair(plan, block.index, first, block.group(name))


def _folds(plan: Plan, index: int, edge: Edge, group: LinearGroup) -> bool:
    return group.name in edge.consumers and plan.layer(index, group).folds


def _check_pair(plan: Plan, index: int, one: LinearGroup, other: LinearGroup) -> None:
    first, second = plan.layer(index, one), plan.layer(index, other)
    smooths = second.algorithms.any("smooths")
    same = first.algorithms.preparing == second.algorithms.preparing
    into_producer = second.storage.target is SmoothingTarget.NORM
    if (smooths and not (same and into_producer)) or second.scheme.activation.holds_smoothing:
        prefix = block_prefix(index)
        raise MsQuantError(
            f"{prefix}{one.name} and {prefix}{other.name} read one input, which the smoothing of "
            f"{first.algorithms.name} divides for both, expected the same for both, not "
            f"{second.algorithms.name} into {second.storage.target.value}"
        )
