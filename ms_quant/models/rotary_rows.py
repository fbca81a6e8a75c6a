"""The rows of a linear that make rotary pairs, and the two orders that they come in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RotaryRows:
    """Rows of a linear whose outputs are turned in pairs of neighbours.

    Attributes:
        unit: rows of one head, or of all where heads share them.
        turned: so many of them, the last ones, are turned.
    """

    unit: int
    turned: int

    def halves(self, rows: int) -> np.ndarray:
        """int64 (rows,): in an order for networks whose pairs are halves apart, which row is where.

        Of each unit's turned rows the first ones of all pairs come first, then the second ones.
        """
        order = np.arange(rows).reshape(-1, self.unit)
        turned = order[:, self.unit - self.turned :]
        parts = order[:, : self.unit - self.turned], turned[:, 0::2], turned[:, 1::2]
        return np.concatenate(parts, axis=1).reshape(-1)
