"""QuaRot's offline rotations: an ordinary model of the same function, its outliers spread out.

Nothing is done at run time, so any runtime takes the rotated model as it is. Three steps:

1. Every RMSNorm gain that faces the residual stream is multiplied into the columns of the linears
   that read the norm, and becomes 1.
2. With R = diag(signs) H / sqrt(hidden), a token x of the residual stream becomes x @ R. Embedding
   rows and what reads the stream: W @ R. What writes to it: R^T @ W, and b @ R for its bias.
3. The values of every head become v @ H / sqrt(head_dim): by the rows of v_proj and its bias, and
   undone in the columns of o_proj. Attention mixes tokens, not channels, so it does not notice.

With blocks, R and the rotation of a head are block diagonal: H is that of a block, and the signs
are still those of all channels.

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
from ms_quant.models.block_spec import BlockSpec, NormSpec
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
class TensorRotation:
    """How one tensor of the rotated model is made. Axes are 0 (rows) or -1 (columns).

    Attributes:
        source: the tensor it is made from.
        gain: the norm whose gain multiplies the columns.
        stream: the axis along the residual stream.
        heads: the axis along the values of all heads.
        folded: a norm's gain that other tensors take over; it is all ones.
    """

    source: str
    gain: str | None = None
    stream: int | None = None
    heads: int | None = None
    folded: bool = False

    @property
    def mixes_rows(self) -> bool:
        return self.stream == 0 or self.heads == 0


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
        MsQuantError: there is no Hadamard matrix of the hidden size, the head size or the block
            size, blocks do not divide them, or the model is no generating one.
    """

    def __init__(
        self, config: ModelConfig, seed: int, where: str = "config.json", block_size: int = 0
    ):
        for key in ("hidden_size", "head_dim"):
            size = getattr(config, key)
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
        written = next((p for p, norm in config.block(0).norms.items() if norm.writes_stream), None)
        if written:
            raise BadArgumentError(
                f"{where}: quarot turns the residual stream, which {written} of each "
                f"{config.model_type} block writes with a gain for each channel, expected a model "
                "without norms after its branches"
            )
        if config.carried:
            raise BadArgumentError(
                f"{where}: quarot turns the residual stream, which {config.carried[0][0]} and "
                "others of the larger model write, too, expected a text model by itself"
            )
        if seed < 0:
            raise BadArgumentError(f"seed is {seed}, expected at least 0")
        self.config = untied(config)
        self.rotations = rotations(config)
        self._signs = random_signs(config.hidden_size, seed)
        self._block = block_size

    def rotate(self, name: str, x: np.ndarray, gain: np.ndarray | None = None) -> np.ndarray:
        """Rotates a tensor, or a piece that is whole along each axis that its rotation names.

        Pieces have the bits of the whole. Along ``heads`` a piece may hold some of the heads.

        Args:
            name: the tensor's name in the rotated model.
            x: float (out, in) or (out,), finite, of the rotation's source.
            gain: float (in,) where the rotation names one.

        Returns:
            float64 of the shape of ``x``.
        """
        rotation = self.rotations[name]
        if rotation.folded:
            return np.ones(x.shape)
        y = x.astype(np.float64)
        if gain is not None:
            y *= gain
        if rotation.heads is not None:
            size = self._block or self.config.head_dim
            y = _along(rotation.heads, partial(_rotate_blocks, size, name), y)
        if rotation.stream is not None:
            y = _along(rotation.stream, partial(self._rotate_stream, name), y)
        return y

    def _rotate_stream(self, name: str, x: np.ndarray) -> np.ndarray:
        if self._block:
            return _rotate_blocks(self._block, name, x * self._signs)
        return apply_hadamard(x, name, self._signs, sylvester)

    def tensor(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """One tensor of the rotated model, float64, from those of the model by name."""
        rotation = self.rotations[name]
        gain = None if rotation.gain is None else read(rotation.gain)
        return self.rotate(name, read(rotation.source), gain)


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with a head of its own."""
    if not config.tied:
        return config
    return replace(config, tied=False, raw={**config.raw, "tie_word_embeddings": False})


def rotations(config: ModelConfig) -> dict[str, TensorRotation]:
    """Every tensor of the rotated model, by name."""
    found = {
        EMBEDDING: TensorRotation(EMBEDDING, stream=-1),
        NORM: TensorRotation(NORM, folded=True),
        HEAD: TensorRotation(EMBEDDING if config.tied else HEAD, gain=NORM, stream=-1),
    }
    for index in range(config.num_layers):
        prefix = block_prefix(index)
        block = config.block(index)
        for name in block.tensors:
            found[prefix + name] = _of_block(block, prefix, name)
    return found


def _of_block(block: BlockSpec, prefix: str, name: str) -> TensorRotation:
    path, _, kind = name.rpartition(".")
    make, module = partial(TensorRotation, prefix + name), block.modules[path]
    if isinstance(module, NormSpec):
        return make(folded=module.reads_stream)
    if kind == "bias":
        return make(
            stream=0 if module.writes_stream else None,
            heads=0 if module.heads_axis == 0 else None,
        )
    edge, gain, stream = block.edge_of(path), None, None
    if module.reads_stream:
        assert edge is not None, path
        gain, stream = f"{prefix}{edge.producer}.weight", -1
    return make(gain=gain, stream=0 if module.writes_stream else stream, heads=module.heads_axis)


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
