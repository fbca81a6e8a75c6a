"""What the linears of a block read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms_quant.models.block_forward import BlockForward, Positions


def block_with_inputs(
    block: BlockForward, hidden: np.ndarray, positions: Positions
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output of a block, and the input of each of its linears, (rows, in)."""
    inputs: dict[str, np.ndarray] = {}

    def watched(path: str) -> Callable[[np.ndarray], np.ndarray]:
        def linear(rows: np.ndarray) -> np.ndarray:
            inputs[path] = rows.copy()
            return block.linears[path](rows)

        return linear

    shown = block.with_linears({path: watched(path) for path in block.linears})
    return shown(hidden, positions), inputs
