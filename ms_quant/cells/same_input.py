"""Which linears read one input: said by the user, or found while a network is called."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from mindspore import Tensor, nn

from ms_quant.cells.sites import Site
from ms_quant.errors import BadArgumentError
from ms_quant.recipe.patterns import matches, unmatched

Groups = Sequence[str | Sequence[str]] | Callable[[str, nn.Cell], Hashable | None]
"""Patterns (of what one matches, linears with the same parent are a group), lists of paths (each
list is a group), or a function of path and Cell that gives the same value for those of a group,
None for one that is alone."""

_SAMPLED = 1024


def stated_groups(groups: Groups, sites: Mapping[str, Site]) -> dict[str, Hashable]:
    """Path of each linear that is in a stated group to what its group has in common.

    Raises:
        MsQuantError: a pattern or path is that of no linear, or a linear is in two groups.
    """
    if callable(groups):
        keys = {path: groups(path, site.cell) for path, site in sites.items()}
        return {path: key for path, key in keys.items() if key is not None}
    found: dict[str, Hashable] = {}
    for index, group in enumerate(groups):
        for path in _members(group, list(sites), f"groups[{index}]"):
            parent = path.rpartition(".")[0] if isinstance(group, str) else ""
            if path in found:
                raise BadArgumentError(f"groups[{index}]: {path} is in two groups, expected one")
            found[path] = (index, parent)
    return found


def _members(group: Any, paths: list[str], where: str) -> list[str]:
    if isinstance(group, str):
        if unmatched([group], paths):
            shown = ", ".join(paths[:4])
            raise BadArgumentError(
                f"{where}: {group!r} matches no linear, expected one of: {shown}, ..."
            )
        return [path for path in paths if matches(path, [group])]
    if not isinstance(group, Iterable) or not all(isinstance(path, str) for path in group):
        raise BadArgumentError(f"{where} is {group!r:.80}, expected a pattern or a list of paths")
    listed = list(group)
    for path in listed:
        if path not in paths:
            raise BadArgumentError(
                f"{where}: {path!r} is no linear that is quantized, expected one of: "
                f"{', '.join(paths[:4])}, ..."
            )
    return listed


class _Tensors:
    """The tensors of one call: each gets a number, and one that is seen again the same."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[weakref.ref, int, bytes]] = {}
        self._count = 0

    def number(self, x: Tensor) -> int:
        place, sample = (x.data_ptr(), x.nbytes, x.shape[-1:], str(x.dtype)), _sample(x)
        known = self._known.get(place)
        # A dead tensor's memory is used again, and a living one's may be written to.
        if known is not None and known[0]() is not None and known[2] == sample:
            return known[1]
        self._count += 1
        self._known[place] = weakref.ref(x), self._count, sample
        return self._count


def _sample(x: Tensor) -> bytes:
    values = x.asnumpy().reshape(-1)
    return values[:: max(1, values.size // _SAMPLED)].tobytes()


class SharedInputs:
    """Finds the linears that have the same input tensors in every call.

    A group is found in the call that first reaches it, and its first linear is from then on the
    only one whose inputs are looked at. Where a later call tells linears of a group apart, what
    was seen cannot be told apart any more: all calls are made again.

    Args:
        apart: path of each linear to what those of a group must have in common.
        find: whether groups are found; otherwise ``apart`` says what is a group.
    """

    def __init__(self, apart: Mapping[str, Hashable], *, find: bool):
        self.apart, self.find = dict(apart), find
        first: dict[Hashable, str] = {}
        self.leader = {p: p if find else first.setdefault(k, p) for p, k in self.apart.items()}
        self._reached: set[str] = set()
        self.begin_call()

    def begin_call(self) -> None:
        """Forgets the tensors of the last call."""
        self._tensors = _Tensors()
        self._log: dict[str, list[int]] = defaultdict(list)

    def note(self, path: str, x: Tensor) -> bool:
        """Takes note of a linear's input; whether it is one to look at."""
        if self.find:
            self._log[path].append(self._tensors.number(x))
        return self.leader[path] == path

    def end_call(self) -> bool:
        """Finds the groups among linears that were reached for the first time.

        Returns:
            Whether the groups that were found before are still ones; if not ``apart`` has changed.
        """
        if not self.find:
            return True
        logs = {path: tuple(self._log[path]) for path in self.apart}
        if any(logs[path] != logs[leader] for path, leader in self.leader.items()):
            self.apart = {path: (key, logs[path]) for path, key in self.apart.items()}
            return False
        first: dict[Hashable, str] = {}
        for path, log in logs.items():
            if log and path not in self._reached:
                self.leader[path] = first.setdefault((self.apart[path], log), path)
                self._reached.add(path)
        return True

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The paths of each group, in definition order."""
        found = defaultdict(list)
        for path, leader in self.leader.items():
            found[leader].append(path)
        return [tuple(paths) for paths in found.values()]
