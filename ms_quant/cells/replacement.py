"""One replacement of a network's linears: what is checked, observed and solved for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache

import numpy as np
from mindspore import nn

from ms_quant.cells import timesteps
from ms_quant.cells.blocks import BlockErrors
from ms_quant.cells.calls import Progress
from ms_quant.cells.choice import LinearPlan
from ms_quant.cells.float_forward import in_float32, run_dtype
from ms_quant.cells.observations import GroupObservation, Observations
from ms_quant.cells.observe import Structure, Wanted, observe
from ms_quant.cells.quant_linear import Made, QuantLinear
from ms_quant.cells.save import check_format
from ms_quant.cells.sites import Site, weight_and_bias
from ms_quant.cells.solve import Group, solve
from ms_quant.errors import BadArgumentError
from ms_quant.formats.mindie_sd.choice import network_scheme
from ms_quant.numerics.timestep import Timestep
from ms_quant.schemes.records import Scheme
from ms_quant.statistics.observers import StepStats
from ms_quant.timestep import TimestepPolicyConfig, kept_timesteps


class Replacement:
    """What linears of a network become, checked before anything long is done.

    Args:
        network: it; left as it is.
        sites: the linears that are quantized, by path.
        plans: what each becomes.
        policy: which timesteps are static, where the user says it.
        dtype: the type that all run in; None for each linear's own.
        progress: told of calls and groups.
        policy_of_attention: whether attention takes the policy, too.

    Raises:
        MsQuantError: a linear cannot be what it should become, or no scheme takes the policy.
    """

    def __init__(
        self,
        network: nn.Cell,
        sites: Mapping[str, Site],
        plans: Mapping[str, LinearPlan],
        policy: TimestepPolicyConfig | None,
        dtype: np.dtype | None,
        progress: Progress,
        policy_of_attention: bool = False,
    ):
        self.network, self.sites, self.plans, self.progress = network, sites, plans, progress
        self.policy = _policy([plan.scheme for plan in plans.values()], policy, policy_of_attention)
        self.dtypes = {path: dtype or run_dtype(site.cell) for path, site in sites.items()}
        self.kinds: list[LinearPlan] = []
        for path, plan in plans.items():
            if plan not in self.kinds:
                self.kinds.append(plan)
                _refuse_rotations(plan)
            weight, _ = weight_and_bias(sites[path])
            plan.scheme.weight.check_columns(weight.shape[1], f"{path}.weight")

    def check_format(self, format: str) -> None:
        """Refuses what could not be written in a format.

        Raises:
            MsQuantError: it is no such format, or would not hold a linear.
        """
        for kind in self.kinds:
            cells = {p: self.sites[p].cell for p, plan in self.plans.items() if plan == kind}
            check_format(format, kind.scheme, kind.algorithms, cells)

    def observed(
        self, calibration: Iterable | Observations | None, structure: Structure
    ) -> Observations:
        """What the algorithms need to know of the linears' inputs.

        Raises:
            MsQuantError: inputs are needed and missing, or do not reach a linear.
        """
        wanted = {path: want for path in self.plans if (want := self._wanted(path)) is not None}
        if isinstance(calibration, Observations):
            if structure != Structure():
                what = "groups" if structure.groups is not None else "blocks"
                raise BadArgumentError(
                    f"{what}: given with observations, expected it for calibrate"
                )
            for path, want in wanted.items():
                _check_observed(calibration, self.sites[path], want)
            return calibration
        if not wanted:
            return Observations()
        for path, want in wanted.items():
            if want.needed and calibration is None:
                plan = self.plans[path]
                needs = plan.scheme.needs_calibration and want.by_step is None
                what = (
                    f"scheme {plan.scheme.name}" if needs else f"algorithm {plan.algorithms.name}"
                )
                raise BadArgumentError(f"{what}: needs calibration inputs, found None")
        data = () if calibration is None else calibration
        return observe(self.network, self.sites, wanted, data, structure, self.progress)

    def _wanted(self, path: str) -> Wanted | None:
        """What is kept of a linear's input, None where nothing looks at it."""
        plan = self.plans[path]
        policy = self._policy_of(plan)
        static = plan.scheme.needs_calibration and policy is None
        calibrated = plan.algorithms.any("calibrated") or static
        if not calibrated and policy is None:
            return None
        return Wanted(plan.algorithms, policy, self._kind(path), calibrated)

    def _kind(self, path: str) -> tuple[int, str]:
        """What linears of one group have in common beside their input."""
        return self.kinds.index(self.plans[path]), self.dtypes[path].name

    def _policy_of(self, plan: LinearPlan) -> TimestepPolicyConfig | None:
        return self.policy if isinstance(plan.scheme.activation, Timestep) else None

    def quantized(self, observed: Observations) -> dict[str, QuantLinear]:
        """The Cells that linears become, by path.

        Raises:
            MsQuantError: a value is NaN or inf, or does not fit what holds it.
        """
        made = {}
        with ExitStack() as stack:
            if observed.windows:  # blocks are called
                stack.enter_context(kept_timesteps())
                stack.enter_context(in_float32(self.network))
            groups = list(self._groups(observed))
            for done, group in enumerate(groups, 1):
                scheme, name = group.plan.scheme, group.plan.algorithms.name
                for path, found in solve(group).items():
                    made[path] = QuantLinear(
                        found.linear,
                        timestep_policy=group.policy or self.policy,
                        scheme=scheme,
                        made=Made(name, found.error, found.on_outputs),
                    )
                self.progress("quantize", done, len(groups))
        return made

    def _groups(self, observed: Observations) -> Iterator[Group]:
        """Linears that read one input and become the same, in definition order."""
        together: dict[Hashable, list[str]] = defaultdict(list)
        for path in self.plans:
            seen = observed[path].paths if path in observed else (path,)
            together[seen, self._kind(path)].append(path)
        errors = lru_cache(maxsize=1)(lambda *key: self._errors(observed, *key))  # of one block
        for paths in together.values():
            plan, seen_group = self.plans[paths[0]], None
            policy = self._policy_of(plan)
            if self._wanted(paths[0]) is not None:
                seen_group = observed[paths[0]]
            yield Group(
                tuple(self.sites[path] for path in paths),
                LinearPlan(network_scheme(plan.scheme), plan.algorithms),
                self.dtypes[paths[0]],
                None if seen_group is None else seen_group.stats,
                policy,
                errors(seen_group.block, policy) if seen_group and seen_group.block else None,
            )

    def _errors(
        self, observed: Observations, block: str, policy: TimestepPolicyConfig | None
    ) -> BlockErrors:
        return BlockErrors(self.network, block, observed.windows[block], policy)


def _refuse_rotations(plan: LinearPlan) -> None:
    if plan.algorithms.any("rotates"):
        raise BadArgumentError(
            f"algorithm {plan.algorithms.name!r}: quarot rotates a whole decoder checkpoint, "
            "expected it only with ms-quant quantize"
        )


def _policy(
    schemes: Iterable[Scheme], given: TimestepPolicyConfig | None, of_attention: bool
) -> TimestepPolicyConfig | None:
    """The policy of schemes of timesteps, None where there is none.

    Raises:
        MsQuantError: it is none, or no scheme takes one.
    """
    if given is not None and not isinstance(given, TimestepPolicyConfig):
        found = type(given).__name__
        raise BadArgumentError(f"timestep_policy: {found}, expected a TimestepPolicyConfig")
    names = {scheme.name: scheme for scheme in schemes}
    inputs = [scheme.activation for scheme in names.values()]
    if given is not None and any(timesteps.takes_wide(kind, given) for kind in inputs):
        return given
    if any(isinstance(scheme.activation, Timestep) for scheme in names.values()):
        return given or TimestepPolicyConfig()
    if given is not None and not of_attention:
        listed = " and ".join(names) or "FLOAT"
        raise BadArgumentError(
            f"timestep_policy: scheme {listed} takes none, expected scheme W8A8_TIMESTEP, or "
            "quantized attention"
        )
    return None


def _check_observed(observed: Observations, site: Site, wanted: Wanted) -> None:
    """Refuses observations that lack what a linear needs.

    Raises:
        MsQuantError: names the linear and what is missing.
    """
    path, channels = site.path, site.taps[site.path]
    if path not in observed:
        raise BadArgumentError(f"{path}: is not among what calibrate looked at, expected it there")
    group: GroupObservation = observed[path]
    stats, algorithms = group.stats, wanted.algorithms
    if stats.channels != channels:
        raise BadArgumentError(
            f"{path}: calibrate saw {stats.channels} channels, expected the {channels} that it "
            "reads, of the same network"
        )
    missing = [
        name
        for name, needed, there in (
            ("products of channels", algorithms.any("hessian"), stats.products is not None),
            ("histogram", algorithms.any("histogram"), stats.histogram is not None),
            ("calls of blocks", algorithms.any("searches"), observed.searched),
            ("tokens", True, stats.keep_rows >= algorithms.kept_tokens),
        )
        if needed and not there
    ]
    if missing:
        raise BadArgumentError(
            f"{path}: calibrate kept too few {missing[0]} for {algorithms.name}, expected "
            f"ms_quant.calibrate(network, data, algorithm={algorithms.name!r})"
        )
    if isinstance(stats, StepStats) != (wanted.by_step is not None):
        what = "no ranges" if wanted.by_step is not None else "ranges"
        raise BadArgumentError(
            f"{path}: calibrate kept {what} of timesteps, expected timestep_policy there for "
            "W8A8_TIMESTEP and for no other scheme"
        )
    if wanted.needed and not stats.tokens:
        raise BadArgumentError(f"{path}: no calibration input reached it; exclude it or add data")
    if isinstance(stats, StepStats) and wanted.by_step is not None:
        timesteps.refuse_unseen(path, stats.seen_steps, stats.steps, wanted.by_step)
