"""What ``sparse-compress run`` will do and take, printed by --dry-run before anything is done."""

from __future__ import annotations

from typing import Any

from ms_quant.pipeline.estimate import estimate as quantization_estimate
from ms_quant.pipeline.estimate import flops
from sparse_compress.layouts.limits import most_bytes
from sparse_compress.pipeline.request import CheckedSparseJob, SparseOptions
from sparse_compress.rate.share import PRICES
from sparse_compress.rate.steps import SAMPLE_ROWS

KEPT = (
    "algorithm",
    "dtype",
    "blocks",
    "calibration_tokens",
    "disk_bytes",
    "memory_bytes",
    "estimated_seconds",
)

# Measured with benchmarks/rate.py on 2 cores: the column step and three passes of descent, the
# prices that a linear is measured at, and the factor of the Hessian.
SECONDS_A_WEIGHT, SECONDS_A_PRICE, FACTOR_FLOPS = 0.7e-6, 0.2, 8
MEASURED_ROWS = len(PRICES) * SAMPLE_ROWS


def rate_memory(sparse: CheckedSparseJob) -> int:
    """Bytes that rate-distortion rounding takes above calibration: the Hessians of a block, and
    the work on the largest linear."""
    shapes = _group_shapes(sparse)
    hessians = sum(4 * k * k for _, k in shapes)
    return hessians + max(24 * k * k + 16 * n * k for n, k in shapes)


def rate_seconds(sparse: CheckedSparseJob) -> float:
    """What measuring and rounding take, rough; of a loss of quality, with one price tried."""
    speed, seconds = flops(), 0.0
    for n, k in _group_shapes(sparse):
        seconds += 2 * FACTOR_FLOPS * k**3 / speed
        seconds += (n + MEASURED_ROWS) * k * SECONDS_A_WEIGHT + len(PRICES) * SECONDS_A_PRICE
    return seconds


def _group_shapes(sparse: CheckedSparseJob) -> list[tuple[int, int]]:
    """(out, in) of all groups."""
    return [
        (
            sum(block.linears[member].out_features for member in group.members),
            group.in_features,
        )
        for block in sparse.layout.config.blocks
        for group in block.groups
    ]


def asked(options: SparseOptions) -> dict[str, Any]:
    """What decides the size: the pruning or the goal."""
    if options.pruned:
        return {"sparsity": options.pruned.share, "pruning": options.pruned.kind}
    goals = {"target_ratio": options.target_ratio, "max_ppl_increase": options.max_ppl_increase}
    return {name: value for name, value in goals.items() if value is not None}


def estimate(sparse: CheckedSparseJob) -> dict[str, Any]:
    """The plan of a job.

    Args:
        sparse: what was checked.

    Returns:
        JSON: where and how; ``compressed`` and ``uncompressed`` fused linears, the latter with
        the reason (some may join them, when their coded form turns out too long);
        ``output_bytes`` at most; disk, memory and time as ``ms-quant quantize`` estimates them;
        ``float16_lost`` values by tensor; and which runtimes serve the result.
    """
    options, layout = sparse.options, sparse.layout
    found = quantization_estimate(sparse.quantization, options.output)
    if sparse.goal:
        found["memory_bytes"] += rate_memory(sparse)
        found["estimated_seconds"] = round(2 * found["estimated_seconds"] + rate_seconds(sparse), 1)
    served = not sparse.not_served_by
    return {
        "output": str(options.output),
        "format": f"W8A8SC TP{layout.tp}",
        "target": layout.target.name,
        "tp": layout.tp,
        **asked(options),
        **{key: found[key] for key in KEPT},
        "output_bytes": most_bytes(layout),
        "compressed": [fused for _, _, fused in layout.linears() if fused in layout.compressed],
        "uncompressed": sparse.uncompressed,
        "float16_lost": sparse.lost,
        "served_by": [layout.target.runtime] if served else [],
        "not_served_by": sparse.not_served_by,
    }
