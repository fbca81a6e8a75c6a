"""30,000 groups, those of a model of 671 billion parameters, are planned, described and checked in
seconds. No weight exists."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ms_quant.formats.checks import format_of, not_served_by, served_by
from ms_quant.formats.registry import FORMATS
from ms_quant.formats.structure import _plan_of
from ms_quant.models.block_spec import BlockSpec
from ms_quant.models.config import ModelConfig, parse_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan

RAW = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 59,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "torch_dtype": "bfloat16",
}
EXPERTS, SECONDS = 254, 10
SCHEMES = {"golden-stick": "W8A8"}


def with_experts(block: BlockSpec) -> BlockSpec:
    """A block that has its MLP many times."""
    groups, linears, tensors = [], dict(block.linears), dict(block.tensors)
    mlp = [group for group in block.groups if group.members[0].startswith("mlp.")]
    for expert in range(EXPERTS):
        for group in mlp:
            paths = {m: m.replace("mlp.", f"mlp.experts.{expert}.") for m in group.members}
            groups.append(
                replace(group, name=f"{group.name}.{expert}", members=tuple(paths.values()))
            )
            for member, path in paths.items():
                linears[path] = block.linears[member]
                tensors[f"{path}.weight"] = block.tensors[f"{member}.weight"]
    return replace(block, linears=linears, tensors=tensors, groups=(*block.groups, *groups))


def large() -> ModelConfig:
    config = parse_config(RAW)
    for index in range(config.num_layers):
        config._blocks[index] = with_experts(config.block(index))
    return config


class Headers:
    """A checkpoint of a plan, as far as headers tell."""

    directory = Path("no such directory")

    def __init__(self, plan: Plan):
        self.tensors = {tensor.name: tensor for tensor in format_of(plan).tensor_plans(plan)}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> Any:
        return self.tensors[name]


@pytest.mark.parametrize("format", FORMATS)
def test_30_000_groups_are_planned_described_and_checked(format: str) -> None:
    config, scheme = large(), SCHEMES.get(format, "W8A8_DYNAMIC")
    started = time.process_time()
    plan = make_plan(
        config, scheme, "minmax", dtype=DTYPES["bfloat16"], format=format, exclude=["*.9.*"]
    )
    assert len(plan.layers) >= 30_000
    row = format_of(plan)
    description = row.description(plan)
    assert plan.record()["scheme"] == scheme
    assert not served_by(plan) or not not_served_by(plan)
    kinds, problems = row.kinds(config, description, Path("description"))
    assert not problems and len(kinds) > 45_000
    read = _plan_of(row, config, kinds, description, Headers(plan))
    spent = time.process_time() - started
    assert {k for k, v in read.layers.items() if v} == {k for k, v in plan.layers.items() if v}
    assert spent < SECONDS, f"{spent:.1f} CPU seconds"
    print(f"{format}: {spent:.1f} CPU seconds")
