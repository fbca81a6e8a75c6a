"""Calling a network with calibration inputs while its linears' inputs are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from ms_quant.algorithms import AlgorithmPipeline
from ms_quant.cells import timesteps
from ms_quant.cells.float_forward import in_float32
from ms_quant.cells.recorder import Recorder
from ms_quant.cells.tree import replaced
from ms_quant.errors import MsQuantError
from ms_quant.schemes.records import Scheme
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig, kept_timesteps


def observe(
    network: nn.Cell,
    cells: Mapping[str, nn.Cell],
    scheme: Scheme,
    algorithms: AlgorithmPipeline,
    calibration: Iterable | None,
    policy: TimestepPolicyConfig | None = None,
) -> dict[str, ActivationStats]:
    """Statistics of the inputs of linears, by path; empty where nothing needs them.

    Args:
        network: what is called with the calibration inputs.
        cells: the linears by path.
        scheme, chain: what the statistics are for.
        calibration: as for :func:`ms_quant.cells.swap.quantize`.
        policy: which timesteps are static, for a scheme of timesteps, else None.

    Raises:
        MsQuantError: inputs are needed and missing, or they do not reach a linear.
    """
    calibrated = algorithms.any("calibrated") or (scheme.needs_calibration and policy is None)
    if not calibrated and policy is None:
        return {}
    if calibrated and calibration is None:
        needs = scheme.needs_calibration and policy is None
        what = f"scheme {scheme.name}" if needs else f"algorithm {algorithms.name}"
        raise MsQuantError(f"{what}: needs calibration inputs, found None")
    with kept_timesteps(), in_float32(network):  # what gives the calls may call the network
        if policy is not None:
            TimestepManager.set_timestep_idx(None)  # of no step until the data says of which
        calls = [_call(batch) for batch in (() if calibration is None else calibration)]
        stats = _stats(cells, algorithms, calls, policy)
        recorders = {path: Recorder(cell, _watch(stats[path])) for path, cell in cells.items()}
        with replaced(network, recorders):
            for call in calls:
                TimestepManager.set_timestep_idx(call.step)
                network(*call.arguments, **call.named)
    for path, seen in stats.items():
        if calibrated and not seen.tokens:
            raise MsQuantError(f"{path}: no calibration input reached it; exclude it or add data")
        if policy is not None and isinstance(seen, StepStats):
            timesteps.refuse_unseen(path, seen.seen_steps, seen.steps, policy)
    return stats


def _stats(
    cells: Mapping[str, nn.Cell],
    algorithms: AlgorithmPipeline,
    calls: Sequence[_Call],
    policy: TimestepPolicyConfig | None,
) -> dict[str, ActivationStats]:
    more: dict[str, Any] = {
        "total_tokens": sum(map(_tokens, calls)),
        "keep_rows": algorithms.kept_tokens,
        "with_hessian": algorithms.any("hessian"),
        "with_histogram": algorithms.any("histogram"),
    }
    made: type[ActivationStats] = ActivationStats
    if policy is not None:
        made, more["steps"] = StepStats, timesteps.count_steps([c.step for c in calls], policy)
    return {
        path: made(cell.weight.shape[1], name=f"{path} input", **more)
        for path, cell in cells.items()
    }


def _watch(stats: ActivationStats) -> Callable[[np.ndarray], None]:
    return timesteps.recorder(stats) if isinstance(stats, StepStats) else stats.update


@dataclass(frozen=True)
class _Call:
    """What one item of the calibration data stands for.

    Attributes:
        arguments, named: what the network is called with.
        step: the timestep that was set when the item was given, or None.
    """

    arguments: tuple
    named: dict[str, Any]
    step: int | None


def _call(batch: Any) -> _Call:
    step = TimestepManager.get_timestep_idx()

    def tensor(value: Any) -> Any:
        return Tensor(value) if isinstance(value, np.ndarray) else value

    if isinstance(batch, Mapping):
        return _Call((), {key: tensor(value) for key, value in batch.items()}, step)
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return _Call(tuple(map(tensor, arguments)), {}, step)


def _tokens(call: _Call) -> int:
    """A guess of the tokens in a call; only decides how densely rows are kept."""
    first = next((value for value in (*call.arguments, *call.named.values())), None)
    if not isinstance(first, Tensor):
        return 1
    channels = first.shape[-1] if first.ndim and first.is_floating_point() else 1  # or token ids
    return max(1, first.size // max(1, channels))
