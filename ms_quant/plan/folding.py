"""Which groups of a block are smoothed together: those that one producer feeds."""

from __future__ import annotations

from ms_quant.errors import BadArgumentError
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.edge import Edge
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.schemes.storage import SmoothingTarget


def folded_edges(plan: Plan, index: int) -> dict[str, Edge]:
    """Quantized group to what makes its input, where a smoothing vector is folded into that.

    One vector divides a producer, so that every consumer's columns are multiplied by it, also
    those of a group that itself asks for no smoothing.
    """
    found: dict[str, Edge] = {}
    for edge in plan.config.block(index).edges:
        names = quantized_readers(plan, index, edge)
        groups = (plan.config.block(index).group(name) for name in names)
        if plan.holds_smoothing(index, edge) and any(plan.layer(index, g).folds for g in groups):
            found |= dict.fromkeys(names, edge)
    return found


def quantized_readers(plan: Plan, index: int, edge: Edge) -> list[str]:
    """Names of the groups that read an edge and are quantized."""
    return [n for n in edge.consumers if plan.layers[GroupId(index, n)] is not None]


def float_readers(plan: Plan, index: int, edge: Edge) -> list[str]:
    """Paths in a block of the linears that read an edge and stay float."""
    readers = plan.config.block(index).readers(edge)
    return [path for path in readers if plan.layer_of(f"{block_prefix(index)}{path}") is None]


def changed_floats(plan: Plan, index: int, edge: Edge) -> list[str]:
    """Names in a block of the float tensors that change where a vector is folded into an edge; the
    weight of a quantized producer is none."""
    block = plan.config.block(index)
    readers = [f"{path}.weight" for path in float_readers(plan, index, edge)]
    if edge.norm or block.group_of(edge.producer) is None:
        return [f"{edge.producer}.weight", *readers]
    bias = f"{edge.producer}.bias"
    return [bias, *readers] if bias in block.tensors else readers


def check_edges(plan: Plan) -> None:
    """Refuses groups that one producer feeds and that could not have one smoothing vector.

    Raises:
        MsQuantError: names two such groups.
    """
    for block in plan.config.stored_blocks:
        if all(len(edge.consumers) < 2 for edge in block.edges):
            continue
        first: dict[str, LinearGroup] = {}
        folded = folded_edges(plan, block.index)
        for name, edge in folded.items():
            if plan.layer(block.index, block.group(name)).folds:
                first.setdefault(edge.producer, block.group(name))
        for name, edge in folded.items():
            _check_pair(plan, block.index, first[edge.producer], block.group(name))


def _check_pair(plan: Plan, index: int, one: LinearGroup, other: LinearGroup) -> None:
    first, second = plan.layer(index, one), plan.layer(index, other)
    smooths = second.algorithms.any("smooths")
    same = first.algorithms.preparing == second.algorithms.preparing
    into_producer = second.storage.target is SmoothingTarget.NORM
    if (smooths and not (same and into_producer)) or second.scheme.activation.holds_smoothing:
        prefix = block_prefix(index)
        raise BadArgumentError(
            f"{prefix}{one.members[0]} and {prefix}{other.members[0]} read one input, which the "
            f"smoothing of {first.algorithms.name} divides for both, expected the same of both, "
            f"not {second.algorithms.name} into {second.storage.target.value}"
        )
