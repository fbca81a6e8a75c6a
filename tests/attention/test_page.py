"""The programs on the page run and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"


def test_the_programs_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(first, {})
    assert "dense" in capsys.readouterr().out  # noise is of no kind
    exec(second, {})
    error, masks = capsys.readouterr().out.splitlines()
    assert float(error.removeprefix("FP8 ")) < 0.07  # e4m3 rounds by 1/16 at most
    densities = [float(x) for x in re.findall(r"0\.\d+", masks)]
    assert len(densities) == 4
    assert max(densities) < 0.6
