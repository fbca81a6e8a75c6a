"""Over how many ranks a quantized model can be divided."""

from __future__ import annotations

from collections.abc import Container, Iterator

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.formats.checks import format_of
from ms_quant.models.names import block_prefix
from ms_quant.models.ranks import check_tp
from ms_quant.numerics.w4a8 import ROW_PARALLEL_SLICES
from ms_quant.plan.plan import Plan, all_groups

MOST_RANKS = 64


def tensor_names(plan: Plan) -> frozenset[str]:
    """Every tensor that a checkpoint of a plan holds."""
    return frozenset(tensor.name for tensor in format_of(plan).tensor_plans(plan))


def rank_problems(plan: Plan, tp: int, names: Container[str]) -> Iterator[str]:
    """Quantized linears whose inputs cannot be split over so many ranks, one line each.

    Args:
        plan: what the linears are.
        tp: tensor-parallel ranks.
        names: every tensor that there is.
    """
    if tp > 1:
        yield from _pair_problems(plan, tp)
    for path, inputs, group_size in _row_parallel(plan) if tp > 1 else ():
        if f"{path}.left_trans" in names:
            yield f"{path}: has a Kronecker transform of all its inputs, expected --tp 1"
        elif f"{path}.scale_bias" in names and ROW_PARALLEL_SLICES % tp:
            yield (
                f"{path}.scale_bias: is stored in {ROW_PARALLEL_SLICES} slices, tp is {tp}, "
                "expected a divisor"
            )
        elif group_size and inputs // tp % group_size:
            yield (
                f"{path}: {inputs} inputs on {tp} ranks, expected groups of {group_size} on each"
            )


def _pair_problems(plan: Plan, tp: int) -> Iterator[str]:
    """Outputs that are packed in pairs, of which a rank would have an odd number."""
    for found, group in all_groups(plan.config):
        layer = plan.layers[found]
        if layer is None or group.parallel != "column":
            continue
        weight, activation = layer.scheme.weight, layer.scheme.activation
        if weight.integer and weight.bits == 4 and activation.bits == 8:
            for member, linear in group.linears.items():
                if linear.out_features // tp % 2:
                    yield (
                        f"{block_prefix(found.block)}{member}: {linear.out_features} outputs on "
                        f"{tp} ranks, expected an even number on each: int4 is packed in pairs"
                    )


def _row_parallel(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(path, inputs, group size) of the quantized linears whose inputs are split over ranks."""
    for found, group in all_groups(plan.config):
        layer = plan.layers[found]
        if layer is not None and group.parallel == "row":
            linears = plan.config.block(found.block).linears
            for member in group.members:
                path = f"{block_prefix(found.block)}{member}"
                yield path, linears[member].in_features, layer.scheme.weight.group_size


def refuse_ranks(plan: Plan, tp: int) -> None:
    """Refuses a number of ranks that the model or what its linears become cannot be divided by.

    Raises:
        MsQuantError: names what cannot, and the numbers of ranks that work.
    """
    problems = list(_problems(plan, tp, tensor_names(plan)))
    if problems:
        more = f" (and {len(problems) - 1} more linears)" if len(problems) > 1 else ""
        sizes = ", ".join(map(str, rank_counts(plan)))
        others = ""
        if "groups of" in problems[0]:
            others = ", or another --group-size, or --exclude such linears"
        raise BadFileError(f"{problems[0]}{more}; of this plan --tp {sizes} would do{others}")


def rank_counts(plan: Plan) -> list[int]:
    """The numbers of ranks, up to 64, that a plan can be served on."""
    names = tensor_names(plan)
    counts = range(1, MOST_RANKS + 1)
    return [tp for tp in counts if next(_problems(plan, tp, names), None) is None]


def rank_notes(plan: Plan) -> list[str]:
    """A note where the model could be divided over some number of ranks and its groups cannot."""
    names = tensor_names(plan)
    for tp in range(2, MOST_RANKS + 1):
        try:
            check_tp(plan.config, tp)
        except MsQuantError:
            continue
        problem = next(rank_problems(plan, tp, names), None)
        if problem:
            sizes = ", ".join(map(str, rank_counts(plan)))
            return [f"{problem}; tensor parallelism of {sizes} works with this plan (--tp checks)"]
    return []


def _problems(plan: Plan, tp: int, names: Container[str]) -> Iterator[str]:
    try:
        check_tp(plan.config, tp)
    except MsQuantError as error:
        yield str(error)
        return
    if tp > 1 and not isinstance(format_of(plan).weights, str):
        yield f"a checkpoint of {plan.format} is one file for all ranks, expected --tp 1"
        return
    yield from rank_problems(plan, tp, names)
