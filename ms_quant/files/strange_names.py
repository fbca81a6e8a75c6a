"""Why a checkpoint's tensors are not those of its float model, as far as their names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ms_quant.errors import MsQuantError

FIRST_BLOCK = "layers.0."
FLOAT_HINT = "expected the float checkpoint that it was made from"

QUANTIZED: tuple[tuple[str, str], ...] = (
    (
        r"\.quant_state\.bitsandbytes__\w+|\.SCB|\.weight\.(absmax|quant_map|nested_absmax)",
        "bitsandbytes",
    ),
    (r"\.(weight_global_scale|weight_scale_2)", "NVFP4 of llm-compressor or ModelOpt"),
    (r"\.(weight_packed|weight_shape)", "llm-compressor (compressed-tensors)"),
    (r"\.g_idx", "GPTQ"),
    (r"\.(qweight|qzeros)", "AWQ or GPTQ"),
    (r"\.weight_scale_inv", "FP8 in blocks, as DeepSeek and Qwen publish it"),
    (r"\.(deq_scale|quant_bias|weight_offset)", "msModelSlim or Golden Stick"),
    (
        r"\.(input_scale|weight_scale|activation_scale|input_zero_point)",
        "llm-compressor, ModelOpt or msModelSlim",
    ),
    (r"\.(scales|biases)", "MLX"),
    (r"\.weight\._(data|scale|shift)", "quanto"),
    (r"\.(W_q|q_weight|q_perm|q_invperm|codebooks)", "HQQ, EXL2 or AQLM"),
)
"""Endings of tensors that only quantized checkpoints have, and who writes them."""

WRAPPERS: tuple[tuple[str, str], ...] = (
    ("_orig_mod.", "torch.compile: save the module inside, model._orig_mod"),
    ("_fsdp_wrapped_module.", "FSDP: save its full state dict"),
    ("_checkpoint_wrapped_module.", "activation checkpointing: save the module inside"),
    ("_forward_module.", "a trainer: save the module inside"),
    ("base_model.model.", "PEFT: save merge_and_unload() of it"),
    ("module.", "DataParallel: save the module inside, model.module"),
)
"""Parts of names that a wrapper leaves, and what to do."""

PREFIXES: dict[str, str] = {
    "": "the names of a base model without its `model.` (as AutoModel saves it): load it with "
    "AutoModelForCausalLM and save it with save_pretrained",
    "model.language_model.": "the text model inside of a vision-language model",
    "language_model.model.": "the text model inside of a vision-language model",
    "model.text_model.": "the text model inside of another model",
    "thinker.model.": "the text model inside of an omni model",
    "transformer.": "another class's names",
}
"""What stands before ``layers.0`` in place of ``model.``, and whose names these are."""

STRANGERS: tuple[tuple[str, str], ...] = (
    (
        r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.|\.(base_layer|modules_to_save)\.",
        "holds an adapter (LoRA) that is not merged, expected a whole model: load it with peft and "
        "save merge_and_unload()",
    ),
    (
        r"(^|\.)layers\.\d+\.(attention\.wq|feed_forward\.w1)\.weight",
        "has the names of Meta's or Mistral's original layout, expected those of transformers: its "
        "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py makes them",
    ),
    (r"^blk\.\d+\.|^token_embd\.", "has the names of GGUF, expected those of transformers"),
    (
        r"\.layers\.\d+\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.weight",
        "holds fused q/k/v or gate/up weights, expected a tensor for each as transformers has them",
    ),
    (
        r"^(transformer\.h|gpt_neox\.layers|decoder\.layers|encoder\.layers?)\.\d+\.",
        "has the names of another kind of model, expected those of the model_type in config.json",
    ),
)
"""Names of other layouts, and what a checkpoint with them is."""


HEADS = ("score.weight", "classifier.weight", "v_head.weight", "value_head.weight")


def refuse_strange_names(
    where: str, codes: Mapping[str, str], expected: Sequence[str], floats: Sequence[str]
) -> None:
    """Refuses tensors whose names or types show a cause that is not the config's.

    Args:
        where: the model directory, for errors.
        codes: name of each tensor to the type it is stored in, such as ``"BF16"``.
        expected: the names of the float model.
        floats: the types that a float model has.

    Raises:
        MsQuantError: says what the checkpoint is.
    """
    missing = [name for name in expected if name not in codes]
    integers = [name for name in expected if codes.get(name, floats[0]) not in floats]
    unknown = sorted(set(codes) - set(expected))
    if not (missing or integers or unknown):
        return
    reason = (
        _quantized(codes, unknown, integers)
        or _other_layout(unknown)
        or _wrapped(unknown)
        or _other_prefix(missing, unknown)
        or _headless(missing, unknown)
    )
    if reason:
        raise MsQuantError(f"{where}: {reason}")


def _quantized(codes: Mapping[str, str], unknown: Sequence[str], integers: Sequence[str]) -> str:
    for pattern, who in QUANTIZED:
        found = [name for name in unknown if re.search(f"({pattern})$", name)]
        if found:
            return (
                f"is quantized ({found[0]!r} and {len(found)} such tensors, as of {who}), but "
                f"its config.json does not say so; {FLOAT_HINT}"
            )
    if len(integers) > len(codes) // 4:
        first = integers[0]
        return f"{len(integers)} tensors such as {first!r} are {codes[first]}; {FLOAT_HINT}"
    return ""


def _other_layout(unknown: Sequence[str]) -> str:
    for pattern, what in STRANGERS:
        found = [name for name in unknown if re.search(pattern, name)]
        if found:
            return f"{what} (tensor {found[0]!r})"
    return ""


def _wrapped(unknown: Sequence[str]) -> str:
    for part, what in WRAPPERS:
        found = [name for name in unknown if f".{part}" in f".{name}"]
        if found:
            return (
                f"{len(found)} tensors such as {found[0]!r} have {part!r} in their names, expected "
                f"{found[0].replace(part, '')!r}; it is left by {what}"
            )
    return ""


def _other_prefix(missing: Sequence[str], unknown: Sequence[str]) -> str:
    wanted = next((name for name in missing if FIRST_BLOCK in name), "")
    first = wanted[wanted.find(FIRST_BLOCK) :]
    found = [name for name in unknown if first and name.endswith(first)]
    if not found:
        return ""
    prefix = min((name.removesuffix(first) for name in found), key=len)
    whose = PREFIXES.get(prefix, "the names of another class than the causal model of transformers")
    named = f"tensors begin with {prefix!r}" if prefix else "no tensor begins with 'model.'"
    return f"{named} ({found[0]!r}), expected {wanted!r}; these are {whose}"


def _headless(missing: Sequence[str], unknown: Sequence[str]) -> str:
    if list(missing) != ["lm_head.weight"]:
        return ""
    heads = [name for name in unknown if name in HEADS]
    what = f"a classifier or reward model ({heads[0]!r})" if heads else "a base or embedding model"
    return (
        f"has no 'lm_head.weight', and config.json does not say tie_word_embeddings; it is {what}, "
        "expected a causal language model"
    )
