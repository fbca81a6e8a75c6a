"""Several texts that begin alike in one forward: what they share is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ms_quant.models.block_forward import Positions

if TYPE_CHECKING:
    from ms_quant.models.config import ModelConfig


class TreePositions(Positions):
    """Where the tokens of a tree of texts stand. Tokens of different branches may have one
    position; the mask says which sees which.

    Args:
        config: the model's shape.
        depths: the position of each token in its text, integers (S,).
        mask: additive float32 (1, 1, S, T); T counts the tokens in the cache, too.
    """

    def __init__(self, config: ModelConfig, depths: np.ndarray, mask: np.ndarray):
        super().__init__(config, int(depths.max()) + 1)
        cos, sin = self._turned
        self._turned = cos[depths], sin[depths]
        self.mask = mask
