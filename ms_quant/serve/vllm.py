"""The rules of upstream vLLM for compressed-tensors checkpoints."""

from __future__ import annotations

from ms_quant.formats.tensor_parallel import rank_problems
from ms_quant.plan.rules import limited_weight_only_experts, mixed_experts, summed
from ms_quant.serve.experts import expert_notes, fused_input_problems, method_problems
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
    served.problems += summed(mixed_experts(plan))
    if not served.problems:
        served.problems += fused_input_problems(structure)
        served.problems += rank_problems(plan, request.tp, structure.expected)
    if not served.problems:
        served.loaded = loaded_rows(structure, request.tp)
        served.notes += expert_notes(plan, request.tp)
        limits = summed(limited_weight_only_experts(plan))
        served.notes += [f"{limit} by versions before 0.31" for limit in limits]
        served.command = command(request)
    return served
