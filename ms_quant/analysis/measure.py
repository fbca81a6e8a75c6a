"""What quantizing one group of a block changes: its own output, and the block's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from ms_quant.models.block_forward import BlockForward, Observer, Positions
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.cache import KeyValueCache
from ms_quant.models.linear_forward import Linear, QuantizedForward
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.quantization.observe import shows_input
from ms_quant.statistics.errors import Errors, errors
from ms_quant.statistics.search_windows import BlockErrors, SearchWindows


class FloatBlock:
    """A float block on the probe, against which variants of it are measured.

    Args:
        block: the block.
        at: the positions of the probe's tokens.
        x: float32 (windows, tokens, hidden), its input.

    Attributes:
        output: float32 of the same, its output.
    """

    def __init__(self, block: BlockForward, at: Positions, x: np.ndarray):
        self.block, self.at, self.x = block, at, x
        states: list[np.ndarray] = []
        self._rows: dict[str, np.ndarray] = {}
        self._exact: dict[str, np.ndarray] = {}
        self._errors: dict[str, BlockErrors] = {}
        taps: dict[str, list[Observer]] = {
            place: [lambda state: states.append(state.copy())] for place in block.spec.hidden
        }
        watched = {
            group.members[0]: shows_input(
                block.linears[group.members[0]], partial(self._take, group.name)
            )
            for group in block.spec.groups
        }
        self.output = block.with_linears(watched).with_taps(taps).run(x, at)
        windows, length, hidden = x.shape
        self._windows = SearchWindows((windows, length, hidden), len(states), windows * length)
        self._windows.add(0, *states)

    def _take(self, name: str, rows: np.ndarray) -> None:
        self._rows[name] = rows.copy()

    def own(self, group: LinearGroup, linears: Mapping[str, Linear]) -> Errors:
        """The errors of what a group computes with other linears."""
        rows = self._rows.get(group.name)
        if rows is None:  # no token of the probe reaches it
            return 0.0, 0.0
        if group.name not in self._exact:
            self._exact[group.name] = _outputs(self.block.linears, group, rows)
        return errors(_outputs(linears, group, rows), self._exact[group.name])

    def outputs(self, group: LinearGroup, linears: Mapping[str, Linear]) -> np.ndarray:
        """The block's output with other linears in place of a group's."""
        if group.name not in self._errors:
            self._errors[group.name] = BlockErrors(self.block, self.at, group, self._windows)
        return np.concatenate(list(self._errors[group.name].outputs(linears)))

    def with_cache(self, new: Callable[[], KeyValueCache]) -> tuple[Errors, np.ndarray]:
        """The errors of what is cached, and the block's output when it reads that."""
        cache = _ShownCache(new())
        output = self.block.run(self.x, self.at, cache)
        return errors(*cache.shown), output


class _ShownCache(KeyValueCache):
    """A cache that keeps what it first gave, and what it was given for it."""

    def __init__(self, cache: KeyValueCache):
        super().__init__()
        self._cache, self.absorbs = cache, cache.absorbs
        self.shown: tuple[np.ndarray, ...] = ()

    def extend(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        held = self._cache.extend(keys, values)
        self.shown = self.shown or (_joined(*held), _joined(keys, values))
        return held

    def queries(self, brought: np.ndarray) -> np.ndarray:
        return self._cache.queries(brought)


def _outputs(linears: Mapping[str, Linear], group: LinearGroup, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([linears[path](rows) for path in group.members], axis=-1)


def _joined(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(B, tokens, channels) of (B, heads, tokens, D) keys and values."""
    parts = (
        np.moveaxis(part, 1, 2).reshape(len(part), part.shape[2], -1) for part in (keys, values)
    )
    return np.concatenate(list(parts), axis=-1)


def phases(linears: Mapping[str, QuantizedLinear]) -> Iterator[dict[str, Linear]]:
    """What computes quantized linears; a second time as in decode, where that differs."""
    made = {path: QuantizedForward(linear) for path, linear in linears.items()}
    yield dict(made)
    if any(one.phased for one in made.values()):
        yield {path: partial(one, decode=True) for path, one in made.items()}
