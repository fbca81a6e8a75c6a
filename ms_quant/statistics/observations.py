"""What calibration has seen of a block: mergeable over parts of the data, and serialisable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ms_quant.statistics.activation_range import BlockRanges, Divided
from ms_quant.statistics.observers import ActivationStats
from ms_quant.statistics.search_windows import SearchWindows
from ms_quant.statistics.stats_file import restored_stats, stats_arrays, stats_facts
from ms_quant.statistics.unsearched import UnsearchedRange

RANGES, CACHE, DIVIDED, WINDOWS = "ranges.", "cache.", "divided.", "windows"
UNSEARCHED = "unsearched."


@dataclass
class Observations:
    """What the float forward of a block has shown.

    Attributes:
        stats: group to the statistics of its input.
        windows: inputs and outputs of the windows that searches look at.
        ranges: how large every place gets.
        cache: path of what is in int8 with a cache to its ranges, see
            :class:`~ms_quant.statistics.observers.CacheRange`; None where nothing is.
        divided: the rows of linears that were divided before, so that everything fits float16.
        first: the first window that was seen.
        unsearched: group to the range of its input over the windows that searches do not look at;
            empty where no static range is searched for.
    """

    stats: dict[str, ActivationStats]
    windows: SearchWindows
    ranges: BlockRanges
    cache: dict[str, np.ndarray] | None = None
    divided: Divided = field(default_factory=dict)
    first: int = 0
    unsearched: dict[str, UnsearchedRange] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The block."""
        return self.ranges.index

    def merge(self, other: Observations) -> None:
        """Adds what the windows after these have shown."""
        for name, stats in self.stats.items():
            stats.merge(other.stats[name])
        for name, unsearched in self.unsearched.items():
            unsearched.merge(other.unsearched[name])
        self.windows.merge(other.windows, other.first)
        self.ranges.merge(other.ranges)
        for path, absmax in (other.cache or {}).items():
            assert self.cache is not None
            self.cache[path] = np.maximum(self.cache[path], absmax)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was seen, by names; :meth:`facts` says the rest."""
        found = {WINDOWS: self.windows.states, **stats_arrays(self.stats)}
        for start, parts in (
            (RANGES, self.ranges.absmax),
            (CACHE, self.cache or {}),
            (DIVIDED, self.divided),
        ):
            found |= {f"{start}{path}": value for path, value in parts.items()}
        for name, unsearched in self.unsearched.items():
            ends = unsearched.arrays().items()
            found |= {f"{UNSEARCHED}{name}.{end}": value for end, value in ends}
        return found

    def facts(self) -> str:
        """How it was seen, as JSON."""
        return json.dumps(
            {
                "index": self.index,
                "first": self.first,
                "stats": stats_facts(self.stats),
                "shape": self.windows.shape,
                "search_tokens": self.windows.tokens,
                "apart": self.windows.apart,
                "caches": self.cache is not None,
                "unsearched": list(self.unsearched),
            }
        )

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], text: str) -> Observations:
        """The observations that were written as :meth:`arrays` and :meth:`facts`."""
        facts: dict[str, Any] = json.loads(text)
        stats = restored_stats(arrays, facts["stats"])
        states = arrays[WINDOWS]
        shape, tokens = tuple(facts["shape"]), facts["search_tokens"]
        windows = SearchWindows(shape, len(states), tokens, apart=facts["apart"])
        windows.states = states
        ranges = BlockRanges(facts["index"], _under(arrays, RANGES))
        cache = _under(arrays, CACHE) if facts["caches"] else None
        unsearched = {
            name: UnsearchedRange.restore(_under(arrays, f"{UNSEARCHED}{name}."))
            for name in facts["unsearched"]
        }
        divided = _under(arrays, DIVIDED)
        return cls(stats, windows, ranges, cache, divided, facts["first"], unsearched)


def _under(arrays: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)
    }
