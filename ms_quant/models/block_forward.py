"""The forward of a decoder block on a CPU, in NumPy and native kernels.

Calibration, evaluation and generation run it. The Cells of :mod:`ms_quant.cells.decoder` compute
the same in MindSpore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ms_quant import kernels
from ms_quant.budget import BUDGET, Budget
from ms_quant.models.attention import causal_mask
from ms_quant.models.cache import AnyCache
from ms_quant.models.config import ModelConfig
from ms_quant.models.linear_forward import (
    FloatForward,
    Linear,
    QuantizedForward,
    ReadWhenCalled,
    in_step,
)
from ms_quant.models.names import block_prefix
from ms_quant.models.rope import rope_table, still_table, widened
from ms_quant.numerics.linear import QuantizedLinear

if TYPE_CHECKING:
    from typing import Self


class Positions:
    """Where the tokens of a forward stand: their rotary angles, and the keys that each may see.

    Args:
        config: the model's shape.
        stop: the position after the last token; there is a key for each position before it.
        start: the position of the first token.
    """

    def __init__(self, config: ModelConfig, stop: int, start: int = 0):
        self._start, self._stop = start, stop
        tokens = np.arange(start, stop)
        turned = config.rotary_size
        self._turned = rope_table(config.rope, turned, tokens, config.max_position)
        if config.latent is None and turned < config.head_dim:
            self._turned = widened(self._turned, config.head_dim)

    @classmethod
    def of_step(cls, each: Sequence[Self]) -> Self:
        """One token of each of several sequences, which sees all before it."""
        made = copy(each[0])
        made._turned = _stacked([one._turned for one in each])
        if "_still" in made.__dict__:
            del made._still
        return made

    @cached_property
    def mask(self) -> np.ndarray:
        """Additive float32 (1, 1, stop - start, stop); nobody asks for that of a step."""
        return causal_mask(self._stop, start=self._start)

    def angles(self, rotated: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 (stop - start, D); of a block without rotary embedding those
        that turn nothing."""
        return self._turned if rotated else self._still

    @cached_property
    def _still(self) -> tuple[np.ndarray, np.ndarray]:
        return still_table(self._turned)


def _stacked(tables: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = zip(*tables, strict=True)
    return np.concatenate(cos), np.concatenate(sin)


def _all_float(path: str) -> None:
    """No linear is quantized."""


Observer = Callable[[np.ndarray], None]
"""Is shown a tensor, which it may not change."""


class BlockForward:
    """The residual branches of a block one after the other, float32 (B, S, hidden) of the same.

    Args:
        config: the model's shape.
        index: which of the model's blocks it is.
        arrays: the block's float32 parameters by their names within it; those of some linears, if
            nothing calls the others.
        linears: what computes the linears by their paths, where that is not in `arrays`.
        budget: what bounds its memory.

    Attributes:
        spec: what the block is made of.
        linears: what computes each linear.
        taps: who is shown what is between two operators, and taps, by name.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        arrays: dict[str, np.ndarray],
        linears: Mapping[str, Linear],
        budget: Budget = BUDGET,
    ):
        self.config, self.index, self.arrays, self.budget = config, index, arrays, budget
        self.spec = config.block(index)
        self.taps: Mapping[str, Sequence[Observer]] = {}
        floats = {
            path: FloatForward(arrays[f"{path}.weight"], arrays.get(f"{path}.bias"))
            for path in self.spec.linears
            if path not in linears and f"{path}.weight" in arrays
        }
        self.linears: Mapping[str, Linear] = {**floats, **linears}

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        index: int,
        read: Callable[[str], np.ndarray],
        quantized: Callable[[str], QuantizedLinear | None] = _all_float,
        budget: Budget = BUDGET,
        *,
        experts: bool | None = None,
    ) -> Self:
        """A block of a checkpoint.

        Args:
            config: the model's shape.
            index: which block it is.
            read: gives a float32 parameter by its name in a checkpoint.
            quantized: gives the quantized linear at a path in a checkpoint; None for a float one.
            budget: what bounds its memory.
            experts: whether its experts stay in memory; else each is read when tokens come to it.
                None: if the budget has room for them.
        """
        prefix, spec = block_prefix(index), config.block(index)
        if experts is None:
            experts = 4 * spec.routed_size <= budget.expert_bytes

        def linear_at(path: str) -> Linear:
            found = quantized(prefix + path)
            if found is not None:
                return QuantizedForward(found)
            names = (f"{path}.{suffix}" for suffix in spec.linears[path].tensors)
            return FloatForward(*(read(prefix + name) for name in names))

        linears = dict[str, Linear]()
        for path in spec.linears:
            group = spec.group_of(path)
            if group is not None and group.routed and not experts:
                rows = spec.linears[path].out_features
                linears[path] = ReadWhenCalled(partial(linear_at, path), rows)
                continue
            found = quantized(prefix + path)
            if found is not None:
                linears[path] = QuantizedForward(found)
        arrays = {
            name: read(prefix + name)
            for name in spec.tensors
            if name.rpartition(".")[0] not in linears
        }
        return cls(config, index, arrays, linears, budget)

    def with_linears(self, linears: Mapping[str, Linear]) -> Self:
        """The same block with other linears at some paths; what it holds is shared."""
        other = copy(self)
        other.linears = {**self.linears, **linears}
        return other

    def in_decode(self) -> Self:
        """The block as it computes when a generation goes on token by token."""
        return self.with_linears(
            {
                path: partial(linear, decode=True)
                for path, linear in self.linears.items()
                if isinstance(linear, QuantizedForward) and linear.phased
            }
        )

    def in_steps(self) -> Self:
        """The block as it computes one token of each of several sequences: no number of one depends
        on which others there are."""
        return self.with_linears({path: in_step(one) for path, one in self.linears.items()})

    def with_taps(self, taps: Mapping[str, Sequence[Observer]]) -> Self:
        """The same block, which shows what is between its operators, and its taps, by name."""
        other = copy(self)
        other.taps = taps
        return other

    def __call__(self, x: np.ndarray, at: Positions, cache: AnyCache | None = None) -> np.ndarray:
        """The block's output; what is not finite goes on in it."""
        with np.errstate(all="ignore"):
            return self.run(x, at, cache)

    def run(
        self, x: np.ndarray, at: Positions, cache: AnyCache | None = None, first: int = 0
    ) -> np.ndarray:
        """What the branches from a first one on make of the residual stream.

        Args:
            x: float32 (B, S, hidden).
            at: the positions of the S tokens.
            cache: keys and values of the tokens before, to which theirs are added.
            first: the branch that reads ``x``.
        """
        x = self.between(self.spec.hidden[first], x)
        for which in range(first, len(self.spec.branches)):
            x = self.branch(which, x, at, cache)
        return x

    def branch(
        self, which: int, x: np.ndarray, at: Positions, cache: AnyCache | None = None
    ) -> np.ndarray:
        """The residual stream after one branch; arguments as of :meth:`run`."""
        return self.add(which, x, self.inner(which, x, at, cache))

    def inner(self, which: int, x: np.ndarray, at: Positions, cache: AnyCache | None = None) -> Any:
        """What the last linears of a branch read; arguments as of :meth:`run`."""
        return self.spec.branches[which].inner(self, x, at, cache)

    def add(self, which: int, x: np.ndarray, inner: Any) -> np.ndarray:
        """The residual stream after a branch."""
        y = self.spec.branches[which].outer(self, inner).reshape(x.shape)
        with np.errstate(all="ignore"):  # whoever looks at the sum finds what is not finite
            return self.between(self.spec.hidden[which + 1], np.add(x, y, out=y))

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        gain, eps = self.arrays[f"{path}.weight"], self.spec.norms[path].eps
        eps = self.config.rms_norm_eps if eps is None else eps
        return self.between(f"{path} output", kernels.rms_norm(x, gain, eps))

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        return self.between(f"{path} output", self.linears[path](x.reshape(-1, x.shape[-1])))

    def parameter(self, name: str) -> np.ndarray:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        return self.arrays[name]

    def between(self, place: str, x: np.ndarray) -> np.ndarray:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        self.show(place, x)
        return x

    def shows(self, tap: str) -> bool:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        return bool(self.taps.get(tap))

    def show(self, tap: str, x: np.ndarray) -> None:
        """See :class:`~ms_quant.models.block_spec.Operators`."""
        for observe in self.taps.get(tap, ()):
            observe(x)
