"""Which tokens of a sequence are video, and where in it: latent frames x height x width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from ms_quant.errors import BadArgumentError


@dataclass(frozen=True)
class Clip:
    """One video in a sequence, in raster order (frames, height, width) from token ``start`` on."""

    start: int
    frames: int
    height: int
    width: int

    @property
    def frame(self) -> int:
        """The tokens of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.frame


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a sequence: clips, and what is no video (text, mostly) anywhere beside them."""

    tokens: int
    clips: tuple[Clip, ...]

    @classmethod
    def of(
        cls, latent_shape: Sequence[int], tokens: int, text: int = 0, text_first: bool = True
    ) -> TokenGrid:
        """A clip with text before or after it.

        Args:
            latent_shape: frames, height and width of the latent after patching.
            tokens: of the sequence.
            text: how many of them are no video.
            text_first: whether these come first, as in CogVideoX, Flux and QwenImage; in
                HunyuanVideo they come last.

        Raises:
            MsQuantError: the latent shape does not multiply to the tokens that are video.
        """
        shape = _shape(latent_shape, "latent_shape")
        if text < 0 or shape[0] * shape[1] * shape[2] + text != tokens:
            times = " x ".join(map(str, shape))
            raise BadArgumentError(
                f"latent_shape: {times} = {shape[0] * shape[1] * shape[2]} tokens and {text} of "
                f"text, expected {tokens} together"
            )
        return cls(tokens, (Clip(text if text_first else 0, *shape),))

    @classmethod
    def of_spans(cls, spans: Sequence[Mapping[str, Any]], tokens: int) -> TokenGrid:
        """Several clips, as MindIE-SD's ``video_spans`` has them.

        Args:
            spans: {"start": first token, "latent_shape": [frames, height, width]} of each clip, in
                order, not overlapping, within the sequence.

        Raises:
            MsQuantError: a span is malformed, lies beyond the sequence or overlaps the one before.
        """
        clips, end = [], 0
        if not spans:
            raise BadArgumentError("video_spans: none, expected at least one clip")
        for number, span in enumerate(spans):
            name = f"video_spans[{number}]"
            if not isinstance(span, Mapping) or set(span) != {"start", "latent_shape"}:
                raise BadArgumentError(f"{name}: {span!r}, expected start and latent_shape")
            clip = Clip(span["start"], *_shape(span["latent_shape"], f"{name}.latent_shape"))
            if not _is_count(clip.start) or clip.start < end:
                raise BadArgumentError(
                    f"{name}: starts at {clip.start}, expected a token from {end} on"
                )
            end = clip.start + clip.tokens
            if end > tokens:
                raise BadArgumentError(f"{name}: ends at {end}, expected at most {tokens} tokens")
            clips.append(clip)
        return cls(tokens, tuple(clips))

    @property
    def others(self) -> np.ndarray:
        """The tokens that are no video, int64, ascending."""
        other = np.ones(self.tokens, bool)
        for clip in self.clips:
            other[clip.start : clip.start + clip.tokens] = False
        return np.flatnonzero(other)

    def single(self, what: str) -> Clip:
        """The only clip.

        Raises:
            MsQuantError: there are several; ``what`` names who takes one alone.
        """
        if len(self.clips) != 1:
            raise BadArgumentError(f"{what}: {len(self.clips)} clips, expected one")
        return self.clips[0]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def _shape(latent_shape: Sequence[int], name: str) -> tuple[int, int, int]:
    try:
        shape = tuple(latent_shape)
    except TypeError:
        shape = ()
    if len(shape) != 3 or not all(_is_count(n) and n > 0 for n in shape):
        raise BadArgumentError(
            f"{name}: {latent_shape!r}, expected frames, height and width, integers from 1"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])
