"""docs/others.md says what is read and what is refused, as the code does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.ascend.leeway import describe_difference
from ms_quant.formats.compressed_tensors.config import read_schemes
from ms_quant.formats.compressed_tensors.entry import (
    MAX_PATTERN,
    MAX_REPEATS,
    NEUTRAL,
    STATED,
)
from ms_quant.verify.result import VERDICTS

TEXT = (Path(__file__).parents[1] / "docs" / "others.md").read_text()
GOLDEN = Path(__file__).parent / "golden" / "others"


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    lines = TEXT[TEXT.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_verdicts() -> None:
    assert tuple(row[0] for row in rows("verdict")) == VERDICTS
    assert [row[1] for row in rows("verdict")] == ["0", "0", "1"]


def test_presets_are_read_as_it_says() -> None:
    said = {name: row[1] for row in rows("preset") for name in row[0].split(", ")}
    for path in GOLDEN.glob("llm_compressor_*"):
        preset = path.name.removeprefix("llm_compressor_").upper()
        entry = json.loads((path / "config.json").read_text())["quantization_config"]
        scheme = read_schemes(entry, ["model.layers.0.self_attn.q_proj"]).popitem()[1]
        assert scheme is not None
        assert said[preset].split(",")[0] == scheme.name


def test_neutral_keys_are_all_named() -> None:
    first = rows("key of `quantization_config`")[0][0].replace("`", "").split(", ")
    assert set(first) == NEUTRAL | STATED
    assert f"over {MAX_PATTERN} characters or {MAX_REPEATS} repetitions" in TEXT


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [row for row in rows("key of quant_model_description.json") if row[0] != "`kv_cache_type`"],
)
def test_keys_of_descriptions(key: str, value: str, what: str) -> None:
    found = {key.strip("`"): "1" if value == "any" else json.loads(value)}
    if what.startswith("refused"):
        with pytest.raises(MsQuantError, match=key.strip("`")):
            describe_difference(found, {}, Path("d"))
        return
    defects, notes = describe_difference(found, {}, Path("d"))
    assert not defects and bool(notes) == ("noted" in what)
