"""What a runtime's transformers and vLLM make of ``config.json``."""

from __future__ import annotations

from ms_quant.formats.structure import is_ours
from ms_quant.models.config import ModelConfig
from ms_quant.models.spellings import READ_BY_NEW, READ_BY_OLD, spelling_problems
from ms_quant.serve.mindformers import CLASSES
from ms_quant.serve.records import Served, ServeRequest

TRANSFORMERS = {
    "vllm-mindspore": ("transformers 4 (0.5.1 asks for 4.57.1)", READ_BY_OLD),
    "vllm-ascend": ("transformers 4, or 5 with a newer vLLM", (*READ_BY_OLD, *READ_BY_NEW)),
    "vllm": ("transformers 4, or 5 with a newer vLLM", (*READ_BY_OLD, *READ_BY_NEW)),
}
"""Runtime to the version that it comes with, and the keys, of those in two places, it reads."""

NATIVE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of the classes known here, those that vllm-mindspore 0.5.1 registers for its Native backend."""


def config_findings(served: Served, request: ServeRequest, config: ModelConfig) -> None:
    """Adds which keys a vLLM reads, and what it computes in another way than transformers."""
    path = request.checkpoint / "config.json"
    served.problems += spelling_problems(config.raw, str(path), is_ours(request.checkpoint))
    version, keys = TRANSFORMERS[request.runtime]
    served.notes.append(
        f"{request.runtime} has {version}, which reads {', '.join(keys)} of config.json and "
        "generation_config.json's eos_token_id before config.json's"
    )
    classes = [name for name in config.raw.get("architectures") or () if isinstance(name, str)]
    able = {*NATIVE, *CLASSES}
    if request.runtime == "vllm-mindspore" and config.routing and not config.latent:
        served.problems.append(
            f"{path}: architectures is {classes}, expected {' or '.join(CLASSES)}: no release of "
            "vllm-mindspore loads quantized experts of other models (its Native backend asserts, "
            "MindFormers quantizes none of them); --format ascend is served by vllm-ascend"
        )
    elif request.runtime == "vllm-mindspore" and classes and not set(classes) & able:
        served.problems.append(
            f"{path}: architectures is {classes}, expected one of {', '.join(NATIVE)}: "
            "vllm-mindspore's Native backend (0.5.1) has no other of these classes"
        )
    if config.model_type == "smollm3":
        served.notes.append(
            "vLLM has SmolLM3 through its Transformers backend only; quantized linears were not "
            "tried there"
        )
    rope = config.raw.get("rope_scaling") or config.raw.get("rope_parameters") or {}
    kind = config.rope["rope_type"]
    if kind == "yarn" and not rope.get("original_max_position_embeddings"):
        served.problems.append(
            f"{path}: the yarn rotary embedding has no original_max_position_embeddings, expected "
            "the length that the model was trained with: vLLM fails without"
        )
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and original and config.max_position / original != rope["factor"]:
        served.notes.append(
            f"{path}: the yarn rotary embedding has factor {rope['factor']}, but "
            f"max_position_embeddings / original_max_position_embeddings is "
            f"{config.max_position / original:g}: transformers 4.51.3 computes with the latter, "
            "4.57.1, vLLM and eval with the factor"
        )
    own = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    if kind == "yarn" and own and config.latent is None:
        served.notes.append(
            f"{path}: vLLM reads no {', '.join(own)} of the yarn rotary embedding and takes what "
            "its factor gives; eval follows transformers"
        )
    if kind == "dynamic":
        served.notes.append(
            f"{path}: vLLM scales the dynamic rotary embedding for the longest context at once, "
            "transformers and eval by the length of the text"
        )
    if not config.predicts:
        what = "labels" if config.labels else "its last hidden states"
        if request.runtime == "vllm-mindspore":
            served.problems.append(
                f"{request.checkpoint}: gives out {what}, expected a model that generates: "
                "vllm-mindspore's Native backend has no pooling models"
            )
            return
        served.notes.append(
            f"the model gives out {what}: it is served for pooling (--runner pooling, --task embed "
            "or classify in older vLLM), not for text"
        )
