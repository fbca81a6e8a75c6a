"""30,000 groups, those of a model of 671 billion parameters, are planned, described and checked in
seconds. No weight exists."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_family

from ms_quant.formats.checks import format_of, not_served_by, served_by
from ms_quant.formats.registry import FORMATS
from ms_quant.formats.structure import _plan_of
from ms_quant.models import families
from ms_quant.models.config import parse_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan

EXPERTS, LAYERS, SECONDS = 256, 60, 10
SCHEME = "W8A8_DYNAMIC"  # which every format holds for experts


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


@pytest.fixture
def own_heap() -> Iterator[None]:
    """Python's garbage collector does not visit what thousands of tests before have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("own_heap")
@pytest.mark.parametrize("format", FORMATS)
def test_30_000_groups_are_planned_described_and_checked(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)
    sizes = {"n_routed_experts": EXPERTS, "num_hidden_layers": LAYERS}
    started = time.process_time()
    config = parse_config({**toy_family.CONFIG, **sizes})
    plan = make_plan(
        config, SCHEME, "smoothquant", dtype=DTYPES["bfloat16"], format=format, exclude=["*.9.*"]
    )
    assert len(plan.layers) >= 30_000
    row = format_of(plan)
    description = row.description(plan)
    assert plan.record()["scheme"] == SCHEME
    assert served_by(plan) or not_served_by(plan)
    kinds, problems = row.kinds(config, description, Path("description"))
    assert not problems and len(kinds) > 45_000
    read = _plan_of(row, config, kinds, description, Headers(plan))
    spent = time.process_time() - started
    assert {k for k, v in read.layers.items() if v} == {k for k, v in plan.layers.items() if v}
    assert spent < SECONDS, f"{spent:.1f} CPU seconds"
    print(f"{format}: {spent:.1f} CPU seconds")
