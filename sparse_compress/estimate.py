"""What ``sparse-compress run`` will do and take, printed by --dry-run before anything is done."""

from __future__ import annotations

from typing import Any

from ms_quant.estimate import estimate as quantization_estimate
from sparse_compress.request import Request, SparseOptions, most_bytes

KEPT = (
    "algorithm",
    "dtype",
    "blocks",
    "calibration_tokens",
    "disk_bytes",
    "memory_bytes",
    "estimated_seconds",
)


def asked(options: SparseOptions) -> dict[str, Any]:
    """What decides the size: the pruning or the goal."""
    if options.pruned:
        return {"sparsity": options.pruned.share, "pruning": options.pruned.kind}
    goals = {"target_ratio": options.target_ratio, "max_ppl_increase": options.max_ppl_increase}
    return {name: value for name, value in goals.items() if value is not None}


def estimate(request: Request) -> dict[str, Any]:
    """The plan of a job.

    Args:
        request: the checked request.

    Returns:
        JSON: where and how; ``compressed`` and ``uncompressed`` fused linears, the latter with
        the reason (some may join them, when their coded form turns out too long);
        ``output_bytes`` at most; disk, memory and time as ``ms-quant quantize`` estimates them;
        ``float16_lost`` values by tensor; and which runtimes serve the result.
    """
    options, layout = request.options, request.layout
    found = quantization_estimate(request.prepared, options.output)
    served = not request.not_served_by
    return {
        "output": str(options.output),
        "flavour": f"W8A8SC TP{layout.tp}",
        "target": layout.target.name,
        "tp": layout.tp,
        **asked(options),
        **{key: found[key] for key in KEPT},
        "output_bytes": most_bytes(layout),
        "compressed": [fused for _, _, fused in layout.linears() if fused in layout.compressed],
        "uncompressed": request.uncompressed,
        "float16_lost": request.lost,
        "served_by": [layout.target.runtime] if served else [],
        "not_served_by": request.not_served_by,
    }
