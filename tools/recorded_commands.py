"""The commands whose outputs ``record_outputs.py`` compares. A new one is a row.

``{out}`` is the command's own output. Other words in braces are a small model, a file of
``GIVEN`` or ``FILES``, or the output of an earlier row, which then runs first.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Formatter

from small_models import BUNDLED, MODELS

_CALIB = " --calib {text} --samples 4 --seq-len 32"


def _quantize(options: str, model: str = "qwen3") -> str:
    return f"ms-quant quantize {{{model}}} -o {{out}} {options}"


def _calibrated(options: str, model: str = "qwen3") -> str:
    return _quantize(options, model) + _CALIB


def _convert(source: str, format: str) -> str:
    return f"ms-quant convert {{{source}}} -o {{out}} --format {format}"


def _sparse(options: str, model: str = "wide") -> str:
    return f"sparse-compress run {{{model}}} -o {{out}} {options}{_CALIB}"


_SCHEMES = {
    "dynamic": _quantize("--scheme W8A8_DYNAMIC"),
    "dynamic-qwen2": _quantize("--scheme W8A8_DYNAMIC --format ascend", "qwen2"),
    "dynamic-llama": _quantize("--scheme W8A8_DYNAMIC --format golden-stick", "llama"),
    "dynamic-float16": _quantize("--scheme W8A8_DYNAMIC --format ascend --dtype float16"),
    "dynamic-bundled": _quantize("--scheme W8A8_DYNAMIC --format ascend", "bundled"),
    "dynamic-shards": _quantize("--scheme W8A8_DYNAMIC --shard-bytes 200000", "qwen2"),
    "dynamic-several": _quantize(
        "--scheme W8A8_DYNAMIC --format golden-stick --format ascend --format mindie-sd "
        "--format compressed-tensors --exclude *.1.mlp.down_proj",
        "llama",
    ),
    "dynamic-ranks": _quantize("--scheme W8A8_DYNAMIC --format golden-stick --tp 2"),
    "w8a16": _quantize("--scheme W8A16", "qwen2"),
    "w8a16-several": _quantize(
        "--scheme W8A16 --group-size 0 --format ascend --format compressed-tensors "
        "--format mindie-sd"
    ),
    "w8a16-asymmetric": _quantize("--scheme W8A16 --group-size 64 --asymmetric", "llama"),
    "w4a16": _quantize("--scheme W4A16"),
    "w4a16-channel": _quantize("--scheme W4A16 --group-size 0 --format mindie-sd"),
    "w4a16-asymmetric": _quantize("--scheme W4A16 --group-size 32 --asymmetric", "qwen2"),
    "w4a8": _quantize("--scheme W4A8_DYNAMIC"),
    "w4a8-groups": _quantize("--scheme W4A8_DYNAMIC --group-size 64"),
    "w4a4": _quantize("--scheme W4A4_DYNAMIC"),
    "w4a4-mindie": _quantize("--scheme W4A4_DYNAMIC --format mindie-sd"),
    "float8": _quantize("--scheme W8A8FP8_DYNAMIC"),
    "float8-compressed": _quantize("--scheme W8A8FP8_DYNAMIC --format compressed-tensors"),
    "float8-block": _quantize("--scheme W8A8FP8_BLOCK"),
    "mxfp8": _quantize("--scheme W8A8_MXFP8"),
    "mxfp8-mindie": _quantize("--scheme W8A8_MXFP8 --format mindie-sd", "llama"),
    "mxfp4-mxfp8": _quantize("--scheme W4A8_MXFP"),
    "mxfp4": _quantize("--scheme W4A4_MXFP4"),
    "mxfp4-rule": _quantize("--scheme W4A4_MXFP4 --set rule=mxfp4_msmodelslim_fouroversix"),
    "mxfp4-mindie": _quantize("--scheme W4A4_MXFP4 --format mindie-sd"),
    "mxfp4-dual": _quantize("--scheme W4A4_MXFP4_DUALSCALE", "bundled"),
    "mxfp4-svd": _quantize("--scheme W4A4_MXFP4_SVD --algorithm svd --set svd.rank=8"),
    "ssz": _quantize("--scheme W4A16 --algorithm ssz"),
    "quarot": _quantize("--scheme W8A8_DYNAMIC --algorithm quarot", "llama"),
}
_CALIBRATED = {
    "static": _calibrated("--scheme W8A8"),
    "static-several": _calibrated(
        "--scheme W8A8 --format golden-stick --format ascend --format mindie-sd "
        "--format compressed-tensors --algorithm smoothquant --alpha 0.6 --fold norm"
    ),
    "static-input-scale": _calibrated("--scheme W8A8 --algorithm smoothquant --fold input-scale"),
    "static-mul-scale": _calibrated(
        "--scheme W8A8 --algorithm smoothquant --fold mul-scale --format mindie-sd"
    ),
    "static-qwen2": _calibrated("--scheme W8A8 --algorithm smoothquant", "qwen2"),
    "static-llama": _calibrated("--scheme W8A8 --algorithm smoothquant", "llama"),
    "static-mistral": _calibrated("--scheme W8A8 --algorithm smoothquant", "mistral"),
    "static-smollm3": _calibrated("--scheme W8A8 --algorithm smoothquant", "smollm3"),
    "static-seed_oss": _calibrated("--scheme W8A8 --algorithm smoothquant", "seed_oss"),
    "static-internlm3": _calibrated("--scheme W8A8 --algorithm smoothquant", "internlm3"),
    "lowbits": _calibrated("--scheme W8A8S --algorithm low_bits", "wide"),
    "per-tensor": _calibrated("--scheme W8A8_PER_TENSOR", "llama"),
    "per-channel": _calibrated("--scheme W8A8_PER_CHANNEL", "qwen2"),
    "mix": _calibrated("--scheme W8A8_MIX"),
    "cache": _calibrated("--scheme W8A8 --kv-cache C8"),
    "cache-ascend": _calibrated("--scheme W8A8_DYNAMIC --kv-cache C8 --format ascend"),
    "histogram": _calibrated("--scheme W8A8 --algorithm histogram"),
    "percentile": _calibrated("--scheme W8A8 --algorithm percentile"),
    "flexsmooth": _calibrated("--scheme W8A8_DYNAMIC --algorithm flexsmooth"),
    "osl": _calibrated("--scheme W8A8 --algorithm osl"),
    "osl-llama": _calibrated("--scheme W8A8_DYNAMIC --algorithm osl --format ascend", "llama"),
    "osl-bundled": _calibrated("--scheme W8A8 --algorithm osl", "bundled"),
    "awq": _calibrated("--scheme W4A16 --algorithm awq"),
    "clip": _calibrated("--scheme W4A16 --algorithm clip", "qwen2"),
    "gptq": _calibrated("--scheme W4A16 --algorithm gptq"),
    "gptq-order": _calibrated("--scheme W8A8_DYNAMIC --algorithm gptq --set gptq.act_order=true"),
    "osl-gptq": _calibrated("--scheme W4A8_DYNAMIC --algorithm osl+gptq", "llama"),
    "quarot-gptq": _calibrated("--scheme W4A4_DYNAMIC --algorithm quarot+gptq"),
    "flatquant": _calibrated(
        "--scheme W4A4_FLATQUANT_DYNAMIC --algorithm flatquant --set flatquant.steps=8"
    ),
    "admm": _calibrated("--scheme W16A16S --algorithm admm"),
    "admm-float16": _calibrated("--scheme W16A16S --algorithm admm --dtype float16", "wide"),
    "quarot-smoothquant": _calibrated(
        "--scheme W8A8 --algorithm quarot+smoothquant --exclude *.0.self_attn.*", "smollm3"
    ),
    "records": "ms-quant quantize {qwen2} -o {out} --calib {lines} --seq-len 16 --seed 3",
    "native-recipe": "ms-quant quantize {qwen3} -o {out} --recipe {native}" + _CALIB,
    "modelslim-recipe": "ms-quant quantize {qwen2} -o {out} --recipe {modelslim}" + _CALIB,
    "modelslim-v0-recipe": "ms-quant quantize {qwen2} -o {out} --recipe {modelslim_v0}" + _CALIB,
}
_CONVERTED = {
    "dynamic-to-compressed": _convert("dynamic", "compressed-tensors"),
    "dynamic-to-mindie": _convert("dynamic", "mindie-sd"),
    "w4a16-to-compressed": _convert("w4a16-channel", "compressed-tensors"),
    "mxfp4-to-ascend": _convert("mxfp4-mindie", "ascend"),
    "static-to-ascend": _convert("static", "ascend"),
    "static-between": "ms-quant convert {static-several}/compressed-tensors -o {out} "
    "--format ascend",
    "foreign-to-compressed": _convert("msmodelslim", "compressed-tensors"),
    "foreign-to-ascend": _convert("llm_compressor", "ascend"),
}
_COMPRESSED = {
    "sparse-half": _sparse("--sparsity 0.5 --tp 1"),
    "sparse-half-bundled": _sparse("--sparsity 0.5 --tp 2", "bundled"),
    "sparse-magnitude": _sparse("--pruning magnitude --tp 1 --algorithm smoothquant"),
    "sparse-osl": _sparse("--sparsity 0.5 --tp 1 --algorithm osl"),
    "sparse-biases": _sparse("--sparsity 0.3 --tp 1 --exclude *.down_proj", "wide_qwen2"),
    "sparse-four-ranks": _sparse("--tp 4", "bundled"),
    "sparse-ratio": _sparse("--target-ratio 0.5 --tp 1"),
    "sparse-perplexity": _sparse("--max-ppl-increase 5% --heldout {heldout} --tp 1", "wide_qwen2"),
    "sparse-ascend": _sparse("--sparsity 0.5 --tp 2 --target vllm-ascend", "bundled"),
    "sparse-msmodelslim": _sparse("--sparsity 0.5 --tp 1 --target msmodelslim"),
    "compress": "sparse-compress compress {lowbits} -o {out}",
    "compress-rank": "sparse-compress compress {lowbits} -o {out} --target vllm-mindspore",
    "compress-ascend": "sparse-compress compress {lowbits} -o {out} --target vllm-ascend",
    "compress-float": "sparse-compress compress {admm-float16} -o {out}",
    "decompress": "sparse-compress decompress {compress} -o {out}",
    "decompress-ranks": "sparse-compress decompress {sparse-half-bundled} -o {out}",
}
_TEXT = " --text {heldout} --seq-len 32 --windows 2"
_FORWARD = {
    **{f"eval-{name}": f"ms-quant eval {{{name}}}{_TEXT}" for name in (*MODELS, "bundled")},
    **{
        f"eval-{name}": f"ms-quant eval {{{name}}}{_TEXT}"
        for name in (
            *("dynamic", "static", "static-llama", "static-smollm3", "mix", "cache", "quarot"),
            *("w4a16-asymmetric", "w4a8-groups", "w4a4", "flatquant", "float8", "float8-block"),
            *("mxfp8", "mxfp4", "mxfp4-dual", "mxfp4-svd", "native-recipe"),
            *("sparse-half", "sparse-half-bundled"),
        )
    },
    "eval-float16": f"ms-quant eval {{static}}{_TEXT} --float16",
    "eval-cache-dynamic": f"ms-quant eval {{qwen2}}{_TEXT} --kv-cache C8_DYNAMIC",
    "generate-bundled": "ms-quant generate {bundled} --prompt def --max-tokens 16",
    "generate-cache": "ms-quant generate {cache} --prompt import --max-tokens 8",
    "generate-osl": "ms-quant generate {osl-bundled} --prompt class --max-tokens 16",
    "generate-mistral": "ms-quant generate {mistral} --prompt return --max-tokens 24",
}
COMMANDS = {**_SCHEMES, **_CALIBRATED, **_CONVERTED, **_COMPRESSED, **_FORWARD}
TEXTS = BUNDLED.parent / "text"
OTHERS = BUNDLED.parents[1] / "tests" / "golden" / "others"
GIVEN = {
    "bundled": BUNDLED,
    "text": TEXTS / "calibration.txt",
    "heldout": TEXTS / "heldout.txt",
    "msmodelslim": OTHERS / "msmodelslim_w8a8_dynamic_qwen3_f32",
    "llm_compressor": OTHERS / "llm_compressor_w8a8",
}
FILES = {
    "native.yaml": """
apiversion: ms_quant_v1
steps:
  - {algorithm: smoothquant, options: {alpha: 0.7}, groups: [qkv]}
  - {algorithm: osl, include: ["*.1.mlp.*"], groups: [gate_up]}
rules:
  - {scheme: W8A8_DYNAMIC, include: ["*.self_attn.*", "*.1.mlp.{gate,up}_proj"]}
  - {scheme: W8A16, algorithms: [gptq], include: ["*.0.mlp.*"], exclude: ["*.0.mlp.down_proj"]}
kv_cache: C8
formats: [ascend]
""",
    "modelslim.yaml": """
apiversion: modelslim_v1
spec:
  process:
    - {type: iter_smooth, alpha: 0.8}
    - type: linear_quant
      qconfig: &static
        act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*self_attn*"]
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: ssz}
      include: ["*mlp*"]
  save:
    - {type: ascendv1_saver, part_file_size: 0}
""",
    "modelslim_v0.yaml": """
apiversion: modelslim_v0
spec:
  anti_cfg: {anti_method: m4, w_bit: 8, a_bit: 8, w_sym: true}
  calib_cfg: {w_bit: 8, a_bit: 8, mm_tensor: false, disable_names: [model.layers.2.mlp.down_proj]}
""",
}


FILES["lines.jsonl"] = "".join(
    json.dumps({"text": f"def f{number}(x):\n    return x * {number}\n" * 4}) + "\n"
    for number in range(40)
)


def words(name: str) -> list[str]:
    """The words in braces of a command, but its own output."""
    fields = (field for _, field, _, _ in Formatter().parse(COMMANDS[name]))
    return [field for field in fields if field and field != "out"]


def with_sources(names: list[str]) -> list[str]:
    """The commands, and those whose outputs they read, in the order of the table."""
    needed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += [word for word in words(name) if word in COMMANDS]
    return [name for name in COMMANDS if name in needed]


def depends_on_machine(name: str) -> bool:
    """Whether sums of floats decide the output: it is calibrated, or a forward of the model."""
    chain = [COMMANDS[one] for one in with_sources([name])]
    signs = (" --calib ", "ms-quant eval ", "ms-quant generate ")
    return any(sign in line for line in chain for sign in signs)


def write_files(directory: Path) -> dict[str, Path]:
    """The recipes and the data that commands name without the ending."""
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return {Path(name).stem: directory / name for name in FILES}
