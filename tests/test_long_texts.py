"""Texts longer than those that a model was made for: computed, and said by every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ms_quant.cli.main import app
from ms_quant.models.config import load_config
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.request import prepare

SAID = "the model was made for 8 positions (max_position_embeddings)"


def notes(*arguments: object) -> list[str]:
    found = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    assert found.exit_code == 0, found.stderr
    return [line for line in found.stderr.splitlines() if line.startswith("note: ")]


def test_every_command_says_so(tiny_model: Callable[..., Path], calib_text: Path) -> None:
    model, other = tiny_model(max_position_embeddings=8), tiny_model("b", max_position_embeddings=8)
    asked = [model, "--text", calib_text, "--windows", 2, "--seq-len"]
    assert notes("eval", *asked, 8) == []
    assert notes("eval", *asked, 9) == [f"note: {model}: {SAID}, the text has 9"]
    assert notes("eval", *asked, 9, "--against", other) == [
        f"note: {place}: {SAID}, the text has 9" for place in (model, other)
    ]
    generated = notes("generate", model, "--prompt", "the words of a long text", "--max-tokens", 9)
    assert any(SAID in line for line in generated)
    assert notes("generate", model, "--prompt", "a", "--max-tokens", 1) == []
    for length, said in ((8, []), (9, [f"{model}: {SAID}, the windows of {calib_text} have 9"])):
        options = QuantizeOptions(model, model.with_name("out"), calib=calib_text, seq_len=length)
        assert [line for line in prepare(options).notes if SAID in line] == said


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            64,
        ),
    ],
)
def test_what_a_rotary_embedding_extends(
    tiny_model: Callable[..., Path], rope: dict[str, Any] | None, longest: int
) -> None:
    config = load_config(tiny_model(**({"rope_scaling": rope} if rope else {})))
    assert (config.max_position, config.longest) == (64, longest)
    assert config.beyond(longest) is None
    assert config.beyond(longest + 1) is not None
