"""The sizes of multi-head latent attention, read from ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.models.config_values import flag, positive_int


@dataclass(frozen=True)
class LatentShape:
    """The sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        q_rank: channels between ``q_a_proj`` and ``q_b_proj``; 0 where one ``q_proj`` makes the
            queries.
        kv_rank: channels of what is cached of keys and values.
        nope: channels of a head's queries and keys without rotary embedding.
        rope: those with it; all heads share one such key.
        value: channels of a head's values.
        interleaved: whether rotary pairs are neighbours; else they are halves apart.
    """

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool = True

    @property
    def query(self) -> int:
        """Channels of a head's queries and keys."""
        return self.nope + self.rope

    def scale(self, rope: Mapping[str, Any]) -> float:
        """What scores are multiplied by.

        Args:
            rope: rotary parameters; those of YaRN make it larger.
        """
        every, factor = rope.get("mscale_all_dim"), float(rope.get("factor") or 1)
        scale = self.query**-0.5
        if rope["rope_type"] == "default" or not every or factor <= 1:
            return scale
        return scale * (0.1 * float(every) * math.log(factor) + 1) ** 2


def read_latent(raw: Mapping[str, Any], where: str) -> LatentShape:
    """The sizes that a config gives.

    Args:
        raw: the content of ``config.json``, with defaults.
        where: the file, for errors.

    Raises:
        MsQuantError: a key has a wrong value.
    """
    rank, interleave = raw.get("q_lora_rank"), raw.get("rope_interleave")
    shape = LatentShape(
        q_rank=0 if rank is None else positive_int(raw, "q_lora_rank", where),
        kv_rank=positive_int(raw, "kv_lora_rank", where),
        nope=positive_int(raw, "qk_nope_head_dim", where),
        rope=positive_int(raw, "qk_rope_head_dim", where),
        value=positive_int(raw, "v_head_dim", where),
        interleaved=interleave is None or flag("rope_interleave", raw, where),
    )
    if shape.rope % 2:
        raise BadFileError(
            f"{where}: qk_rope_head_dim {shape.rope} is odd, the rotary embedding needs pairs"
        )
    heads, keys = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if keys not in (None, heads):
        raise BadFileError(
            f"{where}: num_key_value_heads is {keys!r:.80}, expected {heads} as "
            "num_attention_heads, or null: latent attention has keys for every head"
        )
    return shape
