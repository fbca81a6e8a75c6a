"""The files of a job's finished blocks: one for each block, and one for each of its experts.

The file of a block is written last: it says that all of the block is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.files.checked_file import CheckedFile, write_checked
from ms_quant.job.finished import FinishedBlock, Measured
from ms_quant.models.names import GroupId, block_prefix, expert_of, in_block
from ms_quant.numerics.linear import QuantizedLinear, from_arrays
from ms_quant.schemes.records import Scheme

CHANGED = "changed."  # before the names of float tensors in a block's file
CACHE = "kv_cache."  # before the paths of linears whose outputs are cached
BLOCK_NAME = r"block-(\d{5,})(-expert-(\d{5,}))?(\.\d+)?"


class BlockFiles:
    """Finished blocks, or parts of them, of one format.

    Args:
        directory: where the files are.
        scheme_of: what a linear, by its full path, becomes; None of a job whose blocks hold none.
        target: which of the formats that one job is for.
    """

    def __init__(self, directory: Path, scheme_of: Callable[[str], Scheme] | None, target: int):
        self.directory, self.scheme_of, self.target = directory, scheme_of, target
        self._opened: tuple[Path, CheckedFile] | None = None

    @property
    def _suffix(self) -> str:
        return f".{self.target}" if self.target else ""

    def block_file(self, index: int, expert: int | None = None) -> Path:
        """The file of a block, or of one of its experts."""
        part = "" if expert is None else f"-expert-{expert:05d}"
        return self.directory / f"block-{index:05d}{part}{self._suffix}.safetensors"

    def finished(self) -> set[int]:
        """The blocks that are finished, in whatever order."""
        return {block for block, expert in self._finished() if expert is None}

    def finished_experts(self, index: int) -> set[int]:
        """The experts of a block that are finished."""
        found = self._finished()
        return {expert for block, expert in found if block == index and expert is not None}

    def check_finished(self) -> None:
        """Opens the file of everything that is finished; tensors are checked when they are read.

        Raises:
            DamagedFileError: the first one that is damaged.
        """
        for index, expert in self._finished():
            CheckedFile(self.block_file(index, expert))

    def _finished(self) -> list[tuple[int, int | None]]:
        if not self.directory.is_dir():
            return []
        name = re.compile(rf"{BLOCK_NAME}\.safetensors")
        matches = (name.fullmatch(path.name) for path in self.directory.iterdir())
        return [
            (int(match[1]), int(match[3]) if match[3] else None)
            for match in matches
            if match and (match[4] or "") == self._suffix
        ]

    def finish_block(
        self,
        index: int,
        block: FinishedBlock,
        statistics: Mapping[str, np.ndarray],
        expert: int | None = None,
    ) -> None:
        """Commits a block, or one of its experts: its linears, what folding changed, statistics,
        what was chosen, and what it took."""
        tensors = dict(statistics)
        tensors.update({f"{CHANGED}{name}": value for name, value in block.floats.items()})
        tensors.update({f"{CACHE}{path}": scale for path, scale in block.cache.items()})
        for path, linear in block.linears.items():
            tensors.update({f"{path}.{key}": value for key, value in linear.arrays().items()})
        facts = {
            key: getattr(block, key) for key in ("notes", "ranges", "seconds", "errors", "inputs")
        }
        facts["routing"] = block.routing
        metadata = {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
        write_checked(self.block_file(index, expert), tensors, metadata)
        self._opened = None

    def _file(self, index: int, expert: int | None = None) -> CheckedFile:
        """The file of what is finished; that of the last one asked for stays open."""
        path = self.block_file(index, expert)
        if self._opened is None or self._opened[0] != path:
            self._opened = path, CheckedFile(path)
        return self._opened[1]

    def _of(self, index: int, path: str) -> CheckedFile:
        """The file that holds a linear or a group of a block, by its path there."""
        expert = expert_of(path)
        if expert is not None and self.block_file(index, expert).exists():
            return self._file(index, expert)
        return self._file(index)

    def linear(self, index: int, path: str, with_weight: bool = True) -> QuantizedLinear:
        """A linear of a finished block, without its bias.

        Args:
            index: the block.
            path: the linear, relative to the block.
            with_weight: read the weight; else zeros that take no memory stand for it.
        """
        assert self.scheme_of is not None, "a job without linears"
        file, start = self._of(index, path), f"{path}."
        names = [name for name in file.tensors if name.startswith(start)]
        arrays = {
            name.removeprefix(start): file.read(name)
            for name in names
            if with_weight or name != f"{path}.weight"
        }
        if not with_weight:
            info = file.info(f"{path}.weight")
            arrays["weight"] = np.broadcast_to(info.dtype.type(0), info.shape)
        scheme = self.scheme_of(f"{block_prefix(index)}{path}")
        return from_arrays(scheme.weight, scheme.activation, arrays)

    def changed_tensor(self, name: str) -> np.ndarray | None:
        """A float32 tensor that folding has changed, by its full name; None for all others."""
        found = in_block(name)
        if found is None:
            return None
        file, changed = self._of(*found), f"{CHANGED}{found[1]}"
        return file.read(changed) if changed in file.tensors else None

    def cache_scale(self, index: int, path: str) -> np.ndarray:
        """Scales of the outputs of a linear, by its path in a block, in a cache of int8."""
        return self._file(index).read(f"{CACHE}{path}")

    def statistic(self, index: int, name: str) -> np.ndarray:
        """A statistic of a block, by its name there."""
        return self._of(index, name).read(name)

    def _facts(self, *keys: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Each finished block, and what its files say under some keys."""
        parts: dict[int, list[int | None]] = {}
        for index, expert in self._finished():
            parts.setdefault(index, []).append(expert)
        for index, experts in sorted(parts.items()):
            if None in experts:
                yield index, self._joined(index, experts, keys)

    def _joined(
        self, index: int, experts: Iterable[int | None], keys: Sequence[str]
    ) -> list[dict[str, Any]]:
        """What files of a block say under some keys, those of experts first."""
        found: list[dict[str, Any]] = [{} for _ in keys]
        for expert in sorted(experts, key=lambda one: (one is None, one)):
            metadata = CheckedFile(self.block_file(index, expert)).metadata
            for facts, key in zip(found, keys, strict=True):
                _add(facts, json.loads(metadata.get(key, "{}")))
        return found

    def notes(self, index: int) -> dict[str, Any]:
        """Group of a finished block to what was chosen."""
        return self._joined(index, [*self.finished_experts(index), None], ["notes"])[0]

    def errors(self, index: int) -> dict[str, float]:
        """Group of a finished block to the relative error of its outputs."""
        return self._joined(index, [*self.finished_experts(index), None], ["errors"])[0]

    def ranges(self) -> list[dict[str, Any]]:
        """How large the activations of each finished block get; empty without calibration."""
        return [ranges for _, (ranges,) in self._facts("ranges")]

    def routing(self) -> dict[int, dict[str, Any]]:
        """How many tokens came to the experts of each finished block that has some."""
        return {
            index: {key: value for key, value in facts.items() if key != "counts"}
            for index, (facts,) in self._facts("routing")
            if facts
        }

    def findings(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What was found out of each finished block, as the record of an output says it: each
        group's error and input, and how many tokens came to each expert."""
        for index, (errors, inputs, routing) in self._facts("errors", "inputs", "routing"):
            names = dict.fromkeys([*errors, *inputs])
            groups = {name: _finding(errors.get(name), inputs.get(name)) for name in names}
            counts = routing.get("counts")
            found = {"groups": groups} if groups else {}
            found |= {"expert_tokens": counts} if counts else {}
            if found:
                yield index, found

    def measured(self) -> dict[GroupId, Measured]:
        """What is known of each group of the finished blocks, whoever did them."""
        return {
            GroupId(index, group): Measured(took, errors.get(group))
            for index, (seconds, errors) in self._facts("seconds", "errors")
            for group, took in seconds.items()
        }


def _finding(error: float | None, seen: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if error is None else {"error": error}
    return found if seen is None else {**found, "input": seen}


def _add(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds the facts of another part; of those that both have, the parts are joined."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = {**found[key], **value}
        else:
            found[key] = value
