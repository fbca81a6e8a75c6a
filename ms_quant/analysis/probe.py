"""The probe: the first tokens of a few windows, which every variant of the model runs on.

A variant is the float model with one group of one block quantized. All variants go through the
blocks together with the float model, one block at a time, so no block is loaded twice. How many
tokens that may be follows from what it costs, so that an analysis takes at most half as much again
as a calibrated quantization of the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ms_quant.models.config import ModelConfig
from ms_quant.statistics.kept import spread

WINDOW_TOKENS = 64  # of a window: the first token and those that read it
LEAST, MOST = 16, 1024
SHARE = 0.25  # of the products of calibration


@dataclass(frozen=True)
class Probe:
    """Which tokens are looked at.

    Attributes:
        windows: which windows, ascending.
        length: how many tokens of each, from the first on.
    """

    windows: tuple[int, ...]
    length: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.windows) * self.length

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """int32 (windows, length) of all windows."""
        return tokens[list(self.windows), : self.length]


def affordable_tokens(config: ModelConfig, variants: Sequence[int], tokens: int) -> int:
    """How many probe tokens cost a share of the products of calibration.

    Args:
        config: the model.
        variants: how many variants begin in each block.
        tokens: how many tokens calibration sees.
    """
    sizes = [block.size for block in config.blocks]
    calibration = tokens * sum(sizes)
    running, each = 1, 0
    for size, new in zip(sizes, variants, strict=True):
        each += size * (running + new)
        running += new
    each += running * config.vocab_size * config.hidden_size
    return int(SHARE * calibration / each)


def probe_of(shape: tuple[int, int], wanted: int) -> Probe:
    """The probe of about so many tokens, of windows of shape (windows, tokens)."""
    count, length = shape
    wanted = min(max(wanted, LEAST), MOST, count * length)
    windows = min(count, max(1, wanted // min(length, WINDOW_TOKENS)))
    tokens = min(length, wanted // windows)
    return Probe(tuple(spread(count, windows).tolist()), tokens)
