"""The statistics of several groups of linears, as arrays and facts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, MsQuantError
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.statistics.stated import fact

STATS = "stats."


def stats_arrays(stats: Mapping[str, ActivationStats]) -> dict[str, np.ndarray]:
    """What was seen, by names; :func:`stats_facts` says the rest."""
    return {
        f"{STATS}{name}.{key}": array
        for name, seen in stats.items()
        for key, array in seen.arrays().items()
    }


def stats_facts(stats: Mapping[str, ActivationStats]) -> dict[str, Any]:
    """How it was seen, as JSON."""
    return {name: seen.facts() for name, seen in stats.items()}


def restored_stats(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> dict[str, ActivationStats]:
    """The statistics that were written as arrays and facts, by group.

    Raises:
        MsQuantError: names the group and what of it is missing or is not what it should be.
    """
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for full, array in arrays.items():
        if full.startswith(STATS):
            name, _, key = full.removeprefix(STATS).rpartition(".")
            parts[name][key] = array
    found = {}
    for name in facts:
        said = fact(facts, name, dict)
        kind = StepStats if "steps" in said else ActivationStats
        try:
            found[name] = kind.restore(parts[name], said)
        except MsQuantError as error:
            raise BadFileError(f"{STATS}{name}: {error}") from None
    return found
