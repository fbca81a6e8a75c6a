"""One of two processes that load a checkpoint as vLLM's ranks.

Arguments: the rank, where to leave a file, the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from double import GoldenStickDouble, build
from safetensors.torch import save_file
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader import base_loader, get_model_loader
from vllm.plugins import load_general_plugins


def main(rank: int, place: Path, checkpoint: Path) -> None:
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        meeting = f"file://{place / 'meeting'}"
        init_distributed_environment(2, rank, meeting, rank, "gloo")
        initialize_model_parallel(2)
    load_general_plugins()
    for device in ("310p", "910b"):
        model = load(rank, checkpoint, device)
        save_file(dict(model.named_parameters()), place / f"rank_{rank}-{device}.safetensors")


def load(rank: int, checkpoint: Path, device: str) -> torch.nn.Module:
    """What vLLM does for `--load-format sparse_quant`, with the double's model."""
    utils = ModuleType("vllm_mindspore.utils")
    utils.is_310p = lambda: device == "310p"  # type: ignore[attr-defined]
    sys.modules["vllm_mindspore.utils"] = utils

    def initialize(vllm_config: Any, **options: Any) -> torch.nn.Module:
        return build(checkpoint, vllm_config.quant_config, rank, 2, device == "310p")

    base_loader.initialize_model = initialize  # as vllm-mindspore replaces it
    chosen = LoadConfig(load_format="Sparse_Quant")
    description = json.loads((checkpoint / "quant_model_description_w8a8sc.json").read_text())
    config = SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"),
        load_config=chosen,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        quant_config=GoldenStickDouble(description),
    )
    model_config = SimpleNamespace(
        model=str(checkpoint),
        dtype=torch.float16,
        quantization="golden-stick",
        word_embeddings_untied_by_checkpoint=False,  # newer versions ask
    )
    model = get_model_loader(chosen).load_model(vllm_config=config, model_config=model_config)
    assert config.quant_config.config is description  # the caller's is left as it was
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
