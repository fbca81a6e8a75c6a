"""The rules of vllm-ascend for checkpoints that are not split over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ms_quant.files.strict_json import read_json
from ms_quant.formats.structure import MAX_DESCRIPTION_BYTES, Structure
from ms_quant.formats.tensor_parallel import rank_problems
from ms_quant.models.names import GroupId, block_prefix
from ms_quant.numerics.activation import StaticInt8
from ms_quant.numerics.reciprocal import NEARLY_EXACT, reciprocal_error
from ms_quant.plan.plan import Plan, all_groups
from ms_quant.plan.rules import broken, mixed_experts, summed
from ms_quant.serve.experts import expert_notes, fused_input_problems, method_problems
from ms_quant.serve.flat import loaded_rows, open_flat, server_findings
from ms_quant.serve.records import Served, ServeRequest

NEWER_DEVICE = ("FP8", "MX")
OLD = "up to 0.25"


def command(request: ServeRequest, *flags: str) -> list[str]:
    """The command that serves a checkpoint."""
    ranks = ["--tensor-parallel-size", str(request.tp)]
    return ["vllm", "serve", str(request.checkpoint), *flags, *ranks]


def check(request: ServeRequest) -> Served:
    """What the runtime will do with a checkpoint that is not split over ranks."""
    structure, served = open_flat(request, ("ascend", "compressed-tensors"))
    served.device = request.device or "910b"
    if structure is None:
        return served
    plan = structure.plan
    server_findings(served, request, plan.config)
    served.problems += _scheme_problems(structure, request, served)
    served.problems += summed(mixed_experts(plan))
    served.problems += _unknown_names(structure)
    if served.device == "310p" and plan.config.dtype == "bfloat16":
        served.problems.append(
            f"{request.checkpoint}: is a bfloat16 checkpoint, expected float16 on a 310P "
            "(ms-quant quantize --dtype float16): what is stored depends on it"
        )
    if not served.problems:
        served.problems += fused_input_problems(structure)
        served.problems += rank_problems(plan, request.tp, structure.expected)
    if served.problems:
        return served
    served.loaded = loaded_rows(structure, request.tp)
    served.notes += _reciprocal_notes(structure)
    served.notes += expert_notes(plan, request.tp)
    served.notes += _attention_notes(plan)
    served.notes += _cache_notes(plan)
    ours = structure.format.name == "ascend"
    served.command = command(request, *(("--quantization", "ascend") if ours else ()))
    return served


def _scheme_problems(structure: Structure, request: ServeRequest, served: Served) -> Iterator[str]:
    if structure.format.name == "ascend":  # of another format the reason is another runtime's
        yield from method_problems(structure)
    plan = structure.plan
    yield from summed(broken(plan, "vllm-ascend", request.tp))
    layers = ((plan.layers[found], group.routed) for found, group in all_groups(plan.config))
    names = {
        (layer.scheme.name, routed): layer.storage.support for layer, routed in layers if layer
    }
    for (name, routed), support in names.items():
        by = [text for text in support.runtimes(routed) if text.startswith("vllm-ascend")]
        if not by:
            yield (
                f"{request.checkpoint}: {name} in the {structure.format.name} format is not "
                "served by vllm-ascend (ms-quant schemes lists what is)"
            )
            continue
        served.notes += [f"{name} is served by {by[0]} only"] if OLD in by[0] else []
        if not any(part in name for part in NEWER_DEVICE):
            continue
        text = f"{name} needs float8 or float4 types, which an Ascend 910B or 310P does not have"
        if request.device:
            yield f"{request.checkpoint}: {text}"
        else:
            served.notes.append(text)


def _attention_notes(plan: Plan) -> Iterator[str]:
    """Which attention in the latent space has its first linears fused."""
    for index in range(plan.config.num_layers if plan.config.latent else 0):
        block = plan.config.block(index)
        for group in block.groups:
            layer, edge = plan.layers[GroupId(index, group.name)], block.producer_of(group)
            static = layer is not None and isinstance(layer.scheme.activation, StaticInt8)
            if edge is not None and edge.fused and not static:
                yield (
                    f"{block_prefix(index)}{group.members[0]} is not W8A8: vllm-ascend's fused "
                    "preprocessing of attention (MLAPO) is off in such layers, with a warning"
                )
                return


def _cache_notes(plan: Plan) -> Iterator[str]:
    """Where latent attention has a cache in int8."""
    if plan.config.latent is not None and plan.kv_cache:
        yield (
            "latent vectors are cached in int8 only on instances that decode for others (consumers "
            "of a key-value cache)"
        )


def _reciprocal_notes(structure: Structure) -> Iterator[str]:
    """Static inputs whose codes are off, as they are multiplied by a rounded reciprocal."""
    names = [name for name in structure.expected if name.endswith(".input_scale")]
    scales = [structure.checkpoint.read_float32(name)[0] for name in names]
    dtype = structure.plan.dtype
    errors = reciprocal_error(np.array(scales, np.float32), dtype)
    wrong = int(np.count_nonzero(~(errors <= NEARLY_EXACT)))
    if wrong:
        worst = int(errors.argmax())
        yield (
            f"inputs are multiplied by 1 / input_scale in {dtype.name}: {wrong} of {len(names)} "
            f"are off by more than 0.1 %, {names[worst]} by {100 * errors[worst]:.2f} %; ms-quant "
            "quantize --format ascend chooses scales whose reciprocals are not"
        )


def _unknown_names(structure: Structure) -> Iterator[str]:
    """Types by names that msModelSlim writes and the runtime has not registered."""
    aliases = structure.format.leeway.aliases
    for where in structure.format.find(structure.checkpoint.directory) if aliases else ():
        described = read_json(where, MAX_DESCRIPTION_BYTES).values()
        values = [value for value in described if isinstance(value, str)]
        for name in sorted(aliases.keys() & set(values)):
            yield (
                f"{where}: calls a type {name}, expected {aliases[name]}, the name by which "
                "vllm-ascend knows it"
            )
