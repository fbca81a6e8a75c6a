"""Tiny models, texts and safetensors files; written and read here without the code under test."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ms_quant
from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.timestep import TimestepManager, kept_timesteps

EOS = "<|end|>"
VOCAB_SIZE = 320  # more than the tokenizer has, as in many real models
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
STORED = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"], "float32": DTYPES["F32"]}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "seed_oss": "SeedOss",
    "internlm3": "InternLM3",
}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potions".split()  # noqa: SIM905


def pytest_report_header() -> str:
    """Which kernels these tests run; ``MS_QUANT_ISA`` chooses slower ones (docs/kernels.md)."""
    try:
        return f"kernels: {kernels.best_isa() if kernels.available() else kernels.note()}"
    except MsQuantError as error:
        raise pytest.UsageError(str(error)) from None


def _cores() -> int:
    able = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core that this process may run on, if there are 4 GB for each of them."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return _cores()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(_cores(), round(memory / (4 << 30))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[object]) -> None:
    """Workers share the cores; waiting threads of OpenBLAS spin, a sixth of all CPU time."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, _cores() // len(specs))))


def _text(words: int, seed: int) -> str:
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return "".join(f"{word}{'.' if i % 7 == 6 else ''} " for i, word in enumerate(chosen))


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_text(400, 1)], trainer)
    return tokenizer


def _save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _load_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                part = np.frombuffer(data[start + first : start + last], DTYPES[entry["dtype"]])
                tensors[name] = part.reshape(entry["shape"]).copy()
    return tensors


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them, written down once more."""
    hidden, inter, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    family, biased = config["model_type"], config["attention_bias"]
    linears = {
        "self_attn.q_proj": (q, hidden, biased or family == "qwen2"),
        "self_attn.k_proj": (kv, hidden, biased or family == "qwen2"),
        "self_attn.v_proj": (kv, hidden, biased or family == "qwen2"),
        "self_attn.o_proj": (hidden, q, biased and family != "qwen2"),
        "mlp.gate_proj": (inter, hidden, config["mlp_bias"]),
        "mlp.up_proj": (inter, hidden, config["mlp_bias"]),
        "mlp.down_proj": (hidden, inter, config["mlp_bias"]),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if family == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (dim,)
        for path, (out_features, in_features, bias) in linears.items():
            shapes[f"{prefix}{path}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{prefix}{path}.bias"] = (out_features,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    return noise / math.sqrt(shape[1]) if "layers" in name else noise


def _write_model(
    directory: Path,
    *,
    family: str = "qwen3",
    layers: int = 2,
    dtype: str = "bfloat16",
    shards: int = 1,
    tied: bool = False,
    biases: bool = False,
    seed: int = 0,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **config: Any,
) -> Path:
    directory.mkdir()
    content: dict[str, Any] = {
        "architectures": [f"{CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "attention_bias": biases and family != "qwen2",
        "mlp_bias": biases and family == "llama",
        "eos_token_id": _tokenizer().token_to_id(EOS),
        "torch_dtype": dtype,
        **config,
    }
    (directory / "config.json").write_text(json.dumps(content))
    rng = np.random.default_rng(seed)
    tensors = {
        name: _random_tensor(rng, name, shape).astype(STORED[dtype])
        for name, shape in _shapes(content).items()
    }
    change(tensors)
    _save_model(directory, tensors, shards)
    _tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return directory


def _save_model(directory: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        _save_tensors(directory / "model.safetensors", tensors)
        return
    names, shard_of = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]  # every block is spread over every shard
        _save_tensors(directory / file, {name: tensors[name] for name in mine})
        shard_of.update(dict.fromkeys(mine, file))
    index = {"metadata": {}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_model(name="model", **options)`` writes a random Hugging Face model directory.

    Options are those of ``_write_model``: family, layers, dtype, shards, tied, biases, seed,
    ``change`` (edits the tensors before they are written) and further keys of config.json.
    """

    def make(name: str = "model", **options: Any) -> Path:
        return _write_model(tmp_path / name, **options)

    return make


@pytest.fixture
def calib_text(tmp_path: Path) -> Path:
    """A text file of some 2,000 tokens."""
    path = tmp_path / "calib.txt"
    path.write_text(_text(500, 2))
    return path


@pytest.fixture(scope="session")
def save_tensors() -> Callable[[Path, Mapping[str, np.ndarray]], None]:
    """Writes one safetensors file."""
    return _save_tensors


@pytest.fixture(scope="session")
def load_tensors() -> Callable[[Path], dict[str, np.ndarray]]:
    """Every tensor of a directory, whatever the index says."""
    return _load_tensors


@pytest.fixture(scope="session")
def blocking_mindspore() -> None:
    """MindSpore as the commands set it up: on CPU, blocking launches are far faster."""
    import mindspore

    mindspore.runtime.launch_blocking()


@pytest.fixture(scope="module")
def any_timesteps(blocking_mindspore: None) -> Iterator[None]:
    """Sampling loops of any number of steps; what was set is put back."""
    with kept_timesteps():
        TimestepManager.set_timestep_idx_max(None)
        yield


@pytest.fixture(scope="session")
def package_environment() -> dict[str, str]:
    """Environment of a child process that imports the package under test."""
    root = str(Path(ms_quant.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


@pytest.fixture
def ms_quant_command(
    package_environment: dict[str, str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``ms-quant`` with some arguments, and ``before`` in front of the command's import."""

    def command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
        script = f"{before}\nfrom ms_quant.cli.main import main\nmain()"
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=package_environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return command


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def file_contents() -> Callable[[Path], dict[str, bytes]]:
    """Relative path to content, for every file under a directory."""
    return tree_bytes
