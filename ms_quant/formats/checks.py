"""What a plan's checkpoint format cannot hold, and which runtimes serve what it holds."""

from __future__ import annotations

from ms_quant.errors import BadFileError
from ms_quant.formats.format import CheckpointFormat
from ms_quant.formats.registry import FORMATS
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import block_prefix
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.plan.targets import broken_rules, runtimes


def format_of(plan: Plan) -> CheckpointFormat:
    """What the files of a plan's output hold."""
    return FORMATS[plan.format]


def check_shapes(plan: Plan, index: int, group: LinearGroup) -> None:
    """Refuses a quantized group that the scheme's groups do not divide or no file can hold.

    Raises:
        MsQuantError: names the linear.
    """
    layer, linears = plan.layer(index, group), plan.config.block(index).linears
    for member in group.members:
        name = f"{block_prefix(index)}{member}.weight"
        layer.scheme.weight.check_columns(linears[member].in_features, name)
        format_of(plan).check(layer, group, linears[member], name)


def why_not_run(plan: Plan, index: int, group: LinearGroup) -> str:
    """Why the format's runtime fails on a group that files can hold; "" where it does not."""
    layer, linears = plan.layer(index, group), plan.config.block(index).linears
    for member in group.members:
        if reason := format_of(plan).why_not_run(layer, group, linears[member]):
            return f"{block_prefix(index)}{member}: {reason}"
    return ""


def check_runs(plan: Plan, index: int, group: LinearGroup) -> None:
    """Refuses a group that the runtime fails on.

    Raises:
        MsQuantError: names the linear.
    """
    if reason := why_not_run(plan, index, group):
        raise BadFileError(reason)


def failure(plan: Plan) -> str:
    """The first linear that the format's runtime fails on, with the reason; "" for none."""
    for found, group in all_groups(plan.config):
        if plan.layers[found] is not None and (reason := why_not_run(plan, found.block, group)):
            return reason
    return ""


def served_by(plan: Plan) -> list[str]:
    """The runtimes that serve every scheme there is, in the parts of the model that have it."""
    return [] if failure(plan) else runtimes(plan)


def not_served_by(plan: Plan) -> list[str]:
    """Runtimes that do not serve some scheme there is, or some part of the model, with the
    reason."""
    reasons = [reason for layer in plan.distinct for reason in layer.storage.support.not_served_by]
    return list(dict.fromkeys([*reasons, *broken_rules(plan), *filter(None, [failure(plan)])]))
