"""What calibration has seen of a network: mergeable over parts of the data, and kept in a file.

The statistics of groups are those of :mod:`ms_quant.statistics.observations`, by the same code.
The record is another one: that is of one block, whose windows are hidden states in one array; this
is of a whole network, whose groups are found only while it is called, and whose blocks are called
with anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.cells.blocks import blocks_of, chosen_calls, enclosing
from ms_quant.cells.calls import IN_MEMORY, CallStore
from ms_quant.cells.observations_file import read_observations, write_observations
from ms_quant.cells.tables import joined, table
from ms_quant.errors import BadArgumentError, BadFileError, MsQuantError, short
from ms_quant.files.safetensors_file import open_file
from ms_quant.statistics.kept import nearest
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.statistics.stated import fact


def input_name(path: str) -> str:
    """What errors call the input of a linear."""
    return f"{path} input"


@dataclass(frozen=True, eq=False)
class GroupObservation:
    """What the linears of one group read.

    Attributes:
        paths: of the linears, which read one input.
        stats: of that input.
        block: path of the Cell whose output tells how good a candidate is; "" where the group's
            own outputs do.
    """

    paths: tuple[str, ...]
    stats: ActivationStats
    block: str = ""

    @property
    def outlier_ratio(self) -> float:
        """The largest magnitude of a channel over the median one; static and per-token ranges lose
        this factor of precision, which smoothing gets back."""
        absmax = self.stats.absmax
        middle = float(np.median(absmax)) if self.stats.tokens else 0.0
        return float(absmax.max(initial=0)) / middle if middle > 0 else float("inf")

    def followed_by(
        self, other: GroupObservation, paths: tuple[str, ...], block: str
    ) -> GroupObservation:
        """What some linears of this group, which read one input in other data, too, read in all."""
        stats = self.stats.followed_by(other.stats)
        stats.rename(input_name(paths[0]))
        return GroupObservation(paths, stats, block)


@dataclass(frozen=True, eq=False)
class Observations:
    """What calibration has seen of a network's linears, made by :func:`ms_quant.calibrate`.

    ``observations[path]`` is what a linear's group has seen; printed, it is a table of all.

    Attributes:
        groups: in definition order of their first linears.
        calls: how often the network was called.
        searched: whether what block-wise searches run again was kept.
        windows: path of a block to calls of it, for searches.
        tokens: a guess of the tokens of all calls, which decides how many are kept.
        chosen: the calls of the network that those of blocks are kept of.
        stated: whether the user said which Cells are blocks.

    Examples:
        >>> import numpy as np
        >>> import ms_quant
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> data = [Tensor(np.full((4, 8), i, np.float32)) for i in range(6)]
        >>> # On one machine, or in one process ...
        >>> path = ms_quant.calibrate(net, data[:3]).save("first.safetensors")
        >>> # ... and on another, which gets the file of the first.
        >>> first = ms_quant.Observations.load("first.safetensors")
        >>> observations = first.merge(ms_quant.calibrate(net, data[3:]))
        >>> print(observations["0"].stats.tokens, observations["0"].stats.high.max())
        24 5.0
        >>> net = ms_quant.quantize(net, "W8A8", calibration=observations)
    """

    groups: tuple[GroupObservation, ...] = ()
    calls: int = 0
    searched: bool = False
    windows: Mapping[str, CallStore] = field(default_factory=dict, repr=False)
    tokens: int = 0
    chosen: tuple[int, ...] = ()
    stated: bool = False

    def merge(self, other: Observations) -> Observations:
        """What calibration with this data and then other data would have seen.

        Ranges, histograms and groups are the same, bit for bit: linears that read one input in
        one part of the data and not in the other are told apart. Sums are added in another order:
        either way one of n terms is within n * 2^-53 (products of channels n * 2^-24) of the sum of
        their magnitudes. As many tokens and calls of blocks are kept as of all data together,
        evenly spread: the same ones where the parts have them, else those nearest to them.

        Args:
            other (Observations): of the same linears of the same network, with the same
                `algorithm`.

        Returns:
            Observations; these two stay as they are.

        Raises:
            MsQuantError: they are of other linears, or other things were kept of them.
        """
        _refuse_others(self, other)
        together: dict[Hashable, list[str]] = defaultdict(list)
        for path in self._of_path:
            key = _seen_with(self[path]), _seen_with(other[path])
            together[key if any(key) else path].append(path)
        windows, chosen = self._merged_calls(other)
        groups = [tuple(paths) for paths in together.values()]
        blocks = blocks_of(groups, windows, stated=self.stated)
        return replace(
            self,
            groups=tuple(
                self[paths[0]].followed_by(other[paths[0]], paths, blocks[paths])
                for paths in groups
            ),
            calls=self.calls + other.calls,
            windows={path: calls for path, calls in windows.items() if path in blocks.values()},
            tokens=self.tokens + other.tokens,
            chosen=chosen,
        )

    def _merged_calls(self, other: Observations) -> tuple[dict[str, CallStore], tuple[int, ...]]:
        """The calls of blocks to keep, and the calls of the network that they are of."""
        wanted = chosen_calls(self.calls + other.calls, self.tokens + other.tokens)
        kept = np.array([*self.chosen, *(self.calls + index for index in other.chosen)], np.int64)
        chosen = tuple(kept[nearest(kept, wanted)].tolist())
        paths = list(dict.fromkeys([*self.windows, *other.windows]))
        windows = {path: CallStore(IN_MEMORY // len(paths)) for path in paths}
        for part, first in ((self, 0), (other, self.calls)):
            for path, calls in part.windows.items():
                for call in calls:
                    if call.index + first in chosen:
                        windows[path].append(replace(call, index=call.index + first))
        return windows, chosen

    def save(self, path: str | PathLike[str]) -> str:
        """Writes all to one safetensors file, which is whole or absent.

        Args:
            path (str, PathLike): the file.

        Returns:
            str, its path.

        Raises:
            MsQuantError: a block was called with what no file holds, such as a cache of keys and
                values, or the disk is full.
        """
        facts = {name: getattr(self, name) for name in (*_FACTS, "chosen")}
        facts["groups"] = [{"paths": group.paths, "block": group.block} for group in self.groups]
        stats = {group.paths[0]: group.stats for group in self.groups}
        write_observations(Path(path), facts, stats, self.windows)
        return str(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Observations:
        """What :meth:`save` wrote.

        Args:
            path (str, PathLike): the file.

        Raises:
            MsQuantError: it is no such file, or is damaged; names the file and what of it.
        """
        file = open_file(Path(path))
        try:
            facts, stats, windows = read_observations(file)
            made = cls(
                _groups(fact(facts, "groups", list), stats, windows),
                windows=windows,
                chosen=tuple(fact(facts, "chosen", list)),
                **{name: fact(facts, name, kind) for name, kind in _FACTS.items()},
            )
            _check_calls(made)
        except MsQuantError as error:
            raise BadFileError(f"{path}: {error}") from None
        return made

    def __getitem__(self, path: str) -> GroupObservation:
        """The group of a linear, by its path."""
        return self._of_path[path]

    def __contains__(self, path: object) -> bool:
        return path in self._of_path

    @cached_property
    def _of_path(self) -> dict[str, GroupObservation]:
        return {path: group for group in self.groups for path in group.paths}

    def __str__(self) -> str:
        header = ("linears", "tokens", "low", "high", "max / median", "block")
        rows = [
            (
                joined(group.paths),
                str(group.stats.tokens),
                f"{group.stats.low.min(initial=0):.4g}" if group.stats.tokens else "-",
                f"{group.stats.high.max(initial=0):.4g}" if group.stats.tokens else "-",
                f"{group.outlier_ratio:.3g}" if group.stats.tokens else "-",
                group.block or "-",
            )
            for group in self.groups
        ]
        return table(header, rows)


_FACTS = {"calls": int, "tokens": int, "searched": bool, "stated": bool}


def _refuse_others(one: Observations, other: Observations) -> None:
    """Refuses to merge what calibration would not have seen in one pass.

    Raises:
        MsQuantError: names the first difference.
    """
    for path in [*one._of_path, *other._of_path]:
        if path not in one or path not in other:
            raise BadArgumentError(
                f"{path}: only one of two observations looked at it, expected the same linears of "
                "the same network"
            )
        found, expected = _kept(other, path), _kept(one, path)
        for name, value in expected.items():
            if found[name] != value:
                raise BadArgumentError(
                    f"{path}: {name} {found[name]} in one of two observations, expected {value} as "
                    "in the other, of the same network and arguments of calibrate"
                )


def _kept(observations: Observations, path: str) -> dict[str, Any]:
    """What two observations must have in common for a linear."""
    stats = observations[path].stats
    return {
        "channels are": stats.channels,
        "kept tokens are at most": stats.keep_rows,
        "products of channels are there:": stats.products is not None,
        "a histogram is there:": stats.histogram is not None,
        "ranges of timesteps are there:": isinstance(stats, StepStats),
        "calls of blocks are there:": observations.searched,
        "blocks were given:": observations.stated,
    }


def _seen_with(group: GroupObservation) -> tuple[str, ...]:
    """The linears that a part of the data does not tell apart from one; () where no input of it
    reached the linear, so that the other part alone tells."""
    return group.paths if group.stats.tokens or len(group.paths) > 1 else ()


def _groups(
    said: list[Any], stats: Mapping[str, ActivationStats], windows: Mapping[str, CallStore]
) -> tuple[GroupObservation, ...]:
    """The groups that a file states.

    Raises:
        MsQuantError: one is malformed, or a linear is in two of them.
    """
    found, seen = [], set[str]()
    for entry in said:
        paths = entry.get("paths") if isinstance(entry, dict) else None
        if not isinstance(paths, list) or not paths or not all(type(p) is str for p in paths):
            raise BadFileError(f"groups: holds {short(entry)}, expected paths of linears")
        again = next((path for path in paths if path in seen or paths.count(path) > 1), None)
        if again is not None:
            raise BadFileError(f"groups: {again} is in two groups, expected one")
        seen.update(paths)
        block = fact(entry, "block", str)
        if block and (block not in windows or enclosing(paths, [block]) != block):
            raise BadFileError(
                f"groups: block {short(block)} of {paths[0]} has no calls or is not around it, "
                "expected one with calls, or none"
            )
        seen_by = stats.get(paths[0])
        if seen_by is None or seen_by.total_tokens is None or seen_by.start:
            raise BadFileError(f"groups: {paths[0]} has no statistics of all tokens, expected some")
        found.append(GroupObservation(tuple(paths), seen_by, block))
    return tuple(found)


def _check_calls(observations: Observations) -> None:
    """Refuses counts that no calibration gives.

    Raises:
        MsQuantError: says which.
    """
    calls, chosen = observations.calls, observations.chosen
    if observations.tokens < calls:
        raise BadFileError(f"tokens: is {observations.tokens}, expected at least one of each call")
    whole = all(type(index) is int for index in chosen)
    if not whole or sorted(set(chosen)) != list(chosen) or not all(0 <= i < calls for i in chosen):
        raise BadFileError(f"chosen: is {short(list(chosen))}, expected ascending calls of {calls}")
    for block, store in observations.windows.items():
        if not {call.index for call in store.stored} <= set(chosen):
            raise BadFileError(f"block_calls: {block} has calls of others than chosen ones")
