"""What a group of linears costs in each scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ms_quant.formats.checks import format_of
from ms_quant.formats.float_model import EMBEDDING
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.names import GroupId, parse_linear
from ms_quant.numerics.activation import Float, Phased
from ms_quant.plan.layer import LayerPlan
from ms_quant.plan.plan import Plan, all_groups

FLOAT = "FLOAT"
FLOAT_BITS = 16
AT_RUN_TIME = 1.0
"""Bits by which a product counts as wider where its inputs are scaled at run time: that is a pass
over them which static scales do without. Where only prefill does so it is half of that."""


@dataclass(frozen=True)
class Cost:
    """Attributes:
    stored: bytes of the group's tensors, scales and all.
    weights: how many weights it has.
    product: bits of the numbers that are multiplied.
    """

    stored: int
    weights: int
    product: float

    @property
    def bits(self) -> float:
        """Of all its weights, as stored."""
        return 8.0 * self.stored

    @property
    def work(self) -> float:
        """What serving costs, in bits: the mean of what decode reads, which is what it waits for,
        and of what prefill multiplies, where a weight counts as wide as the numbers are."""
        return (self.bits + self.product * self.weights) / 2


def costs(plans: Mapping[str, Plan]) -> dict[GroupId, dict[str, Cost]]:
    """Group to what it costs in each scheme that it can take; all can stay float.

    Args:
        plans: scheme to the plan of the whole model in it.
    """
    first = next(iter(plans.values()))
    found = {group: {FLOAT: _float_cost(spec)} for group, spec in all_groups(first.config)}
    for scheme, plan in plans.items():
        stored = stored_bytes(plan)
        for group, spec in all_groups(plan.config):
            layer = plan.layers[group]
            if layer is not None:
                found[group][scheme] = Cost(stored[group], _weights(spec), product_bits(layer))
    return found


def all_weights(costs: Mapping[GroupId, Mapping[str, Cost]]) -> int:
    """How many weights all groups have."""
    return sum(next(iter(known.values())).weights for known in costs.values())


def bits_between(
    costs: Mapping[GroupId, Mapping[str, Cost]], choose: Sequence[str]
) -> tuple[float, float]:
    """The fewest and the most bits of a weight that choices among some schemes store."""
    least = most = 0.0
    for known in costs.values():
        bits = [known[name].bits for name in choose if name in known] or [known[FLOAT].bits]
        least, most = least + min(bits), most + max(bits)
    weights = all_weights(costs)
    return least / weights, most / weights


def stored_bytes(plan: Plan) -> dict[GroupId, int]:
    """Group to the bytes of its linears' tensors, of those that are quantized."""
    found: dict[GroupId, int] = {}
    for tensor in format_of(plan).tensor_plans(plan):
        if tensor.part is None:
            continue
        linear = parse_linear(tensor.part[0])
        group = plan.config.block(linear.block).group_of(linear.inner)
        assert group is not None, tensor.name
        key = GroupId(linear.block, group.name)
        found[key] = found.get(key, 0) + tensor.bytes
    return found


def token_bytes(plan: Plan) -> int:
    """What a step of decode reads of the weights for one token: every tensor of the decoder as it
    is stored, with its scales, and of the embedding one row, beside the head that it may be. Cached
    keys and values, which depend on the length of the text, are not in it."""
    config, carried = plan.config, {name for name, _, _ in plan.config.carried}
    read = {
        tensor.name: tensor.bytes
        for tensor in format_of(plan).tensor_plans(plan)
        if tensor.name not in carried
    }
    head = read[EMBEDDING] if config.tied and config.predicts else 0
    read[EMBEDDING] //= config.vocab_size
    return sum(read.values()) + head


def fixed_bytes(plan: Plan, known: Mapping[GroupId, Mapping[str, Cost]]) -> int:
    """What of :func:`token_bytes` is read whatever the groups become: head, norms, what is in no
    group."""
    stored = stored_bytes(plan)
    groups = (stored.get(group, costs[FLOAT].stored) for group, costs in known.items())
    return token_bytes(plan) - sum(groups)


def product_bits(layer: LayerPlan) -> float:
    """Bits of the numbers that linears multiply."""
    activation = layer.scheme.activation
    if isinstance(activation, Float):
        return FLOAT_BITS
    if isinstance(activation, Phased):
        return activation.bits + AT_RUN_TIME / 2
    return activation.bits + (AT_RUN_TIME if activation.dynamic else 0)


def _weights(group: LinearGroup) -> int:
    return sum(linear.size for linear in group.linears.values())


def _float_cost(group: LinearGroup) -> Cost:
    weights = _weights(group)
    biases = sum(linear.out_features for linear in group.linears.values() if linear.bias)
    return Cost((weights + biases) * FLOAT_BITS // 8, weights, FLOAT_BITS)
