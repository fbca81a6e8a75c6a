"""What all runtimes ask of experts, and of linears that they fuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ms_quant.formats.checks import why_not_run
from ms_quant.formats.structure import Structure
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.numerics.grid import AffineFormat
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan


def method_problems(structure: Structure) -> Iterator[str]:
    """Linears of a type that the format's runtime has no method for."""
    plan = structure.plan
    reasons = (
        why_not_run(plan, index, group)
        for index in range(plan.config.num_blocks)
        for group in plan.groups(index)
    )
    yield from summed(reason.split(": ", 1) for reason in reasons if reason)


def summed(problems: Iterable[Sequence[str]]) -> Iterator[str]:
    """One sentence for each thing that is wrong, with the first path of which it is said."""
    found: dict[str, list[str]] = {}
    for path, reason in problems:
        found.setdefault(reason, []).append(path)
    for reason, paths in found.items():
        more = f" (as are {len(paths) - 1} more)" if len(paths) > 1 else ""
        yield f"{paths[0]}: {reason}{more}"


def expert_problems(plan: Plan) -> Iterator[str]:
    """Experts of one layer that are not of one type: runtimes take the first one's for all."""
    found = list(_mixed(plan))
    if found:
        index, one, first = found[0]
        paths = [f"{block_prefix(index)}{group.members[0]}" for group in (one, first)]
        kinds = [_text(plan.layers[GroupId(index, group.name)]) for group in (one, first)]
        more = f" (and in {len(found) - 1} more layers)" if len(found) > 1 else ""
        yield (
            f"{paths[0]}: is {kinds[0]}, {paths[1]} is {kinds[1]}, expected one type: the runtime "
            f"takes that of expert 0 for all three projections of all experts{more}"
        )


def _mixed(plan: Plan) -> Iterator[tuple[int, LinearGroup, LinearGroup]]:
    """Each layer with an expert of another type than its first one's, and both groups."""
    for index in range(plan.config.num_blocks):
        routed = [group for group in plan.config.block(index).groups if group.routed]
        kinds = [_text(plan.layers[GroupId(index, group.name)]) for group in routed]
        other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            yield index, routed[other], routed[0]


def _text(layer: LayerPlan | None) -> str:
    if layer is None:
        return "FLOAT"
    size = layer.scheme.weight.group_size
    return f"{layer.scheme.name} in groups of {size}" if size else layer.scheme.name


def packed_expert_limits(plan: Plan) -> str:
    """What only newer versions of vLLM take of int4 experts, with the first linear; or ""."""
    for index in range(plan.config.num_blocks):
        for group in plan.groups(index):
            weight = plan.layer(index, group).scheme.weight
            if not group.routed or not isinstance(weight, AffineFormat) or weight.bits != 4:
                continue
            kind = "has zero points" if not weight.symmetric else ""
            kind = kind or ("" if weight.group_size else "has no groups")
            if kind:
                return (
                    f"{block_prefix(index)}{group.members[0]}: {kind}, expected symmetric int4 in "
                    "groups for experts"
                )
    return ""


def fused_input_problems(structure: Structure) -> Iterator[str]:
    """Fused linears whose inputs are quantized differently: the last one loaded would win."""
    checkpoint = structure.checkpoint
    for index in range(structure.plan.config.num_blocks):
        for group in structure.plan.groups(index):
            first, *others = (f"{block_prefix(index)}{member}" for member in group.members)
            for suffix in ("input_scale", "input_offset"):
                if f"{first}.{suffix}" not in checkpoint:
                    continue
                stored = checkpoint.read(f"{first}.{suffix}")
                for path in others:
                    if checkpoint.read(f"{path}.{suffix}").tobytes() != stored.tobytes():
                        yield (
                            f"{checkpoint.directory}: {path}.{suffix} differs from "
                            f"{first}.{suffix}, expected equal values: the runtime fuses "
                            "them and keeps the last"
                        )


def expert_notes(plan: Plan, tp: int) -> list[str]:
    """How experts are divided over ranks."""
    routing = plan.config.routing
    if routing is None or tp == 1:
        return []
    return [
        f"each rank has {routing.size // tp} of the {routing.size} channels of every expert; with "
        "--enable-expert-parallel it has whole experts"
    ]
