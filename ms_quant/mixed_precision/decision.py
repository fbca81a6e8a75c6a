"""Which group gets which scheme: by the estimates, and by what trials measure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ms_quant.algorithms.pipeline import has
from ms_quant.allocation.knapsack import best_within
from ms_quant.analysis.inputs import describe_input
from ms_quant.analysis.records import GroupSensitivity, Sensitivity, percent
from ms_quant.analysis.summary import title
from ms_quant.errors import BadArgumentError
from ms_quant.mixed_precision.candidates import Candidates, Choice, candidates
from ms_quant.mixed_precision.costs import FLOAT, Cost
from ms_quant.mixed_precision.request import CheckedMixed
from ms_quant.mixed_precision.search import cheapest_within
from ms_quant.mixed_precision.trials import Increase, Trials
from ms_quant.models.names import GroupId
from ms_quant.schemes.table import SCHEMES

MOST_REFUSALS = 4
"""Times that what is written may be over the budget where what was put together was within."""
HEAVY_TAILS = 25.0
"""The excess kurtosis of inputs of which calibration has not seen the largest values that other
texts have. Behind a rotation what a linear reads has less than 20, and what multiplies two of its
outputs, as the input of down_proj is, has more than 30: some channels are quiet in thousands of
tokens and then carry half of one."""
MOST_LINES = 12
"""Of groups that are named; the recipe has all."""


@dataclass(frozen=True)
class Decision:
    """Attributes:
    choice: every group to its scheme.
    bits: stored bits of a weight in the mean.
    token_bytes: what a step of decode reads of the weights for one token.
    estimate: the increase of the loss by the analysis.
    increase: what was measured, if there was a text.
    trials: how many choices were measured.
    """

    choice: Choice
    bits: float
    token_bytes: int
    estimate: float
    increase: Increase | None = None
    trials: int = 0

    def facts(self, found: Sensitivity, order: Sequence[str]) -> dict[str, Any]:
        """What the recipe says of it, as JSON; ``order``: of the schemes, wanted most first."""
        facts: dict[str, Any] = {
            "groups": dict(Counter(self.choice.values()).most_common()),
            "bits_per_weight": self.bits,
            "bytes_per_token": self.token_bytes,
            "estimated_increase": math.expm1(self.estimate),
        }
        if self.increase is not None:
            facts["perplexity_increase"] = self.increase.perplexity
            facts["perplexity_increase_error"] = self.increase.perplexity_error
            facts["phase"] = self.increase.phase
            facts["trials"] = self.trials
        return {**facts, "moved": list(self.moved(found, order))}

    def moved(self, found: Sensitivity, order: Sequence[str]) -> Iterator[str]:
        """A sentence for each group without the scheme that is wanted most, the worst first."""
        usual = next(scheme for scheme in order if scheme in self.choice.values())
        scheme_of = {
            group.path: self.choice.get(GroupId(group.block, group.name), usual)
            for group in found.groups
        }
        groups = [group for group in found.groups if scheme_of[group.path] != usual]
        if usual in found.schemes:
            groups = [group for group in groups if usual in group.schemes]
            groups.sort(key=lambda group: -group.score(usual, "loss_increase"))
        for group in groups[:MOST_LINES]:
            line = f"{title(group)} is {scheme_of[group.path]}"
            if usual in group.schemes:
                cost = percent(group.score(usual, "loss_increase"))
                line += f", as {usual} of it alone costs about {cost:+.2g} %"
                if SCHEMES[usual].needs_calibration and _tailed(group):
                    line += " and may cost more on other texts"
            if group.input is not None and group.input.massive:
                line += f" (its largest input is {describe_input(group.input)})"
            yield line
        if len(groups) > MOST_LINES:
            yield f"and {len(groups) - MOST_LINES} more groups, see the recipe"


def decide(asked: CheckedMixed, found: Sensitivity, trials: Trials) -> Decision:
    """The choice that the goal asks for.

    Raises:
        MsQuantError: no choice is within the budget.
    """
    with_float = FLOAT in asked.options.choose
    if asked.target_bits is not None:
        known = candidates(found, asked.costs, with_float, _bits)
        decision = _of_size(known, asked)
        if asked.heldout is None:
            return decision
        return replace(decision, increase=trials.increase(decision.choice), trials=1)
    return _of_increase(
        candidates(found, steady_costs(asked, found), with_float, _work), asked, trials
    )


def steady_costs(asked: CheckedMixed, found: Sensitivity) -> dict[GroupId, dict[str, Cost]]:
    """What groups cost in the schemes that are open to them: no static one to inputs with heavy
    tails where they may stay float. What it costs on texts that nobody has measured is not known.

    Only of rotated models, as an outlier channel, which is as large in all texts, has them too.
    """
    tailed = {GroupId(group.block, group.name) for group in found.groups if _tailed(group)}
    rotated = has(asked.options.job.algorithm, "rotates")
    if FLOAT not in asked.options.choose or not rotated or tailed.issuperset(asked.costs):
        return asked.costs
    static = {name for name in asked.schemes if SCHEMES[name].needs_calibration}
    return {
        group: {name: cost for name, cost in known.items() if name not in static}
        if group in tailed
        else known
        for group, known in asked.costs.items()
    }


def _tailed(group: GroupSensitivity) -> bool:
    return group.input is not None and group.input.kurtosis > HEAVY_TAILS


def _bits(cost: Cost) -> float:
    return cost.bits


def _work(cost: Cost) -> float:
    return cost.work


def _decision(choice: Choice, known: Candidates, asked: CheckedMixed) -> Decision:
    read = asked.fixed_bytes + known.stored(choice)
    return Decision(choice, known.bits(choice), read, known.loss(choice))


def _of_size(known: Candidates, asked: CheckedMixed) -> Decision:
    assert asked.target_bits is not None
    return _decision(known.choice(best_within(known.parts, asked.target_bits)), known, asked)


def _of_increase(known: Candidates, asked: CheckedMixed, trials: Trials) -> Decision:
    assert asked.options.max_ppl_increase is not None
    budget = math.log1p(asked.options.max_ppl_increase)
    row = [choice for choice in map(known.at, known.prices()) if set(choice.values()) != {FLOAT}]
    estimates = [known.loss(choice) for choice in row]
    measured: dict[int, float] = {}
    least, margin = math.inf, 0.0
    for _ in range(MOST_REFUSALS):
        place, found = cheapest_within(
            estimates, budget - margin, lambda place: trials.estimate(row[place]).bound
        )
        measured |= found
        if place == len(row):
            break
        increase = trials.increase(row[place])
        if increase.bound <= budget:
            choice = row[place]
            count = len(measured) + 1
            return replace(_decision(choice, known, asked), increase=increase, trials=count)
        trials.forget(row[place])
        least, margin = min(least, increase.bound), max(margin, increase.bound - found[place])
    least = min(least, *measured.values()) if measured else least
    raise BadArgumentError(
        f"max ppl increase {100 * asked.options.max_ppl_increase:g} % cannot be reached with "
        f"{', '.join(asked.options.choose)}: the least that was found is {percent(least):.3g} %, "
        "its standard error included; expected a larger budget, other schemes, more held-out text, "
        "or another algorithm"
    )
