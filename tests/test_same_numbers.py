"""Which plans of several formats share numbers: none that gives some group another layer plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ms_quant.models.config import parse_config
from ms_quant.models.names import GroupId
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.run import QuantizeOptions, prepare, run_job
from ms_quant.plan.layer import LayerPlan, layer_plan
from ms_quant.plan.plan import Plan

BF16 = DTYPES["bfloat16"]
FORMATS = ("ascend", "compressed-tensors")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "A": ("W8A8_DYNAMIC", {}),
    "B": ("W8A16", {}),
    "C": ("W8A16", {"symmetric": False}),
}
GROUPS = ("qkv", "o", "gate_up", "down")
CONFIG = parse_config(
    {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
    }
)


def layers_of(kinds: Sequence[str], format: str) -> Mapping[GroupId, LayerPlan | None]:
    """The layer plans of the groups of block 0, by letter; ``"-"`` stays float."""
    made: dict[str, LayerPlan | None] = {
        kind: layer_plan(name, "minmax", BF16, options=options, format=format)
        for kind, (name, options) in KINDS.items()
    }
    return {GroupId(0, group): made.get(kind) for group, kind in zip(GROUPS, kinds, strict=True)}


@pytest.mark.parametrize("format", FORMATS)
def test_plans_have_the_same_numbers_only_if_every_group_has(format: str) -> None:
    """Every plan of three kinds of layers, one of each kind of format, and floats, with each."""
    every = list(product("ABC-", repeat=len(GROUPS)))
    ones = [Plan(CONFIG, FORMATS[0], layers_of(kinds, FORMATS[0]), BF16) for kinds in every]
    others = [Plan(CONFIG, format, layers_of(kinds, format), BF16) for kinds in every]
    for i, one in enumerate(ones):
        same = [j for j, other in enumerate(others) if one.same_numbers(other)]
        assert same == [i], every[i]


def test_what_else_decides_numbers() -> None:
    plan = Plan(CONFIG, "ascend", layers_of("ABCA", "ascend"), BF16)
    assert plan.same_numbers(replace(plan, layers=layers_of("ABCA", "ascend")))
    assert not plan.same_numbers(replace(plan, kv_cache="C8"))
    clipped = layer_plan("W8A8_DYNAMIC", "ssz", BF16, format="ascend")
    half = layer_plan("W8A8_DYNAMIC", "minmax", DTYPES["float16"], format="ascend")
    wide = layer_plan("W8A8_DYNAMIC", "minmax", BF16, format="ascend")
    wide = replace(wide, storage=wide.storage.widened())
    for layer in (clipped, half, wide):
        other = replace(plan, layers={**plan.layers, GroupId(0, "qkv"): layer})
        assert not plan.same_numbers(other) and not other.same_numbers(plan)


def test_each_format_gets_its_own_bytes(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    load_tensors: Callable[[Path], dict[str, Any]],
) -> None:
    """Of plans whose kinds of layers are the same three, in the same order of first use."""
    model = tiny_model(layers=1, hidden_size=64, intermediate_size=128, head_dim=16)
    kinds = {"ascend": "ABCB", "compressed-tensors": "ABCC"}

    def made(name: str, formats: tuple[str, ...]) -> Path:
        options = QuantizeOptions(model, tmp_path / name, "W8A16", formats=formats)
        checked = prepare(options)
        first, *others = (
            replace(one, plan=replace(one.plan, layers=layers_of(kinds[format], format)))
            for format, one in zip(formats, checked.all, strict=True)
        )
        run_job(options, checked=replace(first, others=tuple(others)))
        return options.output

    both = made("both", FORMATS)
    for format in FORMATS:
        alone, together = load_tensors(made(format, (format,))), load_tensors(both / format)
        assert alone.keys() == together.keys()
        for name, array in alone.items():
            assert array.tobytes() == together[name].tobytes(), name
