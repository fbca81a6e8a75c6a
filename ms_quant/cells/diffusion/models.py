"""The diffusion networks of mindone whose attention is known: a row for each.

Networks are told apart by the names of their classes, so that nothing here imports mindone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor

from ms_quant.cells.diffusion.function import LatentShape, Pictures

CROSS, TEXT_ALONE = "cross", "text alone"

Grid = Callable[[Any, Mapping[str, Any]], Pictures | None]
"""Called with the network's config and its named arguments."""


@dataclass(frozen=True)
class Model:
    """What is known of a network.

    Attributes:
        tokens: pattern of paths to what an attention's tokens are: where the text stands among
            them, ``"cross"``, or ``"text alone"``.
        grid: the latent shape of a call, None where its tokens are no grid.
    """

    tokens: Mapping[str, str]
    grid: Grid


def _patched(sizes: tuple[int, ...], patch: tuple[int, ...]) -> LatentShape:
    frames, height, width = (n // p for n, p in zip(sizes, patch, strict=True))
    return frames, height, width


def _wan(config: Any, given: Mapping[str, Any]) -> LatentShape:
    return _patched(given["hidden_states"].shape[2:], tuple(config.patch_size))


def _cogvideox(config: Any, given: Mapping[str, Any]) -> LatentShape:
    _, frames, _, height, width = given["hidden_states"].shape
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    return _patched((frames, height, width), patch)


def _hunyuan_video(config: Any, given: Mapping[str, Any]) -> LatentShape:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return _patched(given["hidden_states"].shape[2:], patch)


def _sd3(config: Any, given: Mapping[str, Any]) -> LatentShape:
    height, width = given["hidden_states"].shape[2:]
    return 1, height // config.patch_size, width // config.patch_size


def _flux(config: Any, given: Mapping[str, Any]) -> LatentShape | None:
    """From the places of the tokens, if these are all of a grid in order."""
    ids = given["img_ids"]
    ids = ids.asnumpy() if isinstance(ids, Tensor) else np.asarray(ids)
    places = (ids[0] if ids.ndim == 3 else ids).astype(np.int64)
    frames, height, width = (places.max(axis=0) + 1).tolist()
    expected = np.indices((frames, height, width)).reshape(3, -1).T
    return (frames, height, width) if np.array_equal(places, expected) else None


def _qwen_image(config: Any, given: Mapping[str, Any]) -> Pictures:
    """Pictures of one size follow each other like frames."""
    shapes = given["img_shapes"]
    pictures = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    if len({tuple(picture) for picture in pictures}) > 1:
        return tuple((int(f), int(h), int(w)) for f, h, w in pictures)
    frames, height, width = pictures[0]
    return frames * len(pictures), height, width


def _ltx(config: Any, given: Mapping[str, Any]) -> LatentShape | None:
    if any(given.get(name) is None for name in ("num_frames", "height", "width")):
        return None
    return given["num_frames"], given["height"], given["width"]


_BLOCKS, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
MODELS: dict[str, Model] = {
    "WanTransformer3DModel": Model({"blocks.*.attn1": "none", "blocks.*.attn2": CROSS}, _wan),
    "CogVideoXTransformer3DModel": Model({f"{_BLOCKS}.attn1": "first"}, _cogvideox),
    "HunyuanVideoTransformer3DModel": Model(
        {
            "context_embedder.*": TEXT_ALONE,
            f"{_BLOCKS}.attn": "last",
            f"{_SINGLE}.attn": "last",
        },
        _hunyuan_video,
    ),
    "FluxTransformer2DModel": Model(
        {f"{_BLOCKS}.attn": "first", f"{_SINGLE}.attn": "first"}, _flux
    ),
    "SD3Transformer2DModel": Model({f"{_BLOCKS}.attn": "last", f"{_BLOCKS}.attn2": "none"}, _sd3),
    "QwenImageTransformer2DModel": Model({f"{_BLOCKS}.attn": "first"}, _qwen_image),
    "LTXVideoTransformer3DModel": Model(
        {f"{_BLOCKS}.attn1": "none", f"{_BLOCKS}.attn2": CROSS}, _ltx
    ),
}
