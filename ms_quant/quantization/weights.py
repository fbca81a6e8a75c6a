"""Where the float weights of a block come from, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from ms_quant.algorithms.problem import ErrorOf
from ms_quant.files.reader import Checkpoint, FloatTensors
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.block_spec import LinearGroup
from ms_quant.models.gated_block import GatedMlp
from ms_quant.models.names import block_prefix
from ms_quant.statistics.expert_errors import MlpErrors, errors_of
from ms_quant.statistics.search_windows import SearchWindows


class Errors(NamedTuple):
    """Errors of a block's output, as :class:`~ms_quant.algorithms.problem.Problem` has them."""

    mse: ErrorOf
    relative_mse: ErrorOf
    token_error: ErrorOf


class Weights(Protocol):
    """The float parameters of a block.

    Attributes:
        index: the block.
    """

    index: int

    def get(self, name: str) -> np.ndarray | None:
        """A float32 parameter by its name in the block, or None when it has none of that name."""

    def errors(self, group: LinearGroup, windows: SearchWindows) -> Errors:
        """Errors of the block's output with candidates in place of a group's float linears; in a
        block with experts that of attention, or of an expert."""

    def drop(self, members: Sequence[str]) -> None:
        """These linears are done: nothing asks for their parameters again."""


class StoredWeights:
    """Weights that are read from a checkpoint when they are asked for, one at a time.

    Args:
        checkpoint: the float model.
        index: the block.
        biases: whether biases are wanted, which without calibration change nothing.
        threads: that round rows, of one who asks for many blocks; else each group has its own.
    """

    def __init__(
        self,
        checkpoint: FloatTensors,
        index: int,
        *,
        biases: bool = False,
        threads: ThreadPoolExecutor | None = None,
    ):
        self.checkpoint, self.index, self.biases = checkpoint, index, biases
        self.threads = threads
        self.prefix = block_prefix(index)

    @property
    def by_rows(self) -> bool:
        """Whether some rows of a weight can be read without the rest of it."""
        return isinstance(self.checkpoint, Checkpoint)

    def get(self, name: str) -> np.ndarray | None:
        full = self.prefix + name
        if name.endswith(".bias") and not (self.biases and full in self.checkpoint.names):
            return None
        return self.checkpoint.read_float32(full)

    def errors(self, group: LinearGroup, windows: SearchWindows) -> Errors:
        raise AssertionError(f"{self.prefix}{group.name}: an error of a block that is not run")

    def drop(self, members: Sequence[str]) -> None:
        """Nothing is held."""


class LoadedWeights:
    """Weights of a block that is in memory, and can be run.

    Args:
        block: the block.
        at: the positions of a window's tokens.
        release: let go of what is done; then nothing may run the block again.
    """

    def __init__(self, block: BlockForward, at: Positions, *, release: bool = False):
        self.block, self.at, self.index, self.release = block, at, block.index, release
        if release:
            block.linears = {}  # which hold the weights, too

    def get(self, name: str) -> np.ndarray | None:
        return self.block.arrays.get(name)

    def errors(self, group: LinearGroup, windows: SearchWindows) -> Errors:
        found = errors_of(self.block, self.at, group, windows)
        return Errors(found.mse, found.relative_mse, found.token_error)

    def drop(self, members: Sequence[str]) -> None:
        for member in members if self.release else ():
            del self.block.arrays[f"{member}.weight"]


class ExpertWeights(LoadedWeights):
    """Weights of one expert, which is in memory; what else is asked for is read.

    Args:
        block: the block with this expert.
        at: the positions of a window's tokens.
        stored: the block as it is stored.
        mlp: the expert.
        tokens: gives float32 (rows, hidden), what candidates for it are tried on, and float32
            (rows, 1), what its outputs are multiplied by, or None.
    """

    def __init__(
        self,
        block: BlockForward,
        at: Positions,
        stored: StoredWeights,
        mlp: GatedMlp,
        tokens: Callable[[], tuple[np.ndarray, np.ndarray | None]],
    ):
        super().__init__(block, at)
        self.stored, self.mlp, self.tokens = stored, mlp, tokens

    def get(self, name: str) -> np.ndarray | None:
        found = super().get(name)
        return self.stored.get(name) if found is None else found

    def errors(self, group: LinearGroup, windows: SearchWindows) -> Errors:
        @cache
        def found() -> MlpErrors:  # not before a search asks
            linears, budget = self.block.linears, self.block.budget
            return MlpErrors(self.mlp, linears, group, *self.tokens(), budget)

        return Errors(
            lambda candidate: found().mse(candidate),
            lambda candidate: found().relative_mse(candidate),
            lambda candidate: found().token_error(candidate),
        )
