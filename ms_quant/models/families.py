"""The family table: what is known about each decoder, as data.

A new family that is built from the same parts is one row of ``FAMILIES``.
"""

from __future__ import annotations

from dataclasses import dataclass

KEYS, VALUES = "self_attn.k_proj", "self_attn.v_proj"
CACHED = (KEYS, VALUES)
"""The linears whose outputs a generation caches, by path in a block."""


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same input, and so share activation parameters.

    Attributes:
        name: short name of the group.
        members: paths of the linears, relative to the block.
        fused: path of the single linear that serving runtimes fuse them into.
        parallel: ``"column"`` (outputs are split over ranks) or ``"row"`` (inputs are split).
        feed: path of what makes the input, where a smoothing vector may be folded: a norm, or a
            linear whose output reaches this group channel by channel.
        by_head: whether the feed is one of value heads, each of which several query heads read.
    """

    name: str
    members: tuple[str, ...]
    fused: str
    parallel: str
    feed: str = ""
    by_head: bool = False

    @property
    def feeds_from_norm(self) -> bool:
        """Whether the input comes from a norm."""
        return self.feed.endswith("norm")

    @property
    def in_mlp(self) -> bool:
        """Whether the linears are in the second half of the block."""
        return self.members[0].startswith("mlp.")


GATED_DECODER_GROUPS = (
    LinearGroup(
        "qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.qkv_proj",
        "column",
        "input_layernorm",
    ),
    LinearGroup(
        "o", ("self_attn.o_proj",), "self_attn.o_proj", "row", "self_attn.v_proj", by_head=True
    ),
    LinearGroup(
        "gate_up",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.gate_up_proj",
        "column",
        "post_attention_layernorm",
    ),
    LinearGroup("down", ("mlp.down_proj",), "mlp.down_proj", "row", "mlp.up_proj"),
)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        qkv_bias: True, or the name of the config key that decides.
        o_bias: True, False, or the name of the config key that decides.
        mlp_bias: True, False, or the name of the config key that decides.
        qk_norm: RMS norm over each head of q and k before the rotary embedding.
        groups: the quantizable linears of a block.
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    groups: tuple[LinearGroup, ...] = GATED_DECODER_GROUPS


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True),
}
