"""What a job will take, printed by --dry-run before anything is done."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.budget import BUDGET, Budget
from ms_quant.formats.checks import not_served_by, served_by
from ms_quant.formats.tensor_parallel import rank_counts
from ms_quant.models.block_spec import BlockSpec, LinearGroup
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId, expert_of
from ms_quant.pipeline.condensed import member_of
from ms_quant.pipeline.request import CheckedJob, needed_bytes
from ms_quant.pipeline.writer import output_bytes
from ms_quant.plan.plan import Plan
from ms_quant.schemes.table import FLOAT_CACHE

# Measured with benchmarks/memory.py: what the process holds beside weights and activations, and
# how much of a matrix product's speed a whole block reaches.
IMPORT_BYTES, MINDSPORE_BYTES = 64 << 20, 400 << 20
CALIBRATED_COPIES, DATA_FREE_COPIES = 2.0, 1.4
ACTIVATION_COPIES, SCORE_COPIES = 3, 3
BLOCK_EFFICIENCY = 0.5
FACTOR_COPIES = 4  # of a Hessian in float64, while it is factored
SEARCHED_GROUPS = 2.5  # of four: candidates share what comes before them


def estimate(checked: CheckedJob, output: Path, budget: Budget = BUDGET) -> dict[str, Any]:
    """The plan of a job.

    Time and memory are rough: from the sizes, and the speed of one matrix product measured now.

    Args:
        checked: the checked request.
        output: where it would be written.
        budget: what bounds the memory of a forward.
    """
    plan, config = checked.plan, checked.plan.config
    weights = sum(block.size for block in config.stored_blocks)
    largest = max(map(_most_held, config.stored_blocks))
    tokens = 0 if checked.tokens is None else checked.tokens.size
    searches = max(layer.algorithms.searches for layer in plan.distinct)
    forwards = tokens + SEARCHED_GROUPS * searches * min(tokens, plan.search_tokens)
    seconds = 2 * _passed(config) * forwards / (BLOCK_EFFICIENCY * flops())
    seconds += weights / 100e6  # rounding the weights themselves
    if plan.any("hessian"):
        seconds += _hessian_flops(plan, tokens) / (BLOCK_EFFICIENCY * flops())
    memory = IMPORT_BYTES + DATA_FREE_COPIES * 4 * largest
    if checked.tokens is not None:
        memory = IMPORT_BYTES + CALIBRATED_COPIES * 4 * largest
        memory += _activation_bytes(checked.tokens, config, budget)
        memory += max(_hessian_bytes(plan, block, routed=False) for block in config.stored_blocks)
        memory = max(memory, *(_expert_bytes(plan, block) for block in config.stored_blocks))
        memory += MINDSPORE_BYTES if plan.any("trains") else 0
        options = checked.options
        assert options.calib is not None
        from ms_quant.data.calibration import reading_bytes

        memory = max(memory, IMPORT_BYTES + reading_bytes(options.calib, options.model))
    return {
        "output": str(output),
        "format": plan.format,
        "scheme": plan.scheme_name,
        "algorithm": plan.algorithm,
        "kv_cache": plan.kv_cache or FLOAT_CACHE,
        "dtype": plan.dtype.name,
        "blocks": config.num_layers,
        "quantized_linears": len(plan.quantized()),
        "float_linears": plan.float_linears(),
        "linears_of_a_block": _linears(plan),
        "calibration_tokens": tokens,
        "output_bytes": output_bytes(plan),
        "disk_bytes": needed_bytes(replace(checked, others=())),
        "memory_bytes": int(memory),
        "estimated_seconds": round(seconds, 1),
        "tensor_parallel": ", ".join(map(str, rank_counts(plan))),
        "served_by": served_by(plan),
        "not_served_by": not_served_by(plan),
        "notes": list(checked.notes),
    }


def _passed(config: ModelConfig) -> float:
    """How many weights a token passes: of the experts those that it goes to."""
    weights = sum(block.size for block in config.stored_blocks)
    if config.routing is None:
        return weights
    routed = sum(block.routed_size for block in config.stored_blocks)
    return weights - routed * (1 - config.routing.per_token / config.routing.experts)


def _most_held(block: BlockSpec) -> int:
    """How many weights are in memory at once where experts come one after the other."""
    return block.size - block.routed_size + _largest_expert(block)


def _largest_expert(block: BlockSpec) -> int:
    sizes = Counter[int | None]()
    for group in block.groups:
        if group.routed:
            sizes[expert_of(group.members[0])] += _size(group)
    return max(sizes.values(), default=0)


def _size(group: LinearGroup) -> int:
    return sum(linear.size for linear in group.linears.values())


def _with_hessian(plan: Plan, block: BlockSpec) -> list[LinearGroup]:
    """The groups some algorithm of which needs the products of channels."""
    layers = ((group, plan.layers[GroupId(block.index, group.name)]) for group in block.groups)
    return [group for group, layer in layers if layer and layer.algorithms.any("hessian")]


def _hessian_bytes(plan: Plan, block: BlockSpec, *, routed: bool) -> int:
    """Products of the channels of a block that are held at once, and the factor of one of them;
    of the groups that experts have, or of the others."""
    found = Counter[int | None]()
    largest = 0
    for group in _with_hessian(plan, block):
        if group.routed == routed:
            found[expert_of(group.members[0])] += 4 * group.in_features**2
            largest = max(largest, group.in_features)
    return max(found.values(), default=0) + FACTOR_COPIES * 8 * largest**2


def _expert_bytes(plan: Plan, block: BlockSpec) -> float:
    """While experts are quantized, one after the other, what came before them is gone."""
    weights = CALIBRATED_COPIES * 4 * _largest_expert(block)
    return IMPORT_BYTES + weights + _hessian_bytes(plan, block, routed=True)


def _hessian_flops(plan: Plan, tokens: int) -> float:
    """Products of channels, their inverse's factor, and the column steps."""
    total, routing = 0.0, plan.config.routing
    for block in plan.config.stored_blocks:
        for group in _with_hessian(plan, block):
            share = routing.per_token / routing.experts if routing and group.routed else 1
            k = group.in_features
            total += 2 * _size(group) * k + 2 * tokens * share * k**2 + 2 * k**3
    return total


def _activation_bytes(tokens: np.ndarray, config: ModelConfig, budget: Budget) -> float:
    """A batch in a block, its attention scores, and the embedding rows that occur."""
    length = tokens.shape[1]
    batch, queries = budget.windows(length), min(length, budget.queries)
    widest = max(_widest(block, config.latent is not None) for block in config.stored_blocks)
    states = batch * length * (config.hidden_size + widest)
    scores = min(budget.score_bytes, 4 * batch * config.num_heads * length * queries)
    rows = min(config.vocab_size, tokens.size) * config.hidden_size
    return ACTIVATION_COPIES * 4 * states + SCORE_COPIES * scores + 4 * rows


def _widest(block: BlockSpec, latent: bool) -> int:
    """Of what linears read; latent attention makes more of it, keys and values of all heads."""
    made = (spec.out_features for spec in block.linears.values() if latent)
    return max(*(group.in_features for group in block.groups), *made)


def _linears(plan: Plan) -> list[str]:
    """What the linears of a block become; in several blocks maybe several things."""
    found: dict[tuple[str, int, int], dict[str, None]] = {}
    for block in plan.config.stored_blocks:
        for member, spec in block.linears.items():
            group = block.group_of(member)
            layer = plan.layers[GroupId(block.index, group.name)] if group else None
            names = found.setdefault((member_of(member), *spec.shape), {})
            names[layer.scheme.name if layer else "FLOAT"] = None
    return [
        f"{member}: {out} x {into}, {' or '.join(names)}"
        for (member, out, into), names in found.items()
    ]


def flops() -> float:
    """Float32 operations a second of one large matrix product."""
    a = np.ones((1024, 1024), np.float32)
    a @ a
    started = time.perf_counter()
    a @ a
    return 2 * 1024**3 / (time.perf_counter() - started)
