"""What a finished job says about groups that came out badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

TOO_MUCH = 0.1
"""The relative error of a group's outputs from which the whole model predicts noticeably worse: on
a real model (docs/accuracy.md) groups beyond it cost 1 to 14 % of perplexity each."""
SHOWN = 3


class Reported(Protocol):
    """A group and its error, as in :class:`~ms_quant.pipeline.result.GroupReport`."""

    @property
    def group(self) -> str: ...

    @property
    def error(self) -> float | None: ...


def quality_warnings(report: Sequence[Reported]) -> list[str]:
    """A sentence about the groups whose outputs are far from the float ones, if there are any."""
    found = [(one.error, one.group) for one in report if one.error and one.error > TOO_MUCH]
    if not found:
        return []
    found.sort(reverse=True)
    worst = ", ".join(f"{group} ({100 * error:.0f} %)" for error, group in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = f"{len(found)} of {len(report)} groups of linears"
    return [
        f"the outputs of {count} are off by more than {100 * TOO_MUCH:.0f} % on calibration "
        f"data: {worst}{more}; expect a bad result: take another algorithm (--algorithm best), "
        "let a budget say which groups stay float (--max-ppl-increase 1%), or leave these so "
        "(--exclude); ms-quant analyze says what each costs"
    ]
