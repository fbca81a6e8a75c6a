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
        found: list[tuple[np.ndarray, np.ndarray]] = []
        cache = new()
        extend = cache.extend

        def shown(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            held = extend(keys, values)
            found.append((_joined(*held), _joined(keys, values)))
            return held

        cache.extend = shown  # type: ignore[method-assign]
        output = self.block.run(self.x, self.at, cache)
        return errors(*found[0]), output


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
