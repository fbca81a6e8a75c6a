"""The programs on the page run and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"


def test_the_programs_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(first, {})
    assert "dense" in capsys.readouterr().out  # noise is of no kind
    names: dict[str, object] = {}
    exec(second, names)
    error, masks = capsys.readouterr().out.splitlines()
    assert float(error.removeprefix("FP8 ")) < 0.07  # e4m3 rounds by 1/16 at most
    densities = [float(x) for x in re.findall(r"0\.\d+", masks)]
    assert len(densities) == 4
    assert max(densities) < 0.6
    exec(third, names)
    assert capsys.readouterr().out == "(17, 4, 17) 17\n"  # a row of text keeps all
