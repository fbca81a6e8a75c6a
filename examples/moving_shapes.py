"""Small videos for examples/diffusion.py: two shapes move over a pattern, in flickering light.

A clip is float32 (frames, height, width, channels), most of it within -2 and 2. Four words say what
the shapes are: kind and colour of one, kind and colour of the other, which is in front. The pattern
stays, the shapes move and are reflected at the borders, and each frame has a tint of its own. So a
network that denoises a clip gains by looking along time (pattern), within a frame (tint), along the
paths of shapes, and at the words.

NumPy alone: the tool that trains the network and the tests import this file.
"""

from __future__ import annotations

import numpy as np

FRAMES, SIDE, CHANNELS, PATCH = 8, 16, 3, 2
GRID = (FRAMES, SIDE // PATCH, SIDE // PATCH)
TOKENS, VALUES = FRAMES * (SIDE // PATCH) ** 2, PATCH * PATCH * CHANNELS
KINDS = ("disk", "square")
COLOURS = {
    "black": (-1, -1, -1),
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "magenta": (1, -1, 1),
    "cyan": (-1, 1, 1),
    "white": (1, 1, 1),
}
WORDS = (*KINDS, *COLOURS)
TEXT = 4
"""Words of a prompt."""

BRIGHT, PATTERN, TINT = 1.2, 0.35, 0.25


def words(prompt: str) -> np.ndarray:
    """The words of a prompt such as ``"disk red square cyan"``, int32 (4,)."""
    found = prompt.split()
    wanted = (KINDS, COLOURS, KINDS, COLOURS)
    if len(found) != TEXT or any(w not in few for w, few in zip(found, wanted, strict=True)):
        raise ValueError(
            f"prompt: {prompt!r}, expected kind, colour, kind and colour, as 'disk red square "
            f"cyan'; kinds: {', '.join(KINDS)}; colours: {', '.join(COLOURS)}"
        )
    return np.array([WORDS.index(word) for word in found], np.int32)


def clips(count: int, seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Clips, float32 (count, 8, 16, 16, 3), and their prompts, int32 (count, 4)."""
    rng = np.random.default_rng(seed)
    made = [_clip(rng) for _ in range(count)]
    return np.stack([clip for clip, _ in made]), np.stack([prompt for _, prompt in made])


def _clip(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    clip = np.repeat(_pattern(rng)[None], FRAMES, axis=0)
    prompt = []
    for _ in range(2):
        kind, colour = rng.integers(len(KINDS)), rng.integers(len(COLOURS))
        shade = BRIGHT * np.array(list(COLOURS.values())[colour]) + rng.normal(0, 0.1, CHANNELS)
        clip[_shape(rng, kind)] = shade
        prompt += [kind, len(KINDS) + colour]
    clip += rng.normal(0, TINT, (FRAMES, 1, 1, CHANNELS))
    return clip.astype(np.float32), np.array(prompt, np.int32)


def _pattern(rng: np.random.Generator) -> np.ndarray:
    """Three waves of low frequency, (height, width, channels)."""
    at = (np.arange(SIDE) + 0.5) / SIDE
    total = np.zeros((SIDE, SIDE, CHANNELS))
    for _ in range(3):
        down, across = rng.integers(-3, 4, 2)
        wave = np.cos(2 * np.pi * (down * at[:, None] + across * at + rng.random()))
        total += wave[..., None] * rng.normal(0, PATTERN, CHANNELS)
    return total


def _shape(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Where a moving shape is, bool (frames, height, width)."""
    radius = rng.uniform(0.12, 0.22)
    places = rng.random(2) + rng.uniform(-0.12, 0.12, 2) * np.arange(FRAMES)[:, None]
    places = np.abs((places + 1) % 2 - 1)  # reflected at 0 and 1
    at = (np.arange(SIDE) + 0.5) / SIDE
    down = np.abs(at[:, None] - places[:, 0, None, None])
    across = np.abs(at - places[:, 1, None, None])
    return np.maximum(down, across) < radius if kind else down**2 + across**2 < radius**2


def to_tokens(videos: np.ndarray) -> np.ndarray:
    """(count, 8, 16, 16, 3) to (count, 512, 12): patches of 2x2 pixels, in raster order."""
    count, side = len(videos), SIDE // PATCH
    split = videos.reshape(count, FRAMES, side, PATCH, side, PATCH, CHANNELS)
    return np.ascontiguousarray(split.transpose(0, 1, 2, 4, 3, 5, 6)).reshape(count, TOKENS, VALUES)


def to_videos(tokens: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_tokens`."""
    count, side = len(tokens), SIDE // PATCH
    split = tokens.reshape(count, FRAMES, side, side, PATCH, PATCH, CHANNELS)
    joined = np.ascontiguousarray(split.transpose(0, 1, 2, 4, 3, 5, 6))
    return joined.reshape(count, FRAMES, SIDE, SIDE, CHANNELS)


def noise(count: int, seed: int) -> np.ndarray:
    """What sampling starts from, float32 (count, 512, 12)."""
    return np.random.default_rng(seed).normal(size=(count, TOKENS, VALUES)).astype(np.float32)
