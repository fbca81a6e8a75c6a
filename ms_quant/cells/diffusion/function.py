"""What may stand in the place of an attention: a function of queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mindspore import Tensor

LatentShape = tuple[int, int, int]
Pictures = LatentShape | tuple[LatentShape, ...]
"""The latent shape of a picture, or of several of other sizes that follow each other."""
TEXT = ("none", "first", "last")
"""Where the text tokens of joint attention stand among the tokens of the picture."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention of a network: where it is, and what its tokens are.

    Attributes:
        path: of the Cell; "" for an attention that is called alone.
        text: of ``TEXT``; "" where nothing says it.
        latent_shape: frames, height and width of the picture's tokens, or a tuple of those of
            pictures that follow each other; None where nothing says it.
        original: what the network itself makes of queries, keys and values, in the same layout;
            None where it has nothing of its own.
    """

    path: str = ""
    text: str = ""
    latent_shape: Pictures | None = None
    original: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def pictures(shape: Pictures) -> tuple[LatentShape, ...]:
    """Of one or several."""
    several = isinstance(shape, tuple) and bool(shape) and isinstance(shape[0], tuple)
    return shape if several else (shape,)  # type: ignore[return-value]


class AttentionFunction(Protocol):
    """Called with queries, keys and values, after norms and rotary positions.

    They and what it returns are of (batch, heads, length, size) where ``layout`` is ``"BNSD"``, and
    of (batch, length, heads, size) where it is ``"BSND"``. ``mask`` is None, bool (true where a key
    counts), or float (added to the scores), and broadcasts to (batch, heads, length, keys).
    ``scale`` multiplies scores; None stands for 1 / sqrt(size).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
    ) -> Tensor: ...
