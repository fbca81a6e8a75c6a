"""Activations of W8A8SC checkpoints, whose runtimes compute in float16 alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.statistics.activation_range import LARGEST
from sparse_compress.rate import levels, share, steps
from sparse_compress.verify.checkpoint import verify

BLOCK = "model.layers.0."


def matmul(tensors: dict[str, np.ndarray], name: str, index: Any, factor: float) -> None:
    name = f"{BLOCK}mlp.{name}_proj.weight"
    wide = tensors[name].astype(np.float32)
    wide[index] *= factor
    tensors[name] = wide.astype(tensors[name].dtype)


def large_gate_up(tensors: dict[str, np.ndarray]) -> None:
    matmul(tensors, "gate", 5, 2**9)
    matmul(tensors, "up", 5, 2**9)
    matmul(tensors, "down", np.s_[:, 5], 2**-18)


def large_residual(tensors: dict[str, np.ndarray]) -> None:
    matmul(tensors, "down", 7, 2**17)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "msmodelslim", "tp": 1},
        {"target_ratio": 0.6, "exclude": ("*.o_proj", "*.q_proj"), "tp": 1},
    ],
)
def test_a_gated_product_is_brought_down(
    make: Callable[..., Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = share.PRICES[::3] + share.PRICES[-1:]
    for module in (share, steps):
        monkeypatch.setattr(module, "PRICES", few)
    monkeypatch.setattr(levels, "SAMPLES", 4096)
    sizes = {"intermediate_size": 640, "vocab_size": 320}
    made = make({**sizes, "change": large_gate_up}, **options)
    assert "divided by powers of two" in made.summary["float16_warnings"][-1]
    assert verify(made.output, made.source).problems == ()
    record = json.loads((made.output / "ms_quant.json").read_text())
    largest = record["activation_ranges"][0]["largest"]
    assert max(value for value, _ in largest.values()) <= LARGEST


def test_another_division_fails_verification(
    make: Callable[..., Any], damage: Callable[..., Any]
) -> None:
    made = make({"vocab_size": 320, "change": large_gate_up})
    damaged = damage(made)

    def forge(record: dict[str, Any]) -> None:
        record["activation_ranges"][0]["divided"]["mlp.up_proj"] = {"4": 3}

    damaged.edit_json("ms_quant.json", forge)
    damaged.reseal()
    problems = verify(damaged.directory, made.source).problems
    assert any("up_proj" in problem for problem in problems)


def test_a_residual_stream_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(MsQuantError, match=r"model\.layers\.0: mlp.down_proj output .* channel 7 "):
        make({"vocab_size": 320, "change": large_residual})


def test_the_largest_activation_is_stated(make: Callable[..., Any]) -> None:
    summary = make().summary
    assert summary["float16_range"].startswith("model.layers.0: ")
    assert "float16_warnings" not in summary
