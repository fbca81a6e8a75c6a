"""What runtimes ask of the parts of a model: rules, each with its reason.

A scheme that a runtime serves may still be one that it has no experts of, or its attention may be
fused in a way that only one scheme suits. docs/models.md lists the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ms_quant.errors import UnsupportedError
from ms_quant.models.block_spec import LinearGroup, Part
from ms_quant.models.names import GroupId, block_name, block_prefix, linear_id
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan, all_groups

OLD = " up to 0.25"
"""In the name of a runtime whose newer versions do not serve some scheme any more."""
STATIC, PER_TOKEN, INT4 = "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"
ASCEND_EXPERTS = (
    *(PER_TOKEN, INT4, "W4A16", "W8A8FP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"),
)

Found = tuple[GroupId, LinearGroup, LayerPlan | None]


def check_parts(plan: Plan) -> None:
    """Refuses what no runtime of any format forgives.

    Raises:
        MsQuantError: routed experts have static inputs, experts of one layer differ, or the second
            or a later layer that predicts further tokens needs calibration data; names the linear.
    """
    first: dict[tuple[int, str], Found] = {}
    for found, group, layer in _groups(plan):
        path = _path(found, group)
        later = found.block > plan.config.num_layers
        if layer is not None and layer.needs_calibration and later:
            what = layer.scheme.name
            if not layer.scheme.needs_calibration:
                what = f"{what} with {layer.algorithms.name}"
            raise UnsupportedError(
                f"{path}: {what} needs calibration data, which passes only the first layer that "
                f"predicts further tokens, expected FLOAT or {PER_TOKEN} of later ones"
            )
        if not group.routed:
            continue
        if layer is not None and layer.scheme.needs_calibration:
            raise UnsupportedError(
                f"{path}: {layer.scheme.name} has static inputs, which no runtime has of routed "
                "experts (an expert may see few tokens or none in calibration), expected "
                f"{PER_TOKEN} or another scheme with dynamic inputs of experts"
            )
        known = first.setdefault((found.block, _experts_of(group)), (found, group, layer))
        if _scheme(known[2]) != _scheme(layer):
            one, other = _title(known[2]), _title(layer)
            raise UnsupportedError(
                f"{_path(*known[:2])} would be {one} and {path} {other}, expected one for all "
                f"experts of {block_name(found.block)}: runtimes take the first one's for all"
            )


def runtimes(plan: Plan) -> list[str]:
    """The runtimes that serve the scheme of every group as the part that it is, and whose rules
    the plan keeps."""
    return [name for name in _serving_all(plan) if not _broken(plan, name)]


def broken_rules(plan: Plan) -> list[str]:
    """Why runtimes that serve all of the schemes do not serve a plan, one sentence for each."""
    reasons = {name: _broken(plan, name) for name in _serving_all(plan)}
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
    for _, group, layer in _groups(plan):
        if layer is None or (id(layer), group.part) in seen:
            continue
        seen.add((id(layer), group.part))
        names = layer.storage.support.served_by
        # vllm-ascend has dropped W4A8_DYNAMIC of linears and kept that of experts.
        yield tuple(name.replace(OLD, "") for name in names) if group.routed else names


def _broken(plan: Plan, runtime: str) -> str:
    """The first rule of a runtime that a plan breaks, with the reason; "" for none."""
    for name, rule in RULES.items():
        if runtime.startswith(name):
            return rule(plan)
    return ""


def _native(plan: Plan) -> str:
    """vllm-mindspore's own models."""
    if _has_parts(plan):
        return "quantized, it has dense decoders only, none with experts or latent attention"
    return ""


def _mindformers(plan: Plan) -> str:
    """Golden Stick's checkpoints in MindFormers' models."""
    latent = plan.config.latent
    if latent is None and plan.config.routing is not None:
        return f"MindFormers does not build quantized experts of {plan.config.model_type}"
    if latent is None:
        return ""
    if not latent.q_rank:
        return "its fused latent attention has q_a_proj, which a model without q_lora_rank lacks"
    return next(_mindformers_groups(plan), "")


def _mindformers_groups(plan: Plan) -> Iterator[str]:
    for found, group, layer in _groups(plan):
        path, title = _path(found, group), _title(layer)
        if _is_further(plan, found):
            if layer is not None:
                yield f"layers that predict further tokens are float there, and {path} is {title}"
        elif group.part == "attention":
            edge = plan.config.block(found.block).producer_of(group)
            if edge is not None and edge.norm and title != STATIC:
                yield (
                    "its fused latent attention folds the static input scale of q_a_proj, "
                    "kv_a_proj_with_mqa and q_b_proj into norms, expected attention to be "
                    f"{STATIC}, and {path} is {title}"
                )
        elif group.routed and layer is None:
            yield f"it has no float experts in a quantized model, and {path} is float"
        elif title == INT4 and not group.routed:
            yield f"it has {INT4} of routed experts only, and {path} is no such linear"


def _vllm_ascend(plan: Plan) -> str:
    for found, group, layer in _groups(plan):
        if layer is None or not group.routed:
            continue
        path, scheme = _path(found, group), layer.scheme
        if scheme.name not in ASCEND_EXPERTS:
            listed = ", ".join(ASCEND_EXPERTS)
            return f"its experts are {listed} or float, and {path} is {scheme.name}"
        if scheme.name == INT4 and scheme.weight.group_size:
            return (
                f"its {INT4} experts have one scale a channel (--group-size 0), and {path} has "
                f"groups of {scheme.weight.group_size}"
            )
    return ""


def _vllm(plan: Plan) -> str:
    for found, group, layer in _groups(plan):
        if layer is None or not group.routed or not layer.scheme.name.endswith("A16"):
            continue
        path, chosen = _path(found, group), layer.scheme.chosen
        if not chosen.get("symmetric", True):
            return f"its weight-only experts are symmetric, and {path} has zero points"
        if not layer.scheme.weight.group_size:
            return f"its weight-only experts have groups, and {path} has one scale a channel"
    return ""


def _mindie_sd(plan: Plan) -> str:
    return "" if plan.config.routing is None else "no network of it with routed experts is known"


RULES: Mapping[str, Callable[[Plan], str]] = {
    "vllm-mindspore Native": _native,
    "vllm-mindspore MindFormers": _mindformers,
    "vllm-ascend": _vllm_ascend,
    "vLLM": _vllm,
    "MindIE-SD": _mindie_sd,
}
"""What the name of a runtime begins with, to the rule of it that a plan breaks first."""


def _has_parts(plan: Plan) -> bool:
    return plan.config.routing is not None or plan.config.latent is not None


def _groups(plan: Plan) -> Iterator[Found]:
    return ((found, group, plan.layers[found]) for found, group in all_groups(plan.config))


def _is_further(plan: Plan, found: GroupId) -> bool:
    return found.block >= plan.config.num_layers


def _experts_of(group: LinearGroup) -> str:
    """The module that a group's expert is one of."""
    return linear_id(0, group.members[0]).member.rpartition(".")[0]


def _path(found: GroupId, group: LinearGroup) -> str:
    return f"{block_prefix(found.block)}{group.members[0]}"


def _scheme(layer: LayerPlan | None) -> object:
    return None if layer is None else layer.scheme


def _title(layer: LayerPlan | None) -> str:
    return "FLOAT" if layer is None else layer.scheme.name
