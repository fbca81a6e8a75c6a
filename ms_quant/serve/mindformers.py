"""The rules of vllm-mindspore's MindFormers backend for DeepSeek and ``golden-stick``."""

from __future__ import annotations

from collections.abc import Iterator

from ms_quant.files.shards import MAX_INDEX_BYTES
from ms_quant.files.strict_json import read_json
from ms_quant.formats.fused_norms import quotient_notes
from ms_quant.formats.golden_stick import int4
from ms_quant.formats.structure import MAX_DESCRIPTION_BYTES, Structure, is_ours
from ms_quant.formats.tensor_parallel import rank_problems
from ms_quant.models.names import block_prefix
from ms_quant.plan.rules import broken, mixed_experts, summed
from ms_quant.serve.experts import expert_notes, method_problems
from ms_quant.serve.records import Served, ServeRequest

RUNTIME = "vllm-mindspore MindFormers"
ENVIRONMENT = {"VLLM_MS_MODEL_BACKEND": "MindFormers"}
CLASSES = ("DeepseekV3ForCausalLM",)
"""Those whose quantized checkpoints it loads."""
FURTHER = 61
"""The loader knows the block that predicts further tokens by this number."""


def findings(served: Served, request: ServeRequest, structure: Structure) -> None:
    """Adds what the backend needs."""
    plan = structure.plan
    served.problems += method_problems(structure)
    served.problems += summed(mixed_experts(plan))
    served.problems += summed(broken(plan, RUNTIME, request.tp))
    served.problems += _group_size_problems(structure)
    served.problems += _further_problems(structure)
    served.problems += rank_problems(plan, request.tp, structure.expected)
    if served.problems:
        return
    served.notes += quotient_notes(plan, structure.checkpoint)
    served.notes += expert_notes(plan, request.tp)
    served.notes += _row_notes(structure)
    further = plan.config.further_layers
    if further and plan.config.num_layers != FURTHER:
        served.notes.append(
            f"the block that predicts further tokens is {plan.config.num_layers}, the runtime "
            f"looks for {FURTHER}: it is not used"
        )


def _group_size_problems(structure: Structure) -> Iterator[str]:
    """Experts of int4 need the size of their groups in the description."""
    sizes = {
        layer.scheme.weight.group_size
        for layer in structure.plan.distinct
        if layer.scheme.name == int4.SCHEME
    }
    if not sizes:
        return
    where = structure.format.find(structure.checkpoint.directory)[0]
    found = read_json(where, MAX_DESCRIPTION_BYTES).get(int4.KEY)
    if [found] != sorted(sizes):
        yield (
            f"{where}: {int4.KEY} is {found!r:.80}, expected "
            f"{' or '.join(map(str, sorted(sizes)))} as the scales of the experts have: "
            "MindFormers reads it for all of them"
        )


def _further_problems(structure: Structure) -> Iterator[str]:
    """Blocks that predict further tokens are read as those of a float model, through an index."""
    plan, directory = structure.plan, structure.checkpoint.directory
    config = plan.config
    further = range(config.num_layers, config.num_blocks)
    if further and plan.dtype.name != "bfloat16":
        yield (
            f"{directory}: is a {plan.dtype.name} checkpoint, expected bfloat16: MindFormers reads "
            "blocks that predict further tokens so"
        )
    maps = [
        read_json(path, MAX_INDEX_BYTES).get("weight_map")
        for path in sorted(directory.glob("*index.json"))
    ]
    listed = {name for found in maps if isinstance(found, dict) for name in found}
    missing = [
        name
        for name in structure.expected
        if any(name.startswith(block_prefix(index)) for index in further) and name not in listed
    ]
    if missing:
        yield (
            f"{directory}: no index names {missing[0]!r}, expected an *index.json that does: "
            "MindFormers finds blocks that predict further tokens by it"
        )


def _row_notes(structure: Structure) -> list[str]:
    if is_ours(structure.checkpoint.directory):
        return []
    return [
        "rotary rows of q_b_proj and kv_a_proj_with_mqa are taken as permuted, evens first: no "
        "tensor tells, ms-quant verify --source does"
    ]
