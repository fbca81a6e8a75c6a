"""Multi-head latent attention as a Cell; :mod:`ms_quant.models.latent_attention` defines it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from ms_quant.budget import BUDGET, Budget
from ms_quant.cells.attention import Heads
from ms_quant.cells.direct import as_type, floats
from ms_quant.cells.layers import RMSNorm, dense, project, repeat_rows, rotate_half_matrix
from ms_quant.models import latent_attention
from ms_quant.models.config import ModelConfig


def selection(size: int, channels: np.ndarray) -> np.ndarray:
    """The M with ``x @ M == x[:, channels]``; exact, one term each."""
    return np.eye(size, dtype=np.float32)[:, channels]


class _Positions(NamedTuple):
    """What the definition asks of :class:`~ms_quant.models.block_forward.Positions`."""

    table: tuple[np.ndarray, np.ndarray]
    mask: np.ndarray

    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        return self.table


class _Operators:
    """The Cells of an attention as the definition calls them, for one call.

    Args:
        cell: the attention.
        x: its input, which its norm has given.
        decode: as of the attention.
    """

    def __init__(self, cell: LatentAttention, x: Tensor, decode: bool):
        self.cell, self.x, self.rows, self.decode = cell, x, floats(x), decode
        self.budget = cell.budget

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        return x if path == self.cell.branch.norm else floats(self._cell(path)(self._tensor(x)))

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        y = project(self._cell(path), self._tensor(x), self.decode)
        return floats(y).reshape(-1, y.shape[-1])

    def parameter(self, name: str) -> np.ndarray:
        cell, _, parameter = name.rpartition(".")
        return floats(getattr(self._cell(cell), parameter))

    def between(self, place: str, x: np.ndarray) -> np.ndarray:
        return x

    def shows(self, tap: str) -> bool:
        return False

    def show(self, tap: str, x: np.ndarray) -> None:
        """Nobody looks on."""

    def _cell(self, path: str) -> nn.Cell:
        return getattr(self.cell, path.rpartition(".")[2])

    def _tensor(self, x: np.ndarray) -> Tensor:
        # Linears that read one input are known by its being one tensor.
        return self.x if x is self.rows else as_type(np.ascontiguousarray(x), self.x.dtype)


class LatentAttention(Heads):
    """Causal self-attention whose keys and values are made of one small vector a token.

    Without a cache, or where it holds nothing yet, keys and values of every head are made. Later
    tokens of a generation bring their queries to the latent space ("absorbed"), if ``kv_b_proj`` is
    a float linear; a quantized one makes keys and values of all cached tokens again, which costs
    more with each.

    Args:
        config: the model's shape.
        index: the layer.
        budget: what bounds its memory.

    Inputs:
        - **x** - (B, S, hidden).
        - **cos**, **sin** - (S, rotary channels of a head).
        - **mask** - additive, (B or 1, 1, S, T).
        - **cache** - None, or a :class:`KeyValueCache` layer slot that holds earlier tokens: of
          each the key that all heads share, and the vector that the others are made of.
        - **decode** - as of :class:`~ms_quant.cells.attention.Attention`.
    """

    def __init__(self, config: ModelConfig, index: int = 0, budget: Budget = BUDGET):
        spec = config.block(index)
        branch = spec.branches[0]
        assert isinstance(branch, latent_attention.LatentAttention)
        super().__init__(branch.scale, budget)
        self.branch, self.heads, shape = branch, branch.heads, branch.shape
        self.nope, self.kv_rank, self.compressed = shape.nope, shape.kv_rank, bool(shape.q_rank)
        for path, linear in spec.linears.items():
            if path.startswith(f"{branch.path}."):
                cell = dense(linear.in_features, linear.out_features, linear.bias)
                setattr(self, path.rpartition(".")[2], cell)
        for path, norm in spec.norms.items():
            if path.startswith(f"{branch.path}."):
                eps = config.rms_norm_eps if norm.eps is None else norm.eps
                setattr(self, path.rpartition(".")[2], RMSNorm(norm.size, eps))
        channels, turn = np.arange(shape.rope), rotate_half_matrix(shape.rope)
        if shape.interleaved:
            channels = np.concatenate([channels[0::2], channels[1::2]])
        nope, rank = np.arange(shape.nope), np.arange(shape.kv_rank)
        of_query = selection(shape.query, shape.nope + channels)
        of_key = selection(shape.kv_rank + shape.rope, shape.kv_rank + channels)
        made = shape.nope + shape.value
        self.query_plain = Tensor(selection(shape.query, nope))
        self.query_rope, self.query_turned = Tensor(of_query), Tensor(of_query @ turn)
        self.key_rope, self.key_turned = Tensor(of_key), Tensor(of_key @ turn)
        self.latent = Tensor(selection(shape.kv_rank + shape.rope, rank))
        self.made_key = Tensor(selection(made, nope))
        self.made_value = Tensor(selection(made, np.arange(shape.nope, made)))

    def _direct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        """The same as ``construct``, by the definition; other Cells than a float ``kv_b_proj`` have
        no weight that it could absorb."""
        if cache is not None and not isinstance(self.kv_b_proj, nn.Dense):
            return nn.Cell.__call__(self, x, cos, sin, mask, cache, decode)
        operators = _Operators(self, x, decode)
        at: Any = _Positions((floats(cos), floats(sin)), floats(mask))
        with np.errstate(all="ignore"):
            y = self.branch.inner(operators, operators.rows, at, cache)
        return project(self.o_proj, as_type(y, x.dtype), decode)

    def construct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache=None,
        decode: bool = False,
    ) -> Tensor:
        batch, length, _ = x.shape
        q = self.queries(x, decode).reshape(batch, length, self.heads, -1)
        q = self.transpose_heads(q)
        a = project(self.kv_a_proj_with_mqa, x, decode)
        latent = self.kv_a_layernorm(times(a, self.latent)).reshape(batch, 1, length, -1)
        a = a.reshape(batch, 1, length, -1)
        key = self.rotate(a, self.key_rope, self.key_turned, cos, sin)
        plain = times(q, self.query_plain)
        turned = self.rotate(q, self.query_rope, self.query_turned, cos, sin)
        absorbs = False
        if cache is not None:
            key, latent = cache.append(key, latent)
            absorbs = latent.shape[2] > length and isinstance(self.kv_b_proj, nn.Dense)
        if absorbs:
            y = self.absorbed(plain, turned, key, latent, mask)
        else:
            y = self.expanded(ops.concat((plain, turned), 3), key, latent, mask, decode)
        return project(self.o_proj, self.transpose_heads(y).reshape(batch, length, -1), decode)

    def queries(self, x: Tensor, decode: bool) -> Tensor:
        if self.compressed:
            x = self.q_a_layernorm(project(self.q_a_proj, x, decode))
            return project(self.q_b_proj, x, decode)
        return project(self.q_proj, x, decode)

    def rotate(self, x: Tensor, kept: Tensor, turned: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotary channels of (B, heads, S, D): first those of all pairs, then the second."""
        plain = times(x, kept)
        count = x.shape[0] * x.shape[1]
        cos, sin = repeat_rows(cos, count), repeat_rows(sin, count)
        return plain * cos.reshape(plain.shape) + times(x, turned) * sin.reshape(plain.shape)

    def expanded(
        self, q: Tensor, key: Tensor, latent: Tensor, mask: Tensor, decode: bool
    ) -> Tensor:
        """Attention with keys and values of every head."""
        batch, _, total, size = key.shape
        made = project(self.kv_b_proj, latent.reshape(batch, total, -1), decode)
        made = made.reshape(batch, total, self.heads, -1)
        shared = ops.bmm(
            ops.ones((batch * total, self.heads, 1), key.dtype), key.reshape(-1, 1, size)
        )
        shared = shared.reshape(batch, total, self.heads, size)
        k = self.transpose_heads(ops.concat((times(made, self.made_key), shared), 3))
        return self.attend(q, k, self.transpose_heads(times(made, self.made_value)), mask)

    def absorbed(
        self, plain: Tensor, turned: Tensor, key: Tensor, latent: Tensor, mask: Tensor
    ) -> Tensor:
        """Attention in the latent space: queries are brought there, and what is read back."""
        weight = self.kv_b_proj.weight.reshape(self.heads, -1, self.kv_rank)
        brought = ops.matmul(plain, weight[:, : self.nope])
        queries = ops.concat((brought, turned), 3)
        y = self.attend(queries, ops.concat((latent, key), 3), latent, mask)
        return ops.matmul(y, weight[:, self.nope :].swapaxes(1, 2))


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix over the last axis."""
    rows = ops.matmul(x.reshape(-1, matrix.shape[0]), matrix)
    return rows.reshape(x.shape[:-1] + (matrix.shape[1],))
