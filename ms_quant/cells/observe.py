"""Calling a network with calibration inputs while its linears' inputs are watched."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor, nn

from ms_quant.algorithms import ALGORITHMS, PLAIN, AlgorithmPipeline
from ms_quant.cells import timesteps
from ms_quant.cells.blocks import BlockCalls, blocks_of, enclosing, listed_blocks, stated_blocks
from ms_quant.cells.calls import CallStore, Progress, collect, silent
from ms_quant.cells.float_forward import in_float32
from ms_quant.cells.observations import GroupObservation, Observations, input_name
from ms_quant.cells.recorder import float32
from ms_quant.cells.same_input import Groups, SharedInputs, stated_groups
from ms_quant.cells.sites import Show, Site, sites
from ms_quant.cells.tree import is_linear, replaced
from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig, kept_timesteps


@dataclass(frozen=True)
class Wanted:
    """What is kept of a linear's input.

    Attributes:
        algorithms: that will look at it.
        by_step: the policy, where ranges of each timestep are kept, too.
        together: what linears of one group must have in common.
        needed: whether a linear that no input reaches is refused.
    """

    algorithms: AlgorithmPipeline
    by_step: TimestepPolicyConfig | None = None
    together: Hashable = None
    needed: bool = True


@dataclass(frozen=True)
class Structure:
    """What is known of a network before it is called.

    Attributes:
        groups: which linears read one input; None to find them.
        blocks: patterns of blocks; None for those of lists.
    """

    groups: Groups | None = None
    blocks: Sequence[str] | None = None


def calibrate(
    network: nn.Cell,
    data: Iterable,
    *,
    algorithm: str = DEFAULTS.algorithm,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    groups: Groups | None = None,
    blocks: Sequence[str] | None = None,
    timestep_policy: TimestepPolicyConfig | None = None,
    progress: Progress | None = None,
) -> Observations:
    """Looks at the inputs of a network's linears and replaces nothing.

    Args:
        network (Cell): as for :func:`ms_quant.quantize`; not a linear itself.
        data (Iterable): what to call the network with, as `calibration` there.
        algorithm (str): names of the algorithms that the result is for, joined with ``+``. It holds
            what they need: products of channels for ``gptq``, calls of blocks for ``osl``.
            Default: ``"minmax"``.
        include, exclude (Sequence[str]): as for :func:`ms_quant.quantize`.
        groups, blocks: as for :func:`ms_quant.quantize`.
        timestep_policy (TimestepPolicyConfig, optional): keeps ranges of each timestep, for
            W8A8_TIMESTEP. Default: ``None``.
        progress (Callable, optional): as for :func:`ms_quant.quantize`. Default: ``None``.

    Returns:
        Observations, which ``ms_quant.quantize(network, ..., calibration=observations)`` takes in
        place of data. Those of several parts of the data can be merged, and kept in files
        (:class:`ms_quant.Observations`). Printed, it is a table: which linears read one input, how
        many tokens, the smallest and largest value, and how much larger the largest channel is than
        the median one.

    Raises:
        MsQuantError: `network` holds no linear, a pattern matches nothing, an algorithm is unknown,
            an input is NaN or inf, or inputs are of no timestep where one is needed.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> import ms_quant
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> data = (Tensor(np.full((4, 8), i, np.float32)) for i in range(3))
        >>> observations = ms_quant.calibrate(net, data)
        >>> print(observations["0"].stats.tokens, observations["0"].stats.high.max())
        12 2.0
        >>> net = ms_quant.quantize(net, "W8A8", calibration=observations)
    """
    if is_linear(network):
        raise BadArgumentError(
            f"{network.cls_name}: is a linear itself, expected a network of them"
        )
    names = () if algorithm == PLAIN else tuple(algorithm.split("+"))
    for name in names:
        if name not in ALGORITHMS:
            known = ", ".join([PLAIN, *ALGORITHMS])
            raise BadArgumentError(f"algorithm {name!r} is unknown, expected one of {known}")
    wanted = Wanted(AlgorithmPipeline(names), timestep_policy, needed=False)
    chosen = sites(network, include, exclude)
    structure = Structure(groups, blocks)
    return observe(
        network, chosen, dict.fromkeys(chosen, wanted), data, structure, progress or silent
    )


def observe(
    network: nn.Cell,
    chosen: Mapping[str, Site],
    wanted: Mapping[str, Wanted],
    data: Iterable,
    structure: Structure,
    progress: Progress,
) -> Observations:
    """Calls a network with calibration data.

    Args:
        network: what is called.
        chosen: the linears that are watched, by path.
        wanted: what for, by path.
        data: as for :func:`ms_quant.cells.swap.quantize`.
        structure: groups and blocks.
        progress: told of every call.

    Raises:
        MsQuantError: inputs do not reach a linear that needs them, or are of no timestep.
    """
    run = _Run(network, chosen, wanted, structure, progress)
    by_step = [want.by_step for want in wanted.values() if want.by_step is not None]
    with kept_timesteps(), in_float32(network):  # what gives the calls may call the network
        if by_step:
            TimestepManager.set_timestep_idx(None)  # of no step until the data says of which
        run.calls = collect(data, progress)
        if by_step:
            run.steps = timesteps.count_steps(run.calls.steps, by_step[0])
        observed = run.once()
        while observed is None:
            observed = run.once()
    for group in observed.groups:
        _refuse_unreached(group, wanted[group.paths[0]])
    return observed


def _refuse_unreached(group: GroupObservation, wanted: Wanted) -> None:
    stats, path = group.stats, group.paths[0]
    if wanted.needed and not stats.tokens:
        raise BadArgumentError(f"{path}: no calibration input reached it; exclude it or add data")
    if isinstance(stats, StepStats) and wanted.by_step is not None:
        timesteps.refuse_unseen(path, stats.seen_steps, stats.steps, wanted.by_step)


@dataclass
class _Run:
    """All calls of a network, made once or, where linears must be told apart, again."""

    network: nn.Cell
    sites: Mapping[str, Site]
    wanted: Mapping[str, Wanted]
    structure: Structure
    progress: Progress
    calls: CallStore = field(default_factory=CallStore)
    steps: int = 0

    def __post_init__(self) -> None:
        structure, listed = self.structure, listed_blocks(self.network)
        self.blocks = listed
        if structure.blocks is not None:
            self.blocks = stated_blocks(self.network, structure.blocks)
        self.site_of = {tap: path for path in self.wanted for tap in self.sites[path].taps}
        around: dict[str, Hashable] = {
            tap: enclosing([tap], [*listed, *self.blocks]) for tap in self.site_of
        }
        if structure.groups is not None:
            keys = stated_groups(structure.groups, self.sites)
            self._check_widths(keys)
            around = {tap: (tap in keys, keys.get(tap, tap)) for tap in self.site_of}
        self.apart: dict[str, Hashable] = {
            tap: (self.wanted[path].together, around[tap]) for tap, path in self.site_of.items()
        }

    def _check_widths(self, keys: Mapping[str, Hashable]) -> None:
        first: dict[Hashable, str] = {}
        for path, key in keys.items():
            other = first.setdefault(key, path)
            found, expected = self.sites[path].taps[path], self.sites[other].taps[other]
            if found != expected:
                raise BadArgumentError(
                    f"groups: {other} reads {expected} channels and {path} {found}, expected "
                    "linears that read one input"
                )

    def once(self) -> Observations | None:
        """Makes all calls; None where linears of a group turned out to read other inputs."""
        shared = SharedInputs(self.apart, find=self.structure.groups is None)
        stats = {tap: self._stats(tap) for tap in self.site_of}
        searched = any(want.algorithms.any("searches") for want in self.wanted.values())
        kept = BlockCalls(self.network, self.blocks if searched else (), self.calls)
        show = _shower(shared, stats)
        cells = {path: self.sites[path].watch(show) for path in self.wanted}
        try:
            with replaced(self.network, cells):
                for index, call in enumerate(self.calls):
                    TimestepManager.set_timestep_idx(call.step)
                    kept.begin_call(index)
                    shared.begin_call()
                    self.network(*call.arguments, **call.named)
                    if not shared.end_call():
                        self.apart = shared.apart
                        return None
                    for tap, leader in shared.leader.items():
                        stats[tap] = stats[leader]
                    self.progress("calibrate", index + 1, len(self.calls))
        finally:
            kept.remove()
        stated = self.structure.blocks is not None
        blocks = blocks_of(shared.groups, kept.kept, stated=stated)
        return Observations(
            tuple(GroupObservation(g, stats[g[0]], blocks[g]) for g in shared.groups),
            len(self.calls),
            searched,
            {path: calls for path, calls in kept.kept.items() if path in blocks.values()},
            self.calls.tokens,
            tuple(kept.chosen),
            stated,
        )

    def _stats(self, tap: str) -> ActivationStats:
        path = self.site_of[tap]
        want, channels = self.wanted[path], self.sites[path].taps[tap]
        more: dict[str, Any] = {
            "total_tokens": self.calls.tokens,
            "keep_rows": want.algorithms.kept_tokens,
            "with_hessian": want.algorithms.any("hessian"),
            "equal_tokens": want.algorithms.any("equal_tokens"),
            "with_histogram": want.algorithms.any("histogram"),
            "name": input_name(tap),
        }
        if want.by_step is not None:
            return StepStats(channels, steps=self.steps, **more)
        return ActivationStats(channels, **more)


def _shower(shared: SharedInputs, stats: Mapping[str, ActivationStats]) -> Show:
    def show(tap: str, x: Tensor) -> None:
        if shared.note(tap, x):
            seen = stats[tap]
            update = timesteps.recorder(seen) if isinstance(seen, StepStats) else seen.update
            update(float32(x))

    return show
