"""Makes tests/golden/others: whole tiny checkpoints that LLM Compressor and msModelSlim write.

Needs the tools themselves, each in an environment of its own, as their requirements differ:

    python tools/make_golden_others.py llm-compressor   # torch, transformers, llmcompressor
    python tools/make_golden_others.py msmodelslim [CASE ...]  # with transformers 4.51

Beside each checkpoint, expected.json has what the tool's own library makes of it: for LLM
Compressor a sha256 of every weight that compressed-tensors decompresses, in the model's type.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "others"
KEPT = ("*.safetensors", "*.json", "recipe.yaml", "*_best_practice.yaml")
SHAPE = {"num_hidden_layers": 1, "vocab_size": 16, "num_attention_heads": 2, "head_dim": 16}
SHAPE |= {"num_key_value_heads": 1, "hidden_size": 32, "intermediate_size": 32}
SHAPE |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
BLOCKS = {"hidden_size": 128, "head_dim": 8, "intermediate_size": 16}
WORDS = list("abcdefghijklmnop")
PRESETS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A16": {},
    "W4A16": {},
    "W4A16_ASYM": {},
    "FP8_DYNAMIC": {},
    "FP8_BLOCK": BLOCKS,
}
GROUPS = {"W4A16": 32, "W4A16_ASYM": 32, "W8A16": 32}
INT8 = '{{scope: "{}", dtype: "int8", symmetric: {}, method: "minmax"}}'
CHANNEL, TOKEN = INT8.format("per_channel", True), INT8.format("per_token", True)
FLOAT8 = '{{scope: "{}", dtype: "fp8_e4m3", symmetric: True, method: "minmax"}}'
TYPES = {
    "W8A8": (INT8.format("per_tensor", False), CHANNEL),
    "W8A8_DYNAMIC": (TOKEN, CHANNEL),
    "W8A8_MIX": (INT8.format("pd_mix", False), CHANNEL),
    "W4A8_DYNAMIC": (TOKEN, CHANNEL.replace("int8", "int4")),
    "WFP8AFP8_DYNAMIC": (FLOAT8.format("per_token"), FLOAT8.format("per_channel")),
}
CASES = [
    ("w8a8_qwen2_bf16", "W8A8", "qwen2", torch.bfloat16, ""),
    ("w8a8_qwen2_f16", "W8A8", "qwen2", torch.float16, ""),
    ("w8a8_mix_qwen2_bf16", "W8A8_MIX", "qwen2", torch.bfloat16, ""),
    ("w8a8_quarot_qwen3_bf16", "W8A8", "qwen3", torch.bfloat16, '    - {type: "quarot"}\n'),
    ("w8a8_dynamic_qwen3_f32", "W8A8_DYNAMIC", "qwen3", torch.float32, ""),
    ("w4a8_dynamic_qwen3_bf16", "W4A8_DYNAMIC", "qwen3", torch.bfloat16, ""),
    ("wfp8_qwen3_bf16", "WFP8AFP8_DYNAMIC", "qwen3", torch.bfloat16, ""),
]


def make_float(path: Path, kind: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    """A random model with biases that matter and norms that are not 1."""
    from transformers import Qwen2Config, Qwen3Config

    torch.manual_seed(0)
    shape = {key: value for key, value in shape.items() if kind == "qwen3" or key != "head_dim"}
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](**shape, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(1 + 0.3 * torch.rand_like(parameter))
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(path)
    make_tokenizer(path)


def make_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a", "pad_token": "a"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def keep(source: Path, name: str, expected: dict[str, Any]) -> None:
    """Copies what a reader needs to the golden files."""
    target = TARGET / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in KEPT:
        for path in source.glob(pattern):
            if not path.name.startswith(("tokenizer", "generation_config", "special_tokens")):
                shutil.copyfile(path, target / path.name)
    for path in target.glob("*_best_practice.yaml"):
        path.write_text(re.sub(r"dataset: .*/", "dataset: ", path.read_text()))
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def decompressed(path: Path) -> dict[str, str]:
    """What the compressed-tensors library makes of the weights: a sha256 of each."""
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype="auto")
    return {
        name: hashlib.sha256(module.weight.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def llm_compressor(work: Path) -> None:
    import compressed_tensors
    import llmcompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    for preset, more in PRESETS.items():
        source, made = work / f"{preset}-float", work / preset
        make_float(source, "qwen3", torch.bfloat16, SHAPE | more)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if preset in GROUPS:
            scheme.weights.group_size = GROUPS[preset]
        ignore = ["lm_head", *(["re:.*(o|down)_proj"] if more else [])]
        modifier = QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignore)
        oneshot(model=model, recipe=modifier, output_dir=str(made))
        versions = {
            "llmcompressor": llmcompressor.__version__,
            "compressed-tensors": compressed_tensors.__version__,
        }
        expected = {"versions": versions, "weights": decompressed(made)}
        keep(made, f"llm_compressor_{preset.lower()}", expected)


def msmodelslim(work: Path) -> None:
    from importlib.metadata import version

    calib = work / "calib.json"
    calib.write_text(json.dumps([" ".join(WORDS[i:] + WORDS[:i]) for i in range(0, 16, 4)]))
    for name, kind, family, dtype, first in CASES:
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        source, made, recipe = work / f"{name}-float", work / name, work / f"{name}.yaml"
        make_float(source, family, dtype, SHAPE)
        act, weight = TYPES[kind]
        recipe.write_text(
            f"apiversion: modelslim_v1\nspec:\n  process:\n{first}"
            f'    - type: "linear_quant"\n      qconfig:\n        act: {act}\n'
            f'        weight: {weight}\n      include: ["*"]\n'
            f'  save:\n    - type: "ascendv1_saver"\n      part_file_size: 0\n  dataset: {calib}\n'
        )
        model_type = {"qwen2": "Qwen2.5-7B-Instruct", "qwen3": "Qwen3-8B"}[family]
        command = [
            str(Path(sys.executable).with_name("msmodelslim")),
            "quant",
            *("--model_type", model_type, "--model_path", str(source), "--save_path", str(made)),
            *("--device", "cpu", "--config_path", str(recipe), "--trust_remote_code", "False"),
        ]
        subprocess.run(command, check=True)
        keep(made, f"msmodelslim_{name}", {"versions": {"msmodelslim": version("msmodelslim")}})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        {"llm-compressor": llm_compressor, "msmodelslim": msmodelslim}[sys.argv[1]](Path(directory))
