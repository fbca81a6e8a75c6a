"""A double of what vllm-mindspore builds: golden-stick's configuration and the parameters it makes.

The names, types and shapes are those of its linear methods for W8A8 and W8A8SC, as torch
parameters. They are written down here once more, from the format's pages and not from our layouts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FUSED = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


class GoldenStickDouble:
    """Looks a layer up as the runtime does: the first key that contains its path."""

    is_modelslim = False

    def __init__(self, config: dict[str, Any]):
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GoldenStickDouble:
        return cls(config)

    def get_name(self) -> str:
        return "golden_stick"

    def kind(self, path: str) -> str:
        for key, value in self.config.items():
            if path in key.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj"):
                return value
        return "FLOAT"


def _add(root: torch.nn.Module, name: str, dtype: str, shape: list[int]) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    values = torch.full(shape, 7, dtype=getattr(torch, dtype))
    module.register_parameter(last, torch.nn.Parameter(values, requires_grad=False))


def build(
    directory: Path, quant: GoldenStickDouble, rank: int, tp: int, is_310p: bool
) -> torch.nn.Module:
    """A model's parameters on one rank, all 7."""
    config = json.loads((directory / "config.json").read_text())
    coded = quant.config.get(f"rank_{rank}")
    if coded is not None and not is_310p:
        raise RuntimeError("W8A8SC is only supported on 310P")
    hidden, inter = config["hidden_size"], config["intermediate_size"] // tp
    dim = config["head_dim"]
    q, kv = (config[f"num_{kind}_heads"] // tp * dim for kind in ("attention", "key_value"))
    shapes = {
        "self_attn.qkv_proj": [q + 2 * kv, hidden],
        "self_attn.o_proj": [hidden, q],
        "mlp.gate_up_proj": [2 * inter, hidden],
        "mlp.down_proj": [hidden, inter],
    }
    root = torch.nn.Module()
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        _add(root, table, "float16", [config["vocab_size"] // tp, hidden])
    _add(root, "model.norm.weight", "float16", [hidden])
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _add(root, f"{layer}.{norm}.weight", "float16", [hidden])
        for norm in ("q_norm", "k_norm"):
            _add(root, f"{layer}.self_attn.{norm}.weight", "float16", [dim])
        for fused, (n, k) in shapes.items():
            path = f"{layer}.{fused}"
            _add_linear(root, path, n, k, coded, quant.kind(path))
    return root


def _add_linear(
    root: torch.nn.Module, path: str, n: int, k: int, coded: dict[str, Any] | None, kind: str
) -> None:
    if coded is None and kind == "FLOAT":
        _add(root, f"{path}.weight", "float16", [n, k])
        return
    weight = [n, k]
    if coded is not None:
        weight = coded[f"{path}.weight.shape"]
        _add(root, f"{path}.index", "int8", coded[f"{path}.index.shape"])
    _add(root, f"{path}.weight", "int8", weight)
    _add(root, f"{path}.deq_scale", "float32" if coded is None else "int64", [n])
    _add(root, f"{path}.quant_bias", "int32", [n])
    _add(root, f"{path}.input_scale", "float16", [k])
    _add(root, f"{path}.input_offset", "int8", [k])
