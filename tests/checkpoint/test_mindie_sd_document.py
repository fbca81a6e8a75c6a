"""docs/mindie_sd_format.md says what the code holds, refuses and reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.mindie_sd.choice import check_linear, why_not_run
from ms_quant.formats.mindie_sd.held import held_dtype
from ms_quant.formats.mindie_sd.types import REFUSED, STATIC_PAIRS, TYPES
from ms_quant.numerics.storage import DTYPES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "mindie_sd_format.md").read_text()


def answer(type: str, shape: tuple[int, int], smooths: bool, bias: bool, fails: str) -> str:
    """What becomes of a linear: refused, by its tensors or as the runtime fails on it."""
    try:
        check_linear(type, shape, smooths, bias, "a")
    except MsQuantError as error:
        return "refused: ignored" if "ignores" in str(error) else "refused: dropped"
    if why_not_run(type, shape, bias):
        return "refused: fails"
    return fails


@pytest.mark.parametrize("type", TYPES)
def test_what_is_refused_of_each_type(type: str) -> None:
    with_bias = not TYPES[type].drops_bias
    cells = [
        answer(type, (4, 64), True, with_bias, "multiplies"),
        answer(type, (4, 64), False, False, "runs"),
        answer(type, (4, 64), False, True, "runs"),
        answer(type, (4, 96), False, with_bias, "runs"),
    ]
    assert f"| {type} | {' | '.join(cells)} |" in DOCUMENT


def test_the_types_that_the_loader_holds() -> None:
    heading = "| tensor | of | in bfloat16 | in float16 |\n|---|---|---|---|\n"
    table = DOCUMENT.partition(heading)[2].partition("\n\n")[0].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    told: dict[str, list[str]] = {}
    for suffix, types, *dtypes in found:
        name = suffix.strip("`")
        listed = types.split(", ")
        if name == "mul_scale":
            listed = [type for type, row in TYPES.items() if row.smooths]
        told.setdefault(name, []).extend(listed)
        for type in listed:
            held = [held_dtype(type, name, DTYPES[run]).name for run in ("bfloat16", "float16")]
            assert held == dtypes, (name, type)
    assert sorted(told["bias"]) == sorted(n for n, row in TYPES.items() if not row.drops_bias)
    static = [name for name, row in TYPES.items() if not row.make().activation.dynamic]
    assert sorted(told["input_scale"]) == sorted(static)
    rest = [n for n in TYPES if "MXFP" not in n and (n not in static or n == "W8A8_TIMESTEP")]
    assert sorted(told["weight_scale"]) == sorted(rest)


def test_the_names_that_are_refused_and_read() -> None:
    refused = "\n".join(line for line in DOCUMENT.splitlines() if "| refused" in line)
    assert [name for name in REFUSED if name not in refused] == []
    assert [name for name in STATIC_PAIRS if name not in DOCUMENT] == []
