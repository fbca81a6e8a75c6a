"""Tiny networks of mindone with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor, nn

TEXT, WIDE = 16, 32


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return Tensor((np.random.default_rng(seed).standard_normal(shape) * scale).astype("f4"))


@dataclass(frozen=True)
class Network:
    """How one of them is made and called.

    Attributes:
        name: of its class in mindone.diffusers.
        settings: of the class.
        inputs: makes what it is called with.
        latent_shape: frames, height and width of the tokens of a picture.
        text: where text tokens stand in joint attention: "none", "first" or "last".
        quantized: patterns of the paths whose attention is self attention over the picture.
        family: of its attention.
    """

    name: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    latent_shape: tuple[int, int, int]
    text: str
    own: tuple[str, ...]
    family: str
    left: tuple[str, ...] = field(default=())

    def build(self) -> nn.Cell:
        from mindone import diffusers

        network = getattr(diffusers, self.name)(**self.settings)
        rng = np.random.default_rng(1)
        for _, parameter in network.parameters_and_names():
            shape = parameter.shape
            spread = 1 / np.sqrt(np.prod(shape[1:]) or 1) if len(shape) > 1 else 0.1
            value = rng.standard_normal(shape) * spread + (parameter.name.endswith("norm") * 1.0)
            parameter.set_data(Tensor(value.astype("f4")))
        return network.set_train(False)


def run(network: nn.Cell, inputs: dict[str, Any]) -> np.ndarray:
    """What it computes."""
    out = network(**inputs, return_dict=False)
    return (out[0] if isinstance(out, tuple | list) else out).asnumpy()


def timestep() -> Tensor:
    return Tensor(np.array([500.0], "f4"))


def _wan():
    return {
        "hidden_states": floats(1, 4, 4, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
    }


def _cogvideox():
    from mindone.diffusers.models.embeddings import get_3d_rotary_pos_embed

    cos, sin = get_3d_rotary_pos_embed(64, ((0, 0), (8, 8)), (8, 8), 3)
    return {
        "hidden_states": floats(1, 3, 4, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "image_rotary_emb": (cos, sin),
    }


def _hunyuan():
    kept = np.ones((1, TEXT), bool)
    kept[:, 12:] = False
    return {
        "hidden_states": floats(1, 4, 4, 16, 16),
        "timestep": timestep(),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "encoder_attention_mask": Tensor(kept),
        "pooled_projections": floats(1, 24, seed=3),
        "guidance": Tensor(np.array([6000.0], "f4")),
    }


def _flux():
    ids = np.zeros((16, 16, 3), "f4")
    ids[..., 1], ids[..., 2] = np.mgrid[:16, :16]
    return {
        "hidden_states": floats(1, 256, 16),
        "timestep": Tensor(np.array([0.5], "f4")),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "pooled_projections": floats(1, 24, seed=3),
        "img_ids": Tensor(ids.reshape(-1, 3)),
        "txt_ids": Tensor(np.zeros((TEXT, 3), "f4")),
    }


def _sd3():
    return {
        "hidden_states": floats(1, 4, 32, 32),
        "timestep": timestep(),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "pooled_projections": floats(1, 24, seed=3),
    }


def _qwen():
    return {
        "hidden_states": floats(1, 256, 16),
        "timestep": Tensor(np.array([0.5], "f4")),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "encoder_hidden_states_mask": Tensor(np.ones((1, TEXT), bool)),
        "img_shapes": [(1, 16, 16)],
        "txt_seq_lens": [TEXT],
    }


def _ltx():
    kept = np.ones((1, TEXT), "f4")
    kept[:, 12:] = 0
    return {
        "hidden_states": floats(1, 256, 16),
        "timestep": timestep(),
        "encoder_hidden_states": floats(1, TEXT, WIDE, seed=2),
        "encoder_attention_mask": Tensor(kept),
        "num_frames": 4,
        "height": 8,
        "width": 8,
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
ROPE = {"axes_dims_rope": (16, 24, 24)}
NETWORKS = {
    "Wan": Network(
        "WanTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDE,
            "freq_dim": 32,
            "ffn_dim": 128,
            "num_layers": 2,
        },
        _wan,
        (4, 8, 8),
        "none",
        ("blocks.{0,1}.attn1",),
        "dispatch",
        ("blocks.{0,1}.attn2",),
    ),
    "CogVideoX": Network(
        "CogVideoXTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": WIDE,
            "num_layers": 2,
            "time_embed_dim": 32,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
        },
        _cogvideox,
        (3, 8, 8),
        "first",
        ("transformer_blocks.{0,1}.attn1",),
        "method",
    ),
    "HunyuanVideo": Network(
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDE,
            "pooled_projection_dim": 24,
            "rope_axes_dim": (16, 24, 24),
        },
        _hunyuan,
        (4, 8, 8),
        "last",
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        "method",
        ("context_embedder.token_refiner.refiner_blocks.0.attn",),
    ),
    "Flux": Network(
        "FluxTransformer2DModel",
        {
            **HEADS,
            **ROPE,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": WIDE,
            "pooled_projection_dim": 24,
        },
        _flux,
        (1, 16, 16),
        "first",
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        "dispatch",
    ),
    "SD3": Network(
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": WIDE,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
        },
        _sd3,
        (1, 16, 16),
        "last",
        ("transformer_blocks.{0,1}.attn", "transformer_blocks.0.attn2"),
        "method",
    ),
    "QwenImage": Network(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            **ROPE,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": WIDE,
        },
        _qwen,
        (1, 16, 16),
        "first",
        ("transformer_blocks.{0,1}.attn",),
        "dispatch",
    ),
    "LTX": Network(
        "LTXVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "caption_channels": WIDE,
            "cross_attention_dim": 128,
        },
        _ltx,
        (4, 8, 8),
        "none",
        ("transformer_blocks.{0,1}.attn1",),
        "dispatch",
        ("transformer_blocks.{0,1}.attn2",),
    ),
}
