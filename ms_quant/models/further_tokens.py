"""What enters a block that predicts the next but one token (multi-token prediction).

At the position of token t it reads what the model makes of all tokens up to t, after its last
norm, and the embedding of token t + 1: the model's next draft. Blocks further on, which read what
this one makes, are stored, but not run here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms_quant import kernels
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_prefix

HEAD, HEAD_NORM, EMBEDDING = "shared_head.head.weight", "shared_head.norm.weight", "embed_tokens"


class FurtherInput:
    """The input of the first block that predicts further tokens.

    Args:
        config: the model's shape.
        read: gives a float32 tensor by its name in a checkpoint.
    """

    def __init__(self, config: ModelConfig, read: Callable[[str], np.ndarray]):
        prefix, self.eps = block_prefix(config.num_layers), config.rms_norm_eps
        self._last = read("model.norm.weight")
        self._embedded, self._hidden, self._both = (
            read(f"{prefix}{name}.weight") for name in ("enorm", "hnorm", "eh_proj")
        )

    def __call__(self, stream: np.ndarray, following: np.ndarray) -> np.ndarray:
        """The input, float32 (B, S, hidden).

        Args:
            stream: float32 (B, S, hidden), what the last block gives.
            following: float32 (B, S, hidden), the embedding of the token after each.
        """
        return self.of_normed(kernels.rms_norm(stream, self._last, self.eps), following)

    def of_normed(self, hidden: np.ndarray, following: np.ndarray) -> np.ndarray:
        """The same of what the last norm gives."""
        embedded = kernels.rms_norm(following, self._embedded, self.eps)
        both = [embedded, kernels.rms_norm(hidden, self._hidden, self.eps)]
        rows = np.concatenate(both, axis=-1).reshape(-1, 2 * hidden.shape[-1])
        return kernels.matmul(rows, self._both).reshape(hidden.shape)
