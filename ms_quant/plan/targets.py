"""Which runtimes serve a plan, and what none of them does."""

from __future__ import annotations

from collections.abc import Iterator

from ms_quant.errors import UnsupportedError
from ms_quant.models.block_spec import Part
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan
from ms_quant.plan.rules import PER_TOKEN, broken, groups_of, mixed_experts, path_of, summed

OLD = " up to 0.25"
"""In the name of a runtime whose newer versions do not serve some scheme any more."""


def check_parts(plan: Plan) -> None:
    """Refuses what no runtime of any format forgives.

    Raises:
        MsQuantError: routed experts have static inputs, experts of one layer differ, or the second
            or a later layer that predicts further tokens needs calibration data; names the linear.
    """
    for found, group, layer in groups_of(plan):
        path = path_of(found, group)
        later = found.block > plan.config.num_layers
        if layer is not None and layer.needs_calibration and later:
            raise UnsupportedError(
                f"{path}: {_calibrated(layer)} needs calibration data, which passes only the first "
                f"layer that predicts further tokens, expected FLOAT or {PER_TOKEN} of later ones"
            )
        if group.routed and layer is not None and layer.scheme.needs_calibration:
            raise UnsupportedError(
                f"{path}: {layer.scheme.name} has static inputs, which no runtime has of routed "
                "experts (an expert may see few tokens or none in calibration), expected "
                f"{PER_TOKEN} or another scheme with dynamic inputs of experts"
            )
    for path, reason in mixed_experts(plan):
        raise UnsupportedError(f"{path}: {reason}")


def _calibrated(layer: LayerPlan) -> str:
    name = layer.scheme.name
    return name if layer.scheme.needs_calibration else f"{name} with {layer.algorithms.name}"


def runtimes(plan: Plan) -> list[str]:
    """The runtimes that serve the scheme of every group as the part that it is, and whose rules
    the plan keeps."""
    return [name for name in _serving_all(plan) if not any(broken(plan, name))]


def broken_rules(plan: Plan) -> list[str]:
    """Why runtimes that serve all of the schemes do not serve a plan, one sentence for each."""
    reasons = {name: next(summed(broken(plan, name)), "") for name in _serving_all(plan)}
    return [f"{name} does not serve it: {reason}" for name, reason in reasons.items() if reason]


def _serving_all(plan: Plan) -> list[str]:
    """The runtimes that serve the scheme of every group as the part that it is."""
    serving = list(_serving(plan))
    every = dict.fromkeys(name for names in serving for name in names)
    # What an old version serves in one part is served together with what all versions serve.
    return [
        name
        for name in every
        if all(name in names or name.replace(OLD, "") in names for names in serving)
    ]


def _serving(plan: Plan) -> Iterator[tuple[str, ...]]:
    """For every layer plan of every part, the runtimes that serve its scheme."""
    seen: set[tuple[int, Part]] = set()
    for _, group, layer in groups_of(plan):
        if layer is None or (id(layer), group.part) in seen:
            continue
        seen.add((id(layer), group.part))
        yield layer.storage.support.runtimes(group.routed)
