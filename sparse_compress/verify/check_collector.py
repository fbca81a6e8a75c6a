"""Checks that go on after a defect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ms_quant.errors import MsQuantError


def collect_problems(check: Callable[..., Iterable[str]], *arguments: Any) -> list[str]:
    """The problems that a check finds, the last of which may be that it could not go on."""
    problems: list[str] = []
    try:
        for problem in check(*arguments):
            problems.append(problem)
    except MsQuantError as error:
        problems.append(str(error))
    return problems
