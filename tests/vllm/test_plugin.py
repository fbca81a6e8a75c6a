"""The plugin in vLLM itself: found through its entry point, loading what a double asks for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.distributed
from safetensors.numpy import load_file, save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.plugins import load_general_plugins

from ms_quant.errors import MsQuantError

LAYERS, HEADS, KV_HEADS, DIM, INTER = 3, 12, 4, 64, 768
DESCRIPTION = "quant_model_description_w8a8sc.json"
QKV = "model.layers.0.self_attn.qkv_proj"
BLOCK, REST = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"
Tensors = dict[str, np.ndarray]


def read(directory: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_both_ranks_on_a_310p(checkpoint: Path, both_ranks: Path) -> None:
    """Every tensor of exactly this rank, as it is stored."""
    for rank in range(2):
        found = load_file(both_ranks / f"rank_{rank}-310p.safetensors")
        same(found, read(checkpoint / f"rank_{rank}"))


def test_both_ranks_elsewhere(checkpoint: Path, decompressed: Path, both_ranks: Path) -> None:
    """Slices of what `sparse-compress decompress` makes, bit for bit."""
    whole = read(decompressed)
    for rank in range(2):
        stored = read(checkpoint / f"rank_{rank}")
        floats = {
            name: array
            for name, array in stored.items()
            if "norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        expected = dict(floats)
        for layer in range(LAYERS):
            expected |= sliced(whole, f"model.layers.{layer}.", rank)
        same(load_file(both_ranks / f"rank_{rank}-910b.safetensors"), expected)


def sliced(whole: Tensors, layer: str, rank: int) -> Tensors:
    """A rank's plain W8A8 linears of one block."""
    q, kv, inter = HEADS // 2 * DIM, KV_HEADS // 2 * DIM, INTER // 2
    members = {
        "self_attn.qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "mlp.gate_up_proj": {"gate_proj": inter, "up_proj": inter},
    }
    result: Tensors = {}
    for fused, parts in members.items():
        parent = layer + fused.partition(".")[0]
        paths = {f"{parent}.{name}": slice(rank * n, (rank + 1) * n) for name, n in parts.items()}
        for suffix in ("weight", "deq_scale", "quant_bias"):
            arrays = [whole[f"{path}.{suffix}"][rows] for path, rows in paths.items()]
            result[f"{layer}{fused}.{suffix}"] = np.concatenate(arrays)
        result |= spread(whole, next(iter(paths)), layer + fused, 384)
    for fused, columns in {"self_attn.o_proj": q, "mlp.down_proj": inter}.items():
        path = layer + fused
        part = slice(rank * columns, (rank + 1) * columns)
        result[f"{path}.weight"] = whole[f"{path}.weight"][:, part]
        result[f"{path}.deq_scale"] = whole[f"{path}.deq_scale"]
        bias = whole[f"{path}.quant_bias"]
        result[f"{path}.quant_bias"] = np.zeros_like(bias) if rank else bias
        result |= spread(whole, path, path, columns)
    for name, array in result.items():
        if name.endswith("deq_scale"):
            result[name] = array.astype(np.int32).view(np.float32)
    return result


def spread(whole: Tensors, path: str, fused: str, size: int) -> Tensors:
    """One scale and zero point for each input channel."""
    scale, offset = (whole[f"{path}.{name}"] for name in ("input_scale", "input_offset"))
    return {
        f"{fused}.input_scale": np.repeat(scale.astype(np.float16), size),
        f"{fused}.input_offset": np.repeat(offset.astype(np.int8), size),
    }


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loader as vLLM makes it, in a process that is rank 1 of 2."""
    load_general_plugins()
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 2)
    return get_model_loader(LoadConfig(load_format="sparse_quant"))


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


class Parameters:
    """A model that asks for what a rank holds, and sees what it is given."""

    def __init__(self, stored: Tensors):
        make = torch.nn.Parameter
        self.parameters = {
            name: make(torch.full_like(torch.from_numpy(array), 7), requires_grad=False)
            for name, array in stored.items()
        }

    def named_parameters(self) -> Any:
        return self.parameters.items()

    @property
    def untouched(self) -> bool:
        return all(bool((tensor == 7).all()) for tensor in self.parameters.values())


def edit(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def describe(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((directory / DESCRIPTION).read_text())
    change(value)
    (directory / DESCRIPTION).write_text(json.dumps(value))


def swap(directory: Path) -> None:
    shutil.rmtree(directory / "rank_1")
    shutil.copytree(directory / "rank_0", directory / "rank_1")


def plain(directory: Path) -> None:
    (directory / DESCRIPTION).rename(directory / "quantization_description.json")


def flip(name: str, at: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(np.uint8)[at] ^= 1

    return change


def in_block(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "rank_1" / BLOCK, change)


VIOLATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing rank": (lambda d: shutil.rmtree(d / "rank_1"), r"has \['rank_0'\], expected"),
    "ranks and tp": (lambda d: shutil.copytree(d / "rank_0", d / "rank_2"), "'rank_2'], expected"),
    "tp of the description": (
        lambda d: describe(d, lambda v: v.pop("rank_1")),
        "is made for 1 ranks, expected 2",
    ),
    "another rank's files": (swap, "all lengths are those of rank_0"),
    "missing tensor": (
        in_block(lambda t: t.pop(f"{QKV}.index")),
        rf"tensor '{QKV}.index' is missing, expected int8 \[80\]",
    ),
    "unknown tensor": (
        in_block(lambda t: t.update(odd=np.zeros(2, np.int8))),
        "unknown tensor 'odd', expected none",
    ),
    "wrong shape": (
        in_block(lambda t: t.update({f"{QKV}.input_scale": np.ones(1, np.float16)})),
        r"found float16 \[1\], expected float16 \[384\]",
    ),
    "wrong dtype": (
        in_block(lambda t: t.update({f"{QKV}.quant_bias": np.zeros(640, np.int64)})),
        r"found int64 \[640\], expected int32 \[640\]",
    ),
    "damaged index": (in_block(flip(f"{QKV}.index", 0)), rf"tensor '{QKV}.weight': tile \d"),
    "damaged weight": (in_block(flip(f"{QKV}.weight", 40)), rf"{QKV}\.(weight|quant_bias)"),
    "description": (
        lambda d: describe(d, lambda v: v["rank_1"].update({f"{QKV}.weight.shape": [128]})),
        r"expected int8 \[128\] as quant_model_description_w8a8sc.json gives rank_1",
    ),
    "plain W8A8": (plain, "is a golden-stick checkpoint.*without --load-format sparse_quant"),
    "another norm": (
        lambda d: edit(d / "rank_1" / REST, lambda t: t["model.norm.weight"].fill(0)),
        "sha256 differs from ms_quant.json",
    ),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_nothing_is_copied_from_what_is_wrong(
    checkpoint: Path, copied: Path, loader: Any, name: str
) -> None:
    damage, pattern = VIOLATIONS[name]
    model = Parameters(read(copied / "rank_1"))
    damage(copied)
    with pytest.raises(MsQuantError, match=pattern) as caught:
        loader.load_weights(model, SimpleNamespace(model=str(copied)))
    assert str(caught.value).startswith("rank_1: ")
    assert "sparse-compress run MODEL" in str(caught.value)
    assert model.untouched


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda t: t.update(extra=np.zeros(3, np.int8)),
            r"'extra' is missing, expected int8",
        ),
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' .* has no parameter for"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(383, np.float16)}),
            r"is float16 \[384\], expected float16 \[383\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(384, np.float32)}),
            r"is float16 \[384\], expected float32 \[384\]",
        ),
    ],
)
def test_a_model_that_asks_for_something_else(
    checkpoint: Path, loader: Any, change: Callable[[Tensors], Any], pattern: str
) -> None:
    wanted = read(checkpoint / "rank_1")
    change(wanted)
    model = Parameters(wanted)
    with pytest.raises(MsQuantError, match=pattern):
        loader.load_weights(model, SimpleNamespace(model=str(checkpoint)))
    assert model.untouched


def test_a_parameter_with_two_names(checkpoint: Path, loader: Any) -> None:
    """A head that is the embedding, as vllm-mindspore lists it, asks for no tensor of its own."""
    model = Parameters(read(checkpoint / "rank_1"))
    model.parameters["lm_head.embed_tokens.weight"] = model.parameters["lm_head.weight"]
    loader.load_weights(model, SimpleNamespace(model=str(checkpoint)))
    assert not model.untouched


def test_registered_twice_and_by_others(loader: Any) -> None:
    """The last one wins, and registering again is no error."""
    from sparse_compress.vllm_plugin import register

    register()
    register()
    found = get_model_loader(LoadConfig(load_format="sparse_quant"))
    assert type(found).__name__ == "SparseQuantLoader"


def test_options_that_cannot_be(checkpoint: Path, loader: Any) -> None:
    load = LoadConfig(load_format="sparse_quant", model_loader_extra_config={"threads": 4})
    with pytest.raises(MsQuantError, match=r"model_loader_extra_config is .*, expected none"):
        get_model_loader(load)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=2), quant_config=None
    )
    model = SimpleNamespace(model=str(checkpoint))
    with pytest.raises(MsQuantError, match="pipeline-parallel-size is 2, expected 1"):
        loader.load_model(vllm_config=config, model_config=model)
    config.parallel_config.pipeline_parallel_size = 1
    with pytest.raises(MsQuantError, match="quantization none, expected --quantization golden"):
        loader.load_model(vllm_config=config, model_config=model)
    with pytest.raises(MsQuantError, match="no such directory"):
        loader.download_model(SimpleNamespace(model="Qwen/Qwen3-8B"))
