"""The rules of upstream vLLM for compressed-tensors checkpoints."""

from __future__ import annotations

from ms_quant.formats.tensor_parallel import rank_problems
from ms_quant.serve.experts import (
    expert_notes,
    expert_problems,
    fused_input_problems,
    method_problems,
    packed_expert_limits,
)
from ms_quant.serve.flat import loaded_rows, open_flat, server_findings
from ms_quant.serve.records import Served, ServeRequest
from ms_quant.serve.vllm_ascend import command


def check(request: ServeRequest) -> Served:
    """What the runtime will do with a checkpoint."""
    structure, served = open_flat(request, ("compressed-tensors",))
    if structure is None:
        return served
    plan = structure.plan
    server_findings(served, request, plan.config)
    served.problems += method_problems(structure)
    served.problems += expert_problems(plan)
    if not served.problems:
        served.problems += fused_input_problems(structure)
        served.problems += rank_problems(plan, request.tp, structure.expected)
    if not served.problems:
        served.loaded = loaded_rows(structure, request.tp)
        served.notes += expert_notes(plan, request.tp)
        limits = packed_expert_limits(plan)
        served.notes += [f"{limits} by versions before 0.31"] if limits else []
        served.command = command(request)
    return served
