"""Algorithms on models with experts and latent attention, through the whole pipeline: what is read,
what is written, and what can be proved of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import routed_models
from routed_models import save_routed
from sealed import seal_again

from ms_quant.files.reader import Checkpoint
from ms_quant.models.names import expert_of
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.recipe import load_recipe
from ms_quant.verify.checkpoint import verify_checkpoint

DEEPSEEK = {**routed_models.DEEPSEEK, "n_routed_experts": 8, "num_hidden_layers": 2}
QWEN = {**routed_models.QWEN, "num_hidden_layers": 3}
RECIPE = """
apiversion: ms_quant_v1
steps: [{steps}]
rules:
  - scheme: {attention}
    include: ["*.self_attn.*"]
    exclude: ["*.layers.2.*"]
  - scheme: {experts}
    include: ["*.mlp.*"]
    exclude: ["*.layers.2.*"]
formats: [{format}]
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Quantizes on random tokens by a recipe; where the model and the output are."""

    def run(raw: dict[str, Any], steps: str, attention: str, experts: str, format: str) -> Any:
        model, tokens = save_routed(tmp_path / "model", raw), tmp_path / "tokens.npz"
        np.savez(tokens, tokens=np.random.default_rng(5).integers(0, 256, (8, 16)))
        named = ", ".join(f"{{algorithm: {step}}}" for step in steps.split("+"))
        text = RECIPE.format(steps=named, attention=attention, experts=experts, format=format)
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = load_recipe(tmp_path / "recipe.yaml")
        data = {"calib": tokens, "samples": 8, "seq_len": 16}
        run_job(QuantizeOptions(model, tmp_path / "out", recipe=recipe, **data))
        return model, tmp_path / "out"

    return run


CASES = [
    (DEEPSEEK, "osl", "W8A8", "W8A8_DYNAMIC", "golden-stick"),
    (DEEPSEEK, "smoothquant", "W8A8", "W8A8_DYNAMIC", "ascend"),
    (DEEPSEEK, "quarot+smoothquant", "W8A8", "W8A8_DYNAMIC", "ascend"),
    (DEEPSEEK, "awq", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "ascend"),
    ({**DEEPSEEK, "q_lora_rank": None}, "flexsmooth", "W8A8", "W8A8_DYNAMIC", "ascend"),
    (QWEN, "smoothquant", "W8A8", "W8A8_DYNAMIC", "ascend"),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0]["model_type"], *case[1:]])
)
def test_what_was_written_is_proved(make: Callable, case: tuple) -> None:
    model, output = make(*case)
    found = verify_checkpoint(output, model)
    assert found.problems == ()
    compared = {one.layer: one.made_again for one in found.layers}
    for block in range(2):
        for name in ("q_a", "q_b", "kv_a", "o", "q", "k", "v"):
            path = f"model.layers.{block}.self_attn.{name}_proj"
            path += "_with_mqa" if name == "kv_a" else ""
            divided = name == "v" and "kv_lora_rank" not in case[0]  # by what o_proj reads
            if path in compared:
                assert compared[path] or divided, path
    if "kv_lora_rank" in case[0]:
        assert compared["model.layers.1.self_attn.o_proj"]
    assert compared["model.layers.1.mlp.experts.3.gate_proj"]


def change_row(tensors: dict[str, np.ndarray], row: int, column: slice) -> None:
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors[name] = tensors[name].copy()
    part = tensors[name][row, column]
    tensors[name][row, column] = (part.astype(np.float32) * 1.5).astype(part.dtype)


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        (20, slice(3, 4), "self_attn.kv_b_proj.weight: "),  # one value of a row of values
        (3, slice(None), "self_attn.kv_b_proj.weight: "),  # a row of keys, which nothing divides
        (20, slice(None), "self_attn.o_proj.weight"),  # a whole row: o_proj's column was not
    ],
)
def test_a_changed_float_linear_is_found(
    row: int,
    column: slice,
    message: str,
    make: Callable,
    load_tensors: Callable,
    save_tensors: Callable,
) -> None:
    model, output = make(*CASES[1])
    shard = next(output.glob("*.safetensors"))
    tensors = load_tensors(output)
    change_row(tensors, row, column)
    save_tensors(shard, tensors)
    seal_again(output)
    problems = verify_checkpoint(output, model).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("algorithm", "times"), [("osl", {1}), ("awq", {1}), ("smoothquant", {1, 2})]
)
def test_a_search_reads_each_expert_once(
    algorithm: str, times: set[int], make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector for all experts needs the largest magnitudes of all their weights first."""
    counts: Counter[str] = Counter()
    read = Checkpoint.read_float32

    def counted(self: Checkpoint, name: str) -> np.ndarray:
        counts[name] += 1
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read_float32", counted)
    make(DEEPSEEK, algorithm, "W8A8", "W8A8_DYNAMIC", "ascend")
    prefix = "model.layers.1."
    experts = {
        name: count
        for name, count in counts.items()
        if name.startswith(prefix) and expert_of(name.removeprefix(prefix)) is not None
    }
    assert len(experts) == 8 * 3 and set(experts.values()) == times
    assert all(count == 1 for name, count in experts.items() if "down_proj" in name)
