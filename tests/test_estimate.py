"""What --dry-run says a job takes: of experts, one after the other, the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed_models import QWEN, save_routed

from ms_quant.pipeline.estimate import FACTOR_COPIES, IMPORT_BYTES, estimate
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.request import prepare

WIDE = {**QWEN, "hidden_size": 1024, "moe_intermediate_size": 32, "num_hidden_layers": 1}
Memory = Callable[[int, str], int]
SCHEME = "attention=W8A8,experts=W4A8_DYNAMIC,W8A8_DYNAMIC"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    """From the number of experts and the algorithm to bytes."""
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, tokens=np.random.default_rng(0).integers(0, 256, (8, 16)))

    def found(experts: int, algorithm: str) -> int:
        model = tmp_path / str(experts)
        if not model.exists():
            save_routed(model, {**WIDE, "num_experts": experts})
        data: dict[str, Any] = {"calib": tokens, "samples": 8, "seq_len": 16}
        out = tmp_path / "out"
        options = QuantizeOptions(model, out, SCHEME, algorithm, formats=("ascend",), **data)
        return int(estimate(prepare(options), out)["memory_bytes"])

    return found


def test_gptq_of_experts_takes_the_memory_of_one(memory: Memory) -> None:
    weights, products = 8 * 3 * 1024 * 32, 4 * (1024**2 + 32**2) + FACTOR_COPIES * 8 * 1024**2
    for experts in (8, 24):
        before = memory(experts, "minmax")
        one = IMPORT_BYTES + weights + products
        assert memory(experts, "experts=gptq,minmax") == max(before, one)


def test_gptq_of_attention_takes_that_of_its_groups(memory: Memory) -> None:
    inputs = 1024, WIDE["num_attention_heads"] * WIDE["head_dim"]
    products = 4 * sum(k**2 for k in inputs) + FACTOR_COPIES * 8 * max(inputs) ** 2
    assert memory(8, "attention=gptq,minmax") == memory(8, "minmax") + products
