"""Everything that is done with DeepSeek-R1 without its weights, in a process of its own.

``python plan_r1.py DIRECTORY FORMAT SCHEME`` makes the model in DIRECTORY, of headers and holes,
and prints one JSON line: CPU seconds of each step, the most memory, and what was found.
"""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from ms_quant.files.atomic import write_json
from ms_quant.files.writer import TensorPlan, plan_shards, shard_names, write_index
from ms_quant.formats.checks import format_of
from ms_quant.formats.companions import model_config
from ms_quant.formats.structure import read_structure
from ms_quant.models.config import parse_config
from ms_quant.pipeline import paths
from ms_quant.pipeline.condensed import condensed
from ms_quant.pipeline.estimate import estimate
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.pipeline.request import prepare

R1 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 4 << 30
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CODES = {"bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8", "int32": "I32"}
CODES |= {"int64": "I64", "uint64": "U64", "float16": "F16"}


def _peak_kilobytes() -> int:
    """Of this program: where the system keeps it apart from that of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    assert found is not None
    return int(found[1])


def write_headers(directory: Path, tensors: Iterable[TensorPlan]) -> None:
    """A checkpoint whose tensors are holes in files."""
    directory.mkdir()
    shards = plan_shards(list(tensors), SHARD_BYTES)
    named = dict(zip(shard_names("model", len(shards)), shards, strict=True))
    for name, part in named.items():
        header, end = {}, 0
        for tensor in part:
            begin, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
            code = CODES[tensor.dtype.name]
            header[tensor.name] = {
                "dtype": code,
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    write_index(directory, named, 0)


def main(directory: Path, format: str, scheme: str) -> None:
    source, output = directory / "R1", directory / "R1-quantized"
    shapes = parse_config(dict(R1)).parameter_shapes()
    write_headers(
        source,
        (
            TensorPlan(name, F32 if name.endswith("correction_bias") else BF16, shape)
            for name, shape in shapes.items()
        ),
    )
    write_json(source / "config.json", R1)
    calib = None
    if scheme.startswith("W8A8,"):
        calib = directory / "calib.npz"
        np.savez(calib, tokens=np.random.default_rng(0).integers(0, 129280, (1, 256)))
    setattr(paths, "free_spaces_check", lambda needed: None)  # noqa: B010 - 1.3 TB
    seconds = {}

    def lap(step: str) -> None:
        seconds[step] = time.process_time() - sum(seconds.values())

    lap("making the model")
    options = QuantizeOptions(source, output, scheme, formats=(format,), calib=calib)
    checked = prepare(options)
    lap("checking the request")
    found = estimate(checked, output)
    floats = condensed(found["float_linears"])
    lap("estimate")
    row, plan = format_of(checked.plan), checked.plan
    tensors = row.tensor_plans(plan)
    plan_shards(tensors, SHARD_BYTES)
    description = row.description(plan)
    record = plan.record()
    lap("description")
    write_headers(output, tensors)
    entry = {row.entry: description} if row.entry else {}
    write_json(output / "config.json", {**model_config(plan.config, plan.dtype), **entry})
    if not row.entry:
        write_json(output / row.document(plan), description)
    write_json(output / "ms_quant.json", {"record": record})
    lap("making the output")
    read, problems = read_structure(output)
    lap("reading its structure")
    print(
        json.dumps(
            {
                "tensors": len(shapes),
                "groups": len(plan.layers),
                "output_bytes": found["output_bytes"],
                "float_lines": floats,
                "schemes": found["scheme"],
                "problems": problems[:3],
                "same": read is not None and read.plan.quantized() == plan.quantized(),
                "seconds": {k: round(v, 1) for k, v in seconds.items()},
                "MB": _peak_kilobytes() >> 10,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
