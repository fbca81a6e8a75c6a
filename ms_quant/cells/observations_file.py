"""The file of observations: statistics and calls of blocks as tensors, the rest in the header.

One safetensors file. ``ms_quant.observations`` in its metadata is JSON: the version, what
:class:`~ms_quant.cells.observations.Observations` states of itself, ``stats`` by the first linear
of each group, and ``block_calls`` by block (:mod:`ms_quant.cells.call_file`). The tensors are
``stats.LINEAR.NAME`` and ``calls.BLOCK.NUMBER``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.cells.call_file import restored_calls, stated_calls
from ms_quant.cells.calls import IN_MEMORY, CallStore
from ms_quant.errors import BadFileError
from ms_quant.files.atomic import free_space_check
from ms_quant.files.safetensors_file import SafetensorsFile
from ms_quant.files.writer import TensorPlan, write_file
from ms_quant.statistics.observers import ActivationStats
from ms_quant.statistics.stated import fact
from ms_quant.statistics.stats_file import STATS, restored_stats, stats_arrays, stats_facts

KEY, VERSION, CALLS = "ms_quant.observations", 1, "calls."


def write_observations(
    path: Path,
    facts: Mapping[str, Any],
    stats: Mapping[str, ActivationStats],
    windows: Mapping[str, CallStore],
) -> None:
    """Writes a file of observations, whole or not at all.

    Args:
        path: the file.
        facts: JSON that :func:`read_observations` gives back.
        stats: the statistics of each group.
        windows: path of a block to calls of it.

    Raises:
        MsQuantError: a block was called with what no file holds, or the disk is full.
    """
    plans = [_plan(name, array) for name, array in stats_arrays(stats).items()]
    calls = {}
    for block, store in windows.items():
        calls[block], tensors = stated_calls(store, f"{CALLS}{block}", block)
        plans += tensors
    free_space_check(path.parent, sum(plan.bytes for plan in plans))
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"version": VERSION, **facts, "stats": stats_facts(stats), "block_calls": calls}
    write_file(path, plans, lambda plan: plan.value(None), {KEY: json.dumps(said, allow_nan=False)})


def _plan(name: str, array: np.ndarray) -> TensorPlan:
    return TensorPlan(name, array.dtype, array.shape, make=lambda *_: array)


def read_observations(
    file: SafetensorsFile,
) -> tuple[dict[str, Any], dict[str, ActivationStats], dict[str, CallStore]]:
    """What :func:`write_observations` wrote: facts, statistics and calls.

    Raises:
        MsQuantError: something is missing or is not what it should be.
    """
    facts = file.stated(KEY, "Observations.save")
    if type(facts) is not dict or facts.get("version") != VERSION:
        raise BadFileError(f"{KEY}: {facts!r:.80}, expected observations of version {VERSION}")
    arrays = {name: file.read(name) for name in file.tensors if name.startswith(STATS)}
    stats = restored_stats(arrays, fact(facts, "stats", dict))
    calls = fact(facts, "block_calls", dict)
    windows = {
        block: restored_calls(
            fact(calls, block, list), file, f"{CALLS}{block}", IN_MEMORY // len(calls)
        )
        for block in calls
    }
    return facts, stats, windows
