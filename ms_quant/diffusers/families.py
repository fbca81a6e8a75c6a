"""The transformers of diffusers that are known, as data; ``tools/make_golden_diffusers.py`` asks
diffusers itself for their names.

A linear that is quantized is one of the repeated blocks: attention's q, k, v and output, those of
the text beside it, MLPs. Modulation, embedders and the last projection stay float, as vllm-omni
computes them in float.
"""

from __future__ import annotations

from collections.abc import Mapping

from ms_quant.diffusers.family import Family, Letters, Stack

Group = Mapping[str, tuple[str, str]]


def _each(*paths: str, shape: tuple[str, str] = ("d", "d")) -> tuple[Group, ...]:
    """Linears of which each is one group."""
    return tuple({path: shape} for path in paths)


def _together(place: str, *names: str) -> Group:
    """Linears of one place that are fused."""
    return {f"{place}.{name}": ("d", "d") for name in names}


def _mlp(place: str) -> tuple[Group, ...]:
    return {f"{place}.net.0.proj": ("f", "d")}, {f"{place}.net.2": ("d", "f")}


def _linears(place: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{place}.{name}" for name in names)


QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
TWO = ("linear_1", "linear_2")
FUSED: Mapping[tuple[str, ...], str] = {QKV: "to_qkv", ADDED_QKV: "add_kv_proj"}
WIDTH = ("num_attention_heads", "attention_head_dim")
FOUR_TIMES: Letters = {"d": (WIDTH, ""), "f": (WIDTH, 4.0)}
BY_RATIO: Letters = {"d": (WIDTH, ""), "f": (WIDTH, "mlp_ratio")}
NORMS = _linears("attn", "norm_q", "norm_k")
ADDED_NORMS = _linears("attn", "norm_added_q", "norm_added_k")
GUIDANCE = _linears("time_text_embed.guidance_embedder", *TWO)
TIME_AND_TEXT = (
    *_linears("time_text_embed.timestep_embedder", *TWO),
    *_linears("time_text_embed.text_embedder", *TWO),
)
REFINER = (
    *_linears("context_embedder.time_text_embed.timestep_embedder", *TWO),
    *_linears("context_embedder.time_text_embed.text_embedder", *TWO),
    "context_embedder.proj_in",
)
REFINER_BLOCKS = Stack(
    "context_embedder.token_refiner.refiner_blocks",
    "num_refiner_layers",
    floats=(
        *("norm1", "norm2", "norm_out.linear", "ff.net.0.proj", "ff.net.2"),
        *_linears("attn", *QKV, "to_out.0"),
    ),
)
LAST = ("norm_out.linear", "proj_out")


def _double(text: str, image: str = "ff", kept: str = "") -> Stack:
    """Blocks in which image and text have weights of their own and attend together."""
    modulation = ("img_mod.1", "txt_mod.1") if image == "img_mlp" else ()
    return Stack(
        "transformer_blocks",
        "num_layers",
        (
            _together("attn", *QKV),
            _together("attn", *ADDED_QKV),
            *_each("attn.to_out.0", "attn.to_add_out"),
            *_mlp(image),
            *_mlp(text),
        ),
        floats=modulation or ("norm1.linear", "norm1_context.linear"),
        optional=(*NORMS, *ADDED_NORMS),
        kept=kept,
    )


SINGLE = Stack(
    "single_transformer_blocks",
    "num_single_layers",
    (
        _together("attn", *QKV),
        {"proj_mlp": ("f", "d")},
        {"proj_out": ("d", "d+f")},
    ),
    floats=("norm.linear",),
    optional=NORMS,
)
"""Blocks of one stream, whose attention and MLP read the same input."""

_WAN = Family(
    "WanTransformer3DModel",
    {"d": (WIDTH, ""), "f": (("ffn_dim",), ""), "a": (("added_kv_proj_dim",), "")},
    (
        Stack(
            "blocks",
            "num_layers",
            (
                _together("attn1", *QKV),
                *_each(*_linears("attn2", *QKV), "attn1.to_out.0", "attn2.to_out.0"),
                *_mlp("ffn"),
            ),
            tuple(("added_kv_proj_dim", {f"attn2.{name}": ("d", "a")}) for name in ADDED_QKV[1:]),
            floats=("scale_shift_table",),
            optional=(
                *("norm2", "attn2.norm_added_k"),
                *_linears("attn1", "norm_q", "norm_k"),
                *_linears("attn2", "norm_q", "norm_k"),
            ),
        ),
    ),
    (
        *("scale_shift_table", "patch_embedding", "condition_embedder.time_proj", "proj_out"),
        *_linears("condition_embedder.time_embedder", *TWO),
        *_linears("condition_embedder.text_embedder", *TWO),
    ),
    (
        *_linears("condition_embedder.image_embedder", "pos_embed", "norm1", "norm2"),
        *_linears("condition_embedder.image_embedder.ff.net", "0.proj", "2"),
    ),
    {QKV: "to_qkv"},
    (
        (".ffn.net.0.proj", ".ffn.net_0.proj"),
        (".ffn.net.2", ".ffn.net_2"),
        (".to_out.0", ".to_out"),
    ),
)

_HUNYUAN = Family(
    "HunyuanVideoTransformer3DModel",
    BY_RATIO,
    (_double("ff_context"), SINGLE, REFINER_BLOCKS),
    ("x_embedder.proj", *REFINER, *TIME_AND_TEXT, *LAST),
    GUIDANCE,
    native=False,
)

_HUNYUAN_15 = Family(
    "HunyuanVideo15Transformer3DModel",
    BY_RATIO,
    (_double("ff_context"), REFINER_BLOCKS),
    (
        *("x_embedder.proj", "cond_type_embed", *REFINER, *LAST),
        *_linears("image_embedder", "norm_in", *TWO, "norm_out"),
        *_linears("context_embedder_2", "norm", *TWO, "linear_3"),
        *_linears("time_embed.timestep_embedder", *TWO),
    ),
    _linears("time_embed.timestep_embedder_r", *TWO),
    FUSED,
)

_COGVIDEOX = Family(
    "CogVideoXTransformer3DModel",
    FOUR_TIMES,
    (
        Stack(
            "transformer_blocks",
            "num_layers",
            (_together("attn1", *QKV), *_each("attn1.to_out.0"), *_mlp("ff")),
            floats=("norm1.linear", "norm2.linear"),
            optional=("norm1.norm", "norm2.norm", *_linears("attn1", "norm_q", "norm_k")),
        ),
    ),
    (
        *("patch_embed.proj", "patch_embed.text_proj", *_linears("time_embedding", *TWO)),
        *LAST,
    ),
    ("patch_embed.pos_embedding", *_linears("ofs_embedding", *TWO), "norm_final", "norm_out.norm"),
    native=False,
)

_FLUX = Family(
    "FluxTransformer2DModel",
    FOUR_TIMES,
    (
        _double("ff_context", kept="vllm-omni 0.30 computes Flux's transformer_blocks in float"),
        SINGLE,
    ),
    (*TIME_AND_TEXT, "context_embedder", "x_embedder", *LAST),
    GUIDANCE,
    FUSED,
)

_QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    FOUR_TIMES,
    (_double("txt_mlp", "img_mlp"),),
    (
        *_linears("time_text_embed.timestep_embedder", *TWO),
        *("txt_norm", "img_in", "txt_in", *LAST),
    ),
    ("time_text_embed.addition_t_embedding",),
    FUSED,
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (_WAN, _HUNYUAN, _HUNYUAN_15, _COGVIDEOX, _FLUX, _QWEN_IMAGE)
}
"""By the class that ``config.json`` names."""
