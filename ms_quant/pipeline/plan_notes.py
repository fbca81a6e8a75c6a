"""What to know of a plan before the work, one sentence each."""

from __future__ import annotations

from ms_quant.formats.checks import served_by
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.parts import notes, parts_of, read_asked
from ms_quant.pipeline.planning import linear_paths
from ms_quant.plan.exclude import float_notes
from ms_quant.plan.plan import Plan
from ms_quant.plan.targets import broken_rules


def plan_notes(options: QuantizeOptions, plan: Plan) -> list[str]:
    """What parts became that were not named, patterns of what is float anyway, and why no runtime
    serves the plan.

    Args:
        options: the request.
        plan: what became of it.
    """
    found = []
    if options.recipe is None:
        found += notes(parts_of(plan.config), read_asked(options.scheme, options.algorithm))
    broken = [] if served_by(plan) else broken_rules(plan)
    found += float_notes(options.exclude, linear_paths(plan.config), plan.config)
    return [*found, *([f"no runtime serves this plan: {'; '.join(broken)}"] if broken else [])]
