"""What all runtimes ask of experts, and of linears that they fuse."""

from __future__ import annotations

from collections.abc import Iterator

from ms_quant.formats.checks import why_not_run
from ms_quant.formats.structure import Structure
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan


def method_problems(structure: Structure) -> Iterator[str]:
    """Linears of a type that the format's runtime has no method for."""
    for index in range(structure.plan.config.num_blocks):
        for group in structure.plan.groups(index):
            reason = why_not_run(structure.plan, index, group)
            if reason:
                yield reason


def expert_problems(plan: Plan) -> Iterator[str]:
    """Experts of one layer that are not of one type: runtimes take the first one's for all."""
    for index in range(plan.config.num_blocks):
        routed = [group for group in plan.config.block(index).groups if group.routed]
        for group in routed[1:]:
            found = _text(plan.layers[GroupId(index, group.name)])
            first = _text(plan.layers[GroupId(index, routed[0].name)])
            if found != first:
                prefix = block_prefix(index)
                yield (
                    f"{prefix}{group.members[0]}: is {found}, {prefix}{routed[0].members[0]} is "
                    f"{first}, expected one type: the runtime takes that of expert 0 for all three "
                    "projections of all experts"
                )
                break


def _text(layer: LayerPlan | None) -> str:
    if layer is None:
        return "FLOAT"
    size = layer.scheme.weight.group_size
    return f"{layer.scheme.name} in groups of {size}" if size else layer.scheme.name


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
