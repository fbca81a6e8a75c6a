"""What runtimes ask of the parts of a model: each rule once, with its reason.

A scheme that a runtime serves may still be one that it has no experts of, or its attention may be
fused in a way that only one scheme suits. Planning refuses what breaks a rule before any work, and
``serve-check`` tells it of a checkpoint. docs/models.md lists the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import GroupId, block_name, block_prefix, linear_id
from ms_quant.numerics.activation import StaticInt8
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan, all_groups

STATIC, PER_TOKEN, INT4 = "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"
ASCEND_EXPERTS = (
    *(PER_TOKEN, INT4, "W4A16", "W8A8FP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"),
)
FUSED_BELOW = 16
"""With fewer ranks MindFormers fuses attention."""

Found = tuple[GroupId, LinearGroup, LayerPlan | None]
Broken = tuple[str, str]
"""The path of a linear, or "" for the model, and what is wrong with it."""


def broken(plan: Plan, runtime: str, tp: int = 1) -> Iterator[Broken]:
    """Where a plan breaks the rules of a runtime, which serves the scheme of every group."""
    for name, rule in RULES.items():
        if runtime.startswith(name):
            yield from rule(plan, tp)


def mixed_experts(plan: Plan) -> Iterator[Broken]:
    """Experts of a layer that are not of one scheme."""
    first: dict[tuple[int, str], Found] = {}
    for found, group, layer in groups_of(plan):
        if not group.routed:
            continue
        known = first.setdefault((found.block, _experts_of(group)), (found, group, layer))
        if _scheme(known[2]) != _scheme(layer):
            yield (
                path_of(found, group),
                f"is {_in_groups(layer)}, {path_of(*known[:2])} is {_in_groups(known[2])}, "
                f"expected one scheme for all experts of {block_name(found.block)}: runtimes take "
                "the first one's for all three projections of all",
            )


def limited_weight_only_experts(plan: Plan, _tp: int = 1) -> Iterator[Broken]:
    """Weight-only experts that vLLM before 0.31 and vllm-ascend do not take."""
    for found, group, layer in groups_of(plan):
        if layer is None or not group.routed or not layer.scheme.name.endswith("A16"):
            continue
        kind = "" if layer.scheme.chosen.get("symmetric", True) else "has zero points"
        kind = kind or ("" if layer.scheme.weight.group_size else "has one scale a channel")
        if kind:
            yield (
                path_of(found, group),
                f"{kind}, expected symmetric weights in groups for weight-only experts",
            )


def summed(problems: Iterable[Broken]) -> Iterator[str]:
    """One sentence for each thing that is wrong, with the first path of which it is said."""
    found: dict[str, list[str]] = {}
    for path, reason in problems:
        found.setdefault(reason, []).append(path)
    for reason, paths in found.items():
        more = f" (as are {len(paths) - 1} more)" if len(paths) > 1 else ""
        yield f"{paths[0]}: {reason}{more}" if paths[0] else reason


def groups_of(plan: Plan) -> Iterator[Found]:
    """Every group of a plan's model, with what becomes of it."""
    return ((found, group, plan.layers[found]) for found, group in all_groups(plan.config))


def path_of(found: GroupId, group: LinearGroup) -> str:
    """The path of a group's first linear."""
    return f"{block_prefix(found.block)}{group.members[0]}"


def title(layer: LayerPlan | None) -> str:
    """The name of a layer's scheme."""
    return "FLOAT" if layer is None else layer.scheme.name


def _native(plan: Plan, _tp: int) -> Iterator[Broken]:
    """vllm-mindspore's own models."""
    if plan.config.routing is not None or plan.config.latent is not None:
        yield "", "quantized, it has dense decoders only, none with experts or latent attention"


def _mindformers(plan: Plan, tp: int) -> Iterator[Broken]:
    """Golden Stick's checkpoints in MindFormers' models."""
    config = plan.config
    if config.latent is None:
        if config.routing is not None:
            yield "", f"MindFormers does not build quantized experts of {config.model_type}"
        return
    if not config.latent.q_rank:
        yield "", "q_lora_rank is null, expected a rank: its fused attention has no q_proj"
        return
    for found, group, layer in groups_of(plan):
        reason = ""
        if found.block >= config.num_layers:
            if layer is not None:
                reason = "expected FLOAT: it reads blocks that predict further tokens so"
        elif tp < FUSED_BELOW and _behind_fused_norm(plan, found, group):
            if layer is None or not isinstance(layer.scheme.activation, StaticInt8):
                reason = (
                    f"expected {STATIC}: with fewer than {FUSED_BELOW} ranks the fused attention "
                    "of MindFormers folds its input_scale into a norm"
                )
        elif group.routed and layer is None:
            reason = (
                f"expected {PER_TOKEN} or {INT4}: MindFormers has no float experts in a quantized "
                "model"
            )
        if reason:
            yield path_of(found, group), f"is {title(layer)}, {reason}"


def _behind_fused_norm(plan: Plan, found: GroupId, group: LinearGroup) -> bool:
    edge = plan.config.block(found.block).producer_of(group)
    return edge is not None and edge.fused


def _vllm_ascend(plan: Plan, tp: int) -> Iterator[Broken]:
    for found, group, layer in groups_of(plan):
        if layer is not None and group.routed and layer.scheme.name not in ASCEND_EXPERTS:
            listed = ", ".join(ASCEND_EXPERTS)
            yield path_of(found, group), f"is {title(layer)}, expected {listed} or FLOAT of experts"
    yield from limited_weight_only_experts(plan, tp)
    for index in range(plan.config.num_layers):
        if any(spec.heads for spec in plan.cached(index).values()):
            yield from _before_int8_attention(plan, index)


def _before_int8_attention(plan: Plan, index: int) -> Iterator[Broken]:
    """With an int8 cache vllm-ascend reads scales of what is before latent attention: fused, static
    ones; else the ``weight_scale`` of W8A8_DYNAMIC."""
    if plan.config.latent is None or not plan.config.latent.q_rank:
        yield (
            "",
            "q_lora_rank is null, expected a rank: with an int8 cache vllm-ascend reads scales of "
            "fused_qkv_a_proj",
        )
        return
    found = ((GroupId(index, group.name), group) for group in plan.config.block(index).groups)
    groups = {
        path_of(id, group): title(plan.layers[id])
        for id, group in found
        if _behind_fused_norm(plan, id, group)
    }
    if set(groups.values()) in ({STATIC}, {PER_TOKEN}):
        return
    known = STATIC, PER_TOKEN
    path = next((path for path, name in groups.items() if name not in known), [*groups][-1])
    yield (
        path,
        f"is {groups[path]}, expected {STATIC} of all that is before latent attention, or "
        f"{PER_TOKEN} of all: with an int8 cache vllm-ascend reads their scales",
    )


def _mindie_sd(plan: Plan, _tp: int) -> Iterator[Broken]:
    if plan.config.routing is not None:
        yield "", "no network of it with routed experts is known"


RULES: Mapping[str, Callable[[Plan, int], Iterator[Broken]]] = {
    "vllm-mindspore Native": _native,
    "vllm-mindspore MindFormers": _mindformers,
    "vllm-ascend": _vllm_ascend,
    "vLLM": limited_weight_only_experts,
    "MindIE-SD": _mindie_sd,
}
"""What the name of a runtime begins with, to where a plan breaks its rules at some number of
ranks."""


def _experts_of(group: LinearGroup) -> str:
    """The module that a group's expert is one of."""
    return linear_id(0, group.members[0]).member.rpartition(".")[0]


def _in_groups(layer: LayerPlan | None) -> str:
    size = layer.scheme.weight.group_size if layer else 0
    return f"{title(layer)} in groups of {size}" if size else title(layer)


def _scheme(layer: LayerPlan | None) -> object:
    return None if layer is None else layer.scheme
