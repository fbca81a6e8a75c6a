"""What all runtimes ask of experts, and of linears that they fuse."""

from __future__ import annotations

from collections.abc import Iterator

from ms_quant.formats.checks import why_not_run
from ms_quant.formats.structure import Structure
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan
from ms_quant.plan.rules import summed


def method_problems(structure: Structure) -> Iterator[str]:
    """Linears of a type that the format's runtime has no method for."""
    plan = structure.plan
    reasons = (
        why_not_run(plan, index, group)
        for index in range(plan.config.num_blocks)
        for group in plan.groups(index)
    )
    pairs = (reason.split(": ", 1) for reason in reasons if reason)
    yield from summed((path, reason) for path, reason in pairs)


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
