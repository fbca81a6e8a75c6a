"""Writes tests/golden/diffusers.json: what diffusers calls the tensors of small transformers.

Needs torch and diffusers, in an environment of their own:

    python tools/make_golden_diffusers.py tests/golden/diffusers.json [DIRECTORY]

With a directory, the models are saved in it as well, by diffusers itself, with random weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import torch

_SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
_WAN = {
    **_SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "rope_max_seq_len": 64,
}
_COG = {
    **_SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 8,
}
_FLUX = {
    **_SMALL,
    "patch_size": 1,
    "in_channels": 4,
    "num_single_layers": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
_HUNYUAN = {
    **_SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": [8, 12, 12],
}
MODELS = {
    "wan": ("WanTransformer3DModel", _WAN),
    "wan_image": (
        "WanTransformer3DModel",
        {**_WAN, "image_dim": 32, "added_kv_proj_dim": 64, "pos_embed_seq_len": 8},
    ),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", _HUNYUAN),
    "hunyuan_video_image": (
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "guidance_embeds": False, "image_condition_type": "token_replace"},
    ),
    "hunyuan_video_15": (
        "HunyuanVideo15Transformer3DModel",
        {
            **_SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "image_embed_dim": 32,
            "rope_axes_dim": [8, 12, 12],
        },
    ),
    "cogvideox": ("CogVideoXTransformer3DModel", _COG),
    "cogvideox_15": (
        "CogVideoXTransformer3DModel",
        {
            **_COG,
            "patch_size_t": 2,
            "sample_frames": 8,
            "ofs_embed_dim": 32,
            "use_rotary_positional_embeddings": True,
            "patch_bias": False,
        },
    ),
    "cogvideox_image": (
        "CogVideoXTransformer3DModel",
        {
            **_COG,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
    ),
    "flux": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": True}),
    "flux_schnell": ("FluxTransformer2DModel", _FLUX),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            **_SMALL,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": [8, 12, 12],
        },
    ),
}


def main(target: str, directory: str = "") -> None:
    """Builds each model, and writes its config and the names and shapes of its tensors."""
    golden = {"diffusers": diffusers.__version__, "models": {}}
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**config)
        tensors = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        stored = {key: value for key, value in model.config.items() if key != "_use_default_values"}
        golden["models"][name] = {
            "config": {"_class_name": kind, **stored},
            "tensors": tensors,
        }
        if directory:
            model.save_pretrained(Path(directory) / name, safe_serialization=True)
    lines = [f' "{name}": {json.dumps(model)}' for name, model in golden["models"].items()]
    text = f'{{"diffusers": "{golden["diffusers"]}", "models": {{\n' + ",\n".join(lines) + "\n}}\n"
    Path(target).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
