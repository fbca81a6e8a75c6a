"""A tiny DeepSeek with a tokenizer, quantized for a format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from routed_models import DEEPSEEK, save_routed

from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MODEL: dict[str, Any] = {
    **DEEPSEEK,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "n_routed_experts": 8,
    "max_position_embeddings": 640,
    "rope_scaling": YARN,
}
ATTENTION = ["model.layers.{0,1}.self_attn.*"]
EXPERTS = ["model.layers.1.mlp.experts.*"]
DENSE = ["model.layers.0.mlp.*", "model.layers.1.mlp.shared_experts.*"]
MTP = ["model.layers.2.*"]
OSL = [{"algorithm": "osl", "include": ATTENTION, "groups": ["qkv_a", "q_b"]}]


def source(directory: Path, **changed: Any) -> Path:
    """The float checkpoint."""
    save_routed(directory, {**MODEL, **changed})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "stdlib-qwen3-6m" / name, directory)
    return directory


def quantized(
    model: Path,
    output: Path,
    format: str,
    rules: list[dict[str, Any]],
    steps: list[dict[str, Any]] | None = None,
) -> Path:
    """The model by a recipe."""
    static = any(rule["scheme"] == "W8A8" for rule in rules)
    text = (ROOT / "models" / "text" / "calibration.txt").read_text()[:20_000]
    calibration = output.with_suffix(".txt")
    calibration.write_text(text)
    recipe = load_recipe(
        {
            "apiversion": "ms_quant_v1",
            **({"steps": steps} if steps else {}),
            "rules": rules,
            "formats": [format],
        }
    )
    seen: dict[str, Any] = {"calib": calibration, "samples": 16, "seq_len": 48} if static else {}
    run_job(QuantizeOptions(model, output, recipe=recipe, **seen))
    return output
