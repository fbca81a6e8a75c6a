"""QuaRot's offline rotations: an ordinary model of the same function, its outliers spread out.

Nothing is done at run time, so any runtime takes the rotated model as it is. Three steps:

1. Every RMSNorm gain that faces the residual stream is multiplied into the columns of the linears
   that read the norm, and becomes 1.
2. With R = diag(signs) H / sqrt(hidden), a token x of the residual stream becomes x @ R. Embedding
   rows and what reads the stream: W @ R. What writes to it: R^T @ W, and b @ R for its bias.
3. The values of every head become v @ H / sqrt(head_dim): by the rows of v_proj and its bias, and
   undone in the columns of o_proj. Attention mixes tokens, not channels, so it does not notice. In
   latent attention these are the rows of kv_b_proj that make values.
4. Between two linears with nothing but a norm between them, as q_a_proj and q_b_proj, and the
   latent rows of kv_a_proj and kv_b_proj, the same is done to all channels of that norm, whose gain
   is multiplied into the second linear first.

With blocks, R and every other rotation are block diagonal: H is that of a block, and the signs are
still those of all channels.

A block that predicts a further token reads the last norm's output. Its gain moves into the columns
that read it, over its root mean square: what the second norm divided a token by beside that, the
length of the token times the gain, is not known before, so for these blocks alone the function is
the same only as far as that is one number for all tokens.

Step 2 needs step 1, and RMSNorm: without a gain it is x / |x| up to a constant, and |x @ R| = |x|,
so norm(x @ R) = norm(x) @ R. LayerNorm subtracts a mean along (1, ..., 1), a direction that R
moves; its mean would have to be folded away first. The norms of q and k work within heads that
nothing rotates and keep their gains. The input of down_proj is not rotated: that takes a transform
at run time.

Source: Ashkboos et al., arXiv 2404.00456, stages 1a and 1c without the online transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field

from ms_quant.errors import BadArgumentError
from ms_quant.kernels import sylvester
from ms_quant.models.block_spec import BlockSpec, LinearSpec, NormSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix
from ms_quant.numerics.rotation import apply_hadamard, base_order, random_signs

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class QuarotOptions:
    """Attributes:
    seed: of the signs of the rotations.
    block_size: channels that are rotated together; 0 is all of the residual stream, or of a
        head.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    block_size: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Turn:
    """A rotation along one axis of a tensor.

    Attributes:
        size: channels that are rotated together; the axis consists of such sets.
        stream: whether it is that of the residual stream, which has signs.
        before, after: channels beside each set that stay as they are.
    """

    size: int
    stream: bool = False
    before: int = 0
    after: int = 0

    @property
    def unit(self) -> int:
        """A set and what is beside it."""
        return self.before + self.size + self.after


@dataclass(frozen=True)
class TensorRotation:
    """How one tensor of the rotated model is made.

    Attributes:
        source: the tensor it is made from.
        gains: of the norms whose outputs are its inputs, one after the other: the name of each
            one's, and of the one that is before it, where there is one.
        rows, columns: how it is rotated along them.
        folded: a norm's gain that other tensors take over; it is all ones.
    """

    source: str
    gains: tuple[tuple[str, ...], ...] = ()
    rows: Turn | None = None
    columns: Turn | None = None
    folded: bool = False

    @property
    def turns(self) -> list[tuple[int, Turn]]:
        """Axis, 0 or -1, and rotation; that of the stream comes last."""
        turns = [(0, self.rows), (-1, self.columns)]
        return sorted(
            ((axis, turn) for axis, turn in turns if turn is not None), key=lambda t: t[1].stream
        )


class QuaRot:
    """The rotation of one model.

    Args:
        config: the model.
        seed: of the signs, at least 0.
        where: what to call the config in errors.
        block_size: channels that are rotated together; 0 is all.

    Attributes:
        config: the rotated model. With the last norm's gain in the head only, tied embeddings are
            tied no more, which ``raw`` says too.
        rotations: every tensor of the rotated model, by name.

    Raises:
        MsQuantError: there is no Hadamard matrix of the hidden size, the head size, the ranks of
            latent attention or the block size, blocks do not divide them, or the model is no
            generating one.
    """

    def __init__(
        self, config: ModelConfig, seed: int, where: str = "config.json", block_size: int = 0
    ):
        for key, size in _sizes(config).items():
            if block_size and size % block_size:
                raise BadArgumentError(
                    f"{where}: {key} is {size}, expected a multiple of quarot.block_size "
                    f"{block_size}"
                )
            base_order(block_size or size, "quarot.block_size" if block_size else f"{where}: {key}")
        if config.no_head or config.labels:
            raise BadArgumentError(
                f"{where}: quarot turns the last hidden states, which this model gives out or "
                "classifies by, expected a model with a head of its own or a tied one"
            )
        if seed < 0:
            raise BadArgumentError(f"seed is {seed}, expected at least 0")
        self.config = untied(config)
        self.rotations = rotations(config)
        self._signs = random_signs(config.hidden_size, seed)
        self._block = block_size

    def rotate(self, name: str, x: np.ndarray, gain: np.ndarray | None = None) -> np.ndarray:
        """Rotates a tensor, or a piece that is whole along each axis that its rotation names.

        Pieces have the bits of the whole. Along an axis a piece may hold some of the sets.

        Args:
            name: the tensor's name in the rotated model.
            x: float (out, in) or (out,), finite, of the rotation's source.
            gain: float (in,) of :meth:`gain`.

        Returns:
            float64 of the shape of ``x``.
        """
        rotation = self.rotations[name]
        if rotation.folded:
            return np.ones(x.shape)
        y = x.astype(np.float64)
        if gain is not None:
            y *= gain
        for axis, turn in rotation.turns:
            y = _along(axis, partial(self._turn, turn, name), y)
        return y

    def gain(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray | None:
        """float64 (in,): what the columns of a tensor take over of norms; None for nothing.

        Args:
            name: the tensor's name in the rotated model.
            read: gives the gain of a norm by its name.
        """
        found = []
        for own, *earlier in self.rotations[name].gains:
            gain = read(own).astype(np.float64)
            for one in earlier:
                before = read(one).astype(np.float64)
                gain = gain * (before / np.sqrt(np.square(before).mean()))
            found.append(gain)
        return np.concatenate(found) if found else None

    def _turn(self, turn: Turn, name: str, x: np.ndarray) -> np.ndarray:
        sets = x.reshape(*x.shape[:-1], -1, turn.unit)
        if not turn.stream:
            part = slice(turn.before, turn.before + turn.size)
            turned = _rotate_blocks(self._block or turn.size, name, sets[..., part])
            if turn.unit > turn.size:
                sets = sets.copy()
                sets[..., part] = turned
                turned = sets
        elif self._block:
            turned = _rotate_blocks(self._block, name, sets * self._signs)
        else:
            turned = apply_hadamard(sets, name, self._signs, sylvester)
        return turned.reshape(x.shape)

    def tensor(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """One tensor of the rotated model, float64, from those of the model by name."""
        return self.rotate(name, read(self.rotations[name].source), self.gain(name, read))


def _sizes(config: ModelConfig) -> dict[str, int]:
    """What is rotated together, by the config's keys."""
    latent = config.latent
    if latent is None:
        return {"hidden_size": config.hidden_size, "head_dim": config.head_dim}
    ranks = {"q_lora_rank": latent.q_rank} if latent.q_rank else {}
    ranks |= {"kv_lora_rank": latent.kv_rank, "v_head_dim": latent.value}
    return {"hidden_size": config.hidden_size, **ranks}


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with a head of its own."""
    if not config.tied:
        return config
    return replace(config, tied=False, raw={**config.raw, "tie_word_embeddings": False})


def rotations(config: ModelConfig) -> dict[str, TensorRotation]:
    """Every tensor of the rotated model, by name."""
    stream = Turn(config.hidden_size, stream=True)
    found = {
        EMBEDDING: TensorRotation(EMBEDDING, columns=stream),
        NORM: TensorRotation(NORM, folded=True),
        HEAD: TensorRotation(EMBEDDING if config.tied else HEAD, gains=((NORM,),), columns=stream),
    }
    for block in config.stored_blocks:
        prefix, within = block_prefix(block.index), _Within(block, stream)
        for name in block.tensors:
            found[prefix + name] = within.of(prefix, name)
    return found


class _Within:
    """The rotations of a block's tensors.

    Args:
        block: the block.
        stream: the rotation of the residual stream.
    """

    def __init__(self, block: BlockSpec, stream: Turn):
        self.block, self.stream = block, stream
        self.made = {spec.made_by: spec for spec in block.norms.values() if spec.made_by}
        self.heads = {edge.producer: edge for edge in block.linear_edges}

    def of(self, prefix: str, name: str) -> TensorRotation:
        path, _, kind = name.rpartition(".")
        module, source = self.block.modules[path], prefix + name
        if isinstance(module, NormSpec):
            return TensorRotation(source, folded=_is_folded(module))
        if kind == "bias":
            return TensorRotation(source, rows=self.rows(path, module))
        if kind != "weight":
            return TensorRotation(source)
        gains = tuple(self.gains(prefix, norm) for norm in self.norms(path, module))
        rows, columns = self.rows(path, module), self.columns(path, module)
        return TensorRotation(source, gains, rows, columns)

    def rows(self, path: str, module: LinearSpec) -> Turn | None:
        """How what a linear makes is rotated."""
        if module.writes_stream:
            return self.stream
        if path in self.made:
            size = self.made[path].size
            return Turn(size, after=module.out_features - size)
        if module.heads_axis == 0:
            return Turn(self.heads[path].size, before=self.heads[path].skipped)
        return None

    def columns(self, path: str, module: LinearSpec) -> Turn | None:
        """How what a linear reads is rotated."""
        if module.reads_stream:
            return self.stream
        edge = self.block.edge_of(path)
        if edge is not None and edge.norm and self.block.norms[edge.producer].made_by:
            return Turn(module.in_features)
        return Turn(edge.size) if edge is not None and module.heads_axis == -1 else None

    def gains(self, prefix: str, norm: str) -> tuple[str, ...]:
        """The names of a norm's gain, and of that of the one before it, if there is one."""
        own, behind = f"{prefix}{norm}.weight", self.block.norms[norm].behind
        return (own, f"{behind}.weight") if behind else (own,)

    def norms(self, path: str, module: LinearSpec) -> tuple[str, ...]:
        """The norms whose gains a linear takes over."""
        edge = self.block.edge_of(path)
        if edge is None or not edge.norm:
            return module.norms
        return (edge.producer,) if _is_folded(self.block.norms[edge.producer]) else ()


def _is_folded(norm: NormSpec) -> bool:
    """Whether the linears that read a norm take over its gain."""
    return norm.reads_stream or bool(norm.made_by)


def _rotate_blocks(size: int, name: str, x: np.ndarray) -> np.ndarray:
    """(..., blocks * size), each block times the Hadamard matrix of its size."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return apply_hadamard(blocks, name, stages=sylvester).reshape(x.shape)


def _along(axis: int, rotate: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """``rotate``, which works along the last axis, along the first (0) or the last (-1)."""
    # NumPy multiplies strided operands in another way, slower and perhaps in another order.
    if axis == -1:
        return rotate(np.ascontiguousarray(x))
    return rotate(np.ascontiguousarray(x.T)).T
