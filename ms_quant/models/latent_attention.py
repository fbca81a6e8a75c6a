"""Multi-head latent attention: keys and values of all heads are made of one small vector a token.

Two forms compute the same. Where the tokens of a forward are all there are, keys and values are
made of the latent vectors; where a generation goes on, queries are brought to the latent space
("absorbed"), so that the cache holds one vector a token for all heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ms_quant import kernels
from ms_quant.models.attention import TAPS, attend
from ms_quant.models.block_spec import (
    Branch,
    CacheSpec,
    Division,
    LinearGroup,
    LinearSpec,
    NormSpec,
    Operators,
)
from ms_quant.models.cache import StepCaches
from ms_quant.models.edge import Edge
from ms_quant.models.rotary_rows import RotaryRows

if TYPE_CHECKING:
    from ms_quant.models.block_forward import Positions
    from ms_quant.models.cache import AnyCache, KeyValueCache
    from ms_quant.models.config import ModelConfig
    from ms_quant.models.latent_shape import LatentShape

KINDS = "qkv_a", "q", "kv_a", "q_b", "o"
"""What recipes call the groups of this attention."""
LATENT, ABSORBED = "latent vectors", "absorbed queries"
OUTSIDE = 10_000
"""In a vendor's range of queries and of keys one in so many values may lie outside."""
NORM_EPS = 1e-6
"""Of the norms within it, whatever the config says of the others."""


class LatentAttention(Branch):
    """Multi-head latent attention, a branch of its own.

    Args:
        config: the model's shape.
        path: its path in the block.
        norm: path of the norm before it.
        caches: whether a generation caches what it reads.

    Attributes:
        shape: its sizes.
    """

    title = "attention"
    taps = *TAPS, LATENT, ABSORBED, "attention output"
    rotary = True

    def __init__(
        self,
        config: ModelConfig,
        path: str = "self_attn",
        norm: str = "input_layernorm",
        caches: bool = True,
    ):
        assert config.latent is not None
        self.path, self.norm, self.heads = path, norm, config.num_heads
        self.shape: LatentShape = config.latent
        self.scale = self.shape.scale(config.rope)
        hidden, heads, bias, shape = config.hidden_size, self.heads, config.qkv_bias, self.shape
        q_a, q_b, kv_a, kv_b, o = (f"{path}.{name}" for name in LINEARS)
        self.q = f"{path}.q_proj" if not shape.q_rank else q_b
        whole = Division("column", "num_attention_heads", heads)
        out = Division("row", "num_attention_heads", heads)
        queries, key = heads * shape.query, shape.kv_rank + shape.rope
        of_key = RotaryRows(key, shape.rope) if shape.interleaved else None
        of_query = RotaryRows(shape.query, shape.rope) if shape.interleaved else None
        compressed = LinearSpec(key, hidden, bias, reads_stream=True, rotary_rows=of_key)
        made = heads * (shape.nope + shape.value)
        expanded = LinearSpec(made, shape.kv_rank, division=whole, heads_axis=0)
        output = LinearSpec(
            hidden, heads * shape.value, config.o_bias, out, writes_stream=True, heads_axis=-1
        )
        kv_norm = f"{path}.kv_a_layernorm"
        within = {kv_norm: NormSpec(shape.kv_rank, False, NORM_EPS, kv_a)}
        if shape.q_rank:
            first = {q_a: LinearSpec(shape.q_rank, hidden, bias, reads_stream=True)}
            both = {**first, kv_a: compressed}
            last = {q_b: LinearSpec(queries, shape.q_rank, division=whole, rotary_rows=of_query)}
            q_norm = f"{path}.q_a_layernorm"
            within = {q_norm: NormSpec(shape.q_rank, False, NORM_EPS, q_a), **within}
            makers: tuple[LinearGroup, ...] = (
                LinearGroup("qkv_a", "qkv_a", both, f"{path}.fused_qkv_a_proj", "attention"),
                LinearGroup("q_b", "q_b", last, q_b, "attention"),
            )
            edges = [
                Edge(norm, ("qkv_a",), norm=True, fused=True),
                Edge(q_norm, ("q_b",), norm=True, fused=True),
            ]
            linears = {**both, **last}
        else:
            linears = {
                self.q: LinearSpec(
                    queries, hidden, division=whole, reads_stream=True, rotary_rows=of_query
                ),
                kv_a: compressed,
            }
            makers = (
                LinearGroup("q", "q", {self.q: linears[self.q]}, self.q, "attention"),
                LinearGroup("kv_a", "kv_a", {kv_a: compressed}, kv_a, "attention"),
            )
            edges = [Edge(norm, ("q", "kv_a"), norm=True)]
        self.modules = {norm: NormSpec(hidden), **linears, kv_b: expanded, o: output, **within}
        self.groups = (*makers, LinearGroup("o", "o", {o: output}, o, "attention"))
        values = Edge(kv_b, ("o",), size=shape.value, skipped=shape.nope, averaged=True)
        self.edges = (*edges, Edge(kv_norm, (), norm=True, floats=(kv_b,)), values)
        self.last = (o,)
        if caches:
            self.cached = {
                f"{path}.fa_q": CacheSpec(ABSORBED, heads, True, OUTSIDE),
                f"{path}.fa_k": CacheSpec(LATENT, 1, True, OUTSIDE),
                f"{path}.fa_v": CacheSpec(LATENT, 1, True),
            }

    def inner(
        self, ops: Operators, x: np.ndarray, at: Positions, cache: AnyCache | None
    ) -> np.ndarray:
        """The input of o_proj, (B, S, heads * value channels)."""
        shape, tokens = self.shape, x.shape[:2]
        rows = ops.norm(self.norm, x)
        q = self._queries(ops, rows).reshape(*tokens, self.heads, shape.query)
        a = ops.linear(f"{self.path}.kv_a_proj_with_mqa", rows).reshape(*tokens, -1)
        latent = ops.norm(f"{self.path}.kv_a_layernorm", a[..., : shape.kv_rank])
        angles = at.angles()
        turned = self._turned(q[..., shape.nope :], angles)
        key = self._turned(a[..., None, shape.kv_rank :], angles)
        held = latent[:, None]
        ops.show(LATENT, held)
        if ops.shows(ABSORBED):
            ops.show(ABSORBED, self._brought(ops, q[..., : shape.nope]))
        if isinstance(cache, StepCaches):
            alone = q[
                0, :, None, :, : shape.nope
            ]  # as texts of one token, whose products are alike
            brought = self._brought(ops, alone).transpose(2, 1, 0, 3)
            read = cache.attend_latent(brought, turned, key, held, self.scale)
            y = self._brought_back(ops, read.transpose(1, 0, 2, 3))
        else:
            y = self._attended(ops, q[..., : shape.nope], turned, key, held, at.mask, cache)
        y = y.reshape(*tokens, -1)
        ops.show(self.taps[-1], y)
        return ops.between(f"{self.path}.o_proj input", y)

    def _attended(
        self,
        ops: Operators,
        q: np.ndarray,
        turned: np.ndarray,
        key: np.ndarray,
        latent: np.ndarray,
        mask: np.ndarray,
        cache: KeyValueCache | None,
    ) -> np.ndarray:
        """What the heads give, (B, S, heads, value channels)."""
        tokens = q.shape[1]
        if cache is not None:
            key, latent = cache.extend(key, latent)
        if cache is not None and (cache.absorbs or latent.shape[2] > tokens):
            brought = cache.queries(self._brought(ops, q))
            return self._absorbed(ops, brought, turned, key, latent, mask)
        queries = np.concatenate([q.transpose(0, 2, 1, 3), turned], axis=3)
        return self._expanded(ops, queries, key, latent, mask)

    def _queries(self, ops: Operators, rows: np.ndarray) -> np.ndarray:
        if self.shape.q_rank:
            low = ops.linear(f"{self.path}.q_a_proj", rows)
            rows = ops.norm(f"{self.path}.q_a_layernorm", low)
        return ops.linear(self.q, rows)

    def _turned(self, x: np.ndarray, angles: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Rotary channels (B, S, heads, D) as (B, heads, S, D), first of all pairs, then second."""
        if self.shape.interleaved:
            x = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return kernels.rope(x, *angles)

    def _expanded(
        self, ops: Operators, q: np.ndarray, key: np.ndarray, latent: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Attention with keys and values of every head."""
        shape, (batch, _, length, _) = self.shape, latent.shape
        made = ops.linear(f"{self.path}.kv_b_proj", latent[:, 0])
        made = made.reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
        shared = np.broadcast_to(key, (batch, self.heads, length, shape.rope))
        k = np.concatenate([made[..., : shape.nope], shared], axis=3)
        v = np.ascontiguousarray(made[..., shape.nope :])
        for tap, heads in zip(TAPS, (q, k, v), strict=True):
            ops.show(tap, heads)
        return attend(q, k, v, mask, budget=ops.budget, scale=self.scale)

    def _brought(self, ops: Operators, q: np.ndarray) -> np.ndarray:
        """Queries (B, S, heads, D) brought to the latent space, (B, heads, S, rank)."""
        return np.matmul(q.transpose(0, 2, 1, 3), self._expanding(ops)[:, : self.shape.nope])

    def _expanding(self, ops: Operators) -> np.ndarray:
        """What makes keys and values of latent vectors, (heads, channels of both, rank)."""
        made = ops.parameter(f"{self.path}.kv_b_proj.weight")
        return made.reshape(self.heads, -1, self.shape.kv_rank)

    def _absorbed(
        self,
        ops: Operators,
        brought: np.ndarray,
        turned: np.ndarray,
        key: np.ndarray,
        latent: np.ndarray,
        mask: np.ndarray,
    ) -> np.ndarray:
        """Attention in the latent space, of queries that were brought there; what is read of it is
        brought back."""
        queries = np.concatenate([brought, turned], axis=3)
        keys = np.concatenate([latent, key], axis=3)
        y = attend(queries, keys, latent, mask, budget=ops.budget, scale=self.scale)
        return self._brought_back(ops, y)

    def _brought_back(self, ops: Operators, y: np.ndarray) -> np.ndarray:
        """What is read in the latent space, (B, S, heads, rank), as values of each head."""
        values = self._expanding(ops)[:, self.shape.nope :].transpose(0, 2, 1)
        return np.matmul(y.transpose(0, 2, 1, 3), values).transpose(0, 2, 1, 3)

    def outer(self, ops: Operators, inner: np.ndarray) -> np.ndarray:
        """o_proj of it."""
        return ops.linear(f"{self.path}.o_proj", inner)


LINEARS = "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"
