"""The rules of vllm-mindspore for ``--quantization golden-stick``: of its Native backend, and what
both backends ask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ms_quant.formats.structure import Structure
from ms_quant.serve import mindformers
from ms_quant.serve.experts import fused_input_problems
from ms_quant.serve.flat import loaded_rows, open_flat, server_findings
from ms_quant.serve.records import Served, ServeRequest

SERVED = ("W8A8",)
DESCRIPTIONS = (  # the runtime takes the one file whose name ends so
    "quantization_description.json",
    "quant_model_description.json",
    "quant_model_description_w8a8sc.json",
)
SMALLEST_NORMAL = np.finfo(np.float16).tiny
SMALLEST = np.finfo(np.float16).smallest_subnormal
NATIVE = {"VLLM_MS_MODEL_BACKEND": "Native"}
ON_310P = {
    "MS_ENABLE_LCCL": "off",
    "HCCL_OP_EXPANSION_MODE": "AI_CPU",
    "MS_ENABLE_INTERNAL_BOOST": "off",
    "MS_ALLOC_CONF": "enable_vmm:true",
}


def environment(device: str) -> dict[str, str]:
    """The variables that the runtime's documentation asks for on a device."""
    return {**NATIVE, **(ON_310P if device == "310p" else {})}


def command(request: ServeRequest, *flags: str) -> list[str]:
    """The command that serves a checkpoint."""
    ranks = ["--tensor-parallel-size", str(request.tp)]
    return [
        *("vllm-mindspore", "serve", str(request.checkpoint)),
        *("--quantization", "golden-stick"),
        *flags,
        *ranks,
    ]


def check(request: ServeRequest) -> Served:
    """What the runtime will do with a checkpoint that is not split over ranks."""
    device = request.device or "910b"
    structure, served = open_flat(request, ("golden-stick",))
    served.device = device
    if structure is None:
        return served
    config = structure.plan.config
    server_findings(served, request, config)
    served.problems += _description_problems(request)
    if config.latent is not None:
        mindformers.findings(served, request, structure)
        if not served.problems:
            served.problems += fused_input_problems(structure)
            served.loaded = loaded_rows(structure, request.tp)
            served.command, served.environment = command(request), mindformers.ENVIRONMENT
        return served
    served.problems += _scheme_problems(structure)
    if served.problems:
        return served
    served.problems += fused_input_problems(structure)
    flags = []
    if device == "310p":
        served.problems += _lost_on_310p(structure, served)
        if config.dtype == "bfloat16":
            flags = ["--dtype", "float16"]
            served.notes.append("a 310P has no bfloat16: the command serves in float16")
    served.loaded = loaded_rows(structure, request.tp)
    served.command, served.environment = command(request, *flags), environment(device)
    return served


def _description_problems(request: ServeRequest) -> Iterator[str]:
    names = sorted(
        path.name for path in request.checkpoint.glob("*.json") if path.name.endswith(DESCRIPTIONS)
    )
    if len(names) != 1:
        yield (
            f"{request.checkpoint}: has the descriptions {', '.join(names)}, expected one: the "
            "runtime refuses several"
        )


def _scheme_problems(structure: Structure) -> Iterator[str]:
    for name in dict.fromkeys(layer.scheme.name for layer in structure.plan.distinct):
        if name not in SERVED:
            yield (
                f"{structure.checkpoint.directory}: {name} is not served by "
                f"vllm-mindspore's Native backend, expected {', '.join(SERVED)}"
            )


def _lost_on_310p(structure: Structure, served: Served) -> Iterator[str]:
    """What float16 does to ``deq_scale``, to which the runtime casts float32 on a 310P."""
    total = small = 0
    for path in structure.plan.quantized():
        scale = structure.checkpoint.read(f"{path}.deq_scale")
        lost = int(np.count_nonzero(scale < SMALLEST / 2))
        if lost:
            yield (
                f"{path}.deq_scale: {lost} of {scale.size} values become 0 in float16, to which "
                "the runtime casts them on a 310P, expected W8A8SC there (sparse-compress run)"
            )
        total, small = total + scale.size, small + int(np.count_nonzero(scale < SMALLEST_NORMAL))
    if small:
        served.notes.append(
            f"{small} of {total} values of deq_scale are below {SMALLEST_NORMAL:.3g} and lose "
            "precision: the runtime casts them to float16 on a 310P, W8A8SC keeps them"
        )
