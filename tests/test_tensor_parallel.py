"""Ranks that groups do not divide over: said when a model is quantized, as serve-check does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms_quant.cli.console import run
from ms_quant.cli.main import app
from ms_quant.errors import MsQuantError
from ms_quant.formats.tensor_parallel import rank_counts, rank_notes, refuse_ranks
from ms_quant.models.config import parse_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.estimate import estimate
from ms_quant.pipeline.planning import make_plan
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.plan.plan import Plan
from ms_quant.serve.check import serve_check

DOWN = "model.layers.0.mlp.down_proj"


def plan(scheme: str, heads: int, kv: int, inter: int, layers: int = 2, **options: Any) -> Plan:
    config = parse_config(
        {
            "model_type": "qwen3",
            "hidden_size": heads * 64,
            "intermediate_size": inter,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 64,
            "vocab_size": 151936,
            "torch_dtype": "bfloat16",
        }
    )
    exclude = options.pop("exclude", ())
    dtype = DTYPES["bfloat16"]
    return make_plan(config, scheme, "minmax", dtype=dtype, exclude=exclude, scheme_options=options)


@pytest.mark.parametrize(
    ("made", "counts"),
    [
        # 4864 is 38 groups of 128, 16 heads of 64 are 8 groups.
        (plan("W4A16", 16, 8, 4864, group_size=128), [1, 2]),
        (plan("W4A16", 16, 8, 4864, group_size=64), [1, 2, 4]),
        (plan("W4A16", 16, 8, 4864, group_size=32), [1, 2, 4, 8]),
        # what stays float may be divided as the model allows
        (plan("W4A16", 16, 8, 4864, group_size=128, exclude=("*.down_proj",)), [1, 2, 4, 8]),
        (plan("W8A8_DYNAMIC", 16, 8, 4864), [1, 2, 4, 8, 16]),
        (plan("W8A8_DYNAMIC", 12, 4, 3072), [1, 2, 4]),
        # 32 values share a scale
        (plan("W8A8_MXFP8", 16, 8, 4864), [1, 2, 4, 8]),
    ],
)
def test_the_numbers_of_ranks_that_work(made: Plan, counts: list[int]) -> None:
    assert rank_counts(made) == counts
    for tp in range(1, 65):
        if tp in counts:
            refuse_ranks(made, tp)
        else:
            with pytest.raises(MsQuantError, match=f"--tp {', '.join(map(str, counts))} would do"):
                refuse_ranks(made, tp)


def test_a_refusal_names_the_linear_and_the_ways_out() -> None:
    made = plan("W4A16", 16, 8, 4864, group_size=128)
    with pytest.raises(
        MsQuantError,
        match=(
            rf"^{DOWN}: 4864 inputs on 4 ranks, expected groups of 128 on each \(and 1 more "
            r"linears\); .*--group-size, or --exclude such linears"
        ),
    ):
        refuse_ranks(made, 4)
    with pytest.raises(MsQuantError, match="tp is 3, expected a divisor of num_attention_heads"):
        refuse_ranks(made, 3)


def test_a_note_where_groups_allow_less_than_the_model() -> None:
    (note,) = rank_notes(plan("W4A16", 16, 8, 4864, group_size=128))
    assert "4864 inputs on 4 ranks" in note and "of 1, 2 works with this plan" in note
    assert rank_notes(plan("W4A16", 16, 8, 4096, group_size=64)) == []
    assert rank_notes(plan("W8A8_DYNAMIC", 16, 8, 4864)) == []


def test_many_linears_are_looked_at_in_a_moment() -> None:
    made = plan("W4A16", 64, 8, 29568, layers=100, group_size=128, exclude=("*.7.mlp.*",))
    assert rank_counts(made) == [1]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(hidden_size=128, intermediate_size=192, head_dim=32)


def test_quantize_and_serve_check_say_the_same(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(hidden_size=128, intermediate_size=96, head_dim=32)
    options = QuantizeOptions(model, tmp_path / "out", "W8A8_MXFP8")
    problem = f"{DOWN}: 96 inputs on 2 ranks, expected groups of 32 on each"
    assert prepare(options).notes[0].startswith(f"{problem}; tensor parallelism of 1 works")
    assert estimate(prepare(options), options.output)["tensor_parallel"] == "1"
    with pytest.raises(MsQuantError, match=f"^{problem} .*--tp 1 would do"):
        prepare(dataclasses.replace(options, tp=2))
    run_job(options)
    assert serve_check(options.output, "vllm-ascend", 2)["problems"][0] == problem


def test_a_recipe_is_checked_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "apiversion: ms_quant_v1\nrules:\n  - scheme: W4A16\n    options: {group_size: 64}\n"
    )
    arguments = ["quantize", model, "-o", tmp_path / "out", "--recipe", recipe, "--tp", "2"]
    monkeypatch.setattr("sys.argv", ["ms-quant", *map(str, arguments), "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        run(app)
    assert f"{DOWN}: 192 inputs on 2 ranks" in " ".join(capsys.readouterr().err.split())


def test_one_file_for_all_ranks(model: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(model, tmp_path / "out", "W8A8_DYNAMIC", formats=("mindie-sd",), tp=2)
    with pytest.raises(MsQuantError, match="mindie-sd is one file for all ranks, expected --tp 1"):
        prepare(options)
