"""What an attention remembers from step to step, in each thread by itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ms_quant.attention.mask import BlockMask
from ms_quant.attention.schedule import MaskCache, StepWindow


class MaskCaches(threading.local):
    """The mask cache of one attention: threads sample clips of their own.

    Args:
        window: which steps are sparse, and how long a mask serves.
    """

    def __init__(self, window: StepWindow):
        self.cache: MaskCache[BlockMask] = MaskCache(window)

    def __deepcopy__(self, memo: dict) -> MaskCaches:
        return MaskCaches(self.cache.window)


@dataclass(frozen=True)
class HeadDensities:
    """What each head of a sparse attention computes.

    Attributes:
        densities: the share of pairs of each head, in the mean over a batch.
        kinds: the mask that each head has, such as ``"temporal"``.
    """

    densities: tuple[float, ...] = ()
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, mask: BlockMask) -> HeadDensities:
        """That of a mask."""
        return cls(tuple(mask.density().mean(axis=0).tolist()), mask.names)
