"""Commands with which other tools quantize a Qwen3-MoE to W8A8_DYNAMIC on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

INT8 = {"dtype": "int8", "symmetric": True, "method": "minmax"}
IGNORED = ["lm_head", "re:.*mlp.gate$"]
FREE = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from llmcompressor import model_free_ptq
model_free_ptq(
    model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W8A8", ignore={ignored},
    max_workers=1, device="cpu",
)
"""
ONE_SHOT = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
oneshot(
    model=model,
    recipe=QuantizationModifier(targets="Linear", scheme="W8A8", ignore={ignored}),
)
model.save_pretrained(sys.argv[2], save_compressed=True)
"""


def model_slim(python: Path, model: Path, output: Path, work: Path) -> list[str]:
    """msModelSlim's command, by a recipe as those of its lab_practice."""
    qconfig = {"act": {"scope": "per_token", **INT8}, "weight": {"scope": "per_channel", **INT8}}
    linears = {"type": "linear_quant", "qconfig": qconfig, "include": ["*"]}
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False}
    whole: dict[str, Any] = {
        "apiversion": "modelslim_v1",
        "metadata": {
            "config_id": "a",
            "score": 90,
            "verified_model_types": ["Qwen3-30B"],
            "label": label,
        },
        "spec": {
            "process": [{**linears, "exclude": ["*mlp.gate"]}],
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
        },
    }
    recipe = work / "msmodelslim.yaml"
    recipe.write_text(yaml.safe_dump(whole))
    command = [str(python.parent / "msmodelslim"), "quant", "--model_type", "Qwen3-30B"]
    command += ["--model_path", str(model), "--save_path", str(output), "--device", "cpu"]
    return [*command, "--config_path", str(recipe), "--trust_remote_code", "True"]


def in_one_shot(python: Path, model: Path, output: Path, threads: int) -> list[str]:
    """llm-compressor with the model loaded by transformers."""
    code = ONE_SHOT.format(ignored=IGNORED)
    return [str(python), "-c", code, str(model), str(output), str(threads)]


def free_of_model(python: Path, model: Path, output: Path, threads: int) -> list[str]:
    """llm-compressor on the files alone."""
    code = FREE.format(ignored=IGNORED)
    return [str(python), "-c", code, str(model), str(output), str(threads)]
