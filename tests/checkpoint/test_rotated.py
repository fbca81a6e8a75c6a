"""The rotated view: its tensors and pieces, and the model they make."""

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched_block import block_with_inputs

from ms_quant.algorithms.quarot import QuaRot
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.float32_forward import load_block
from ms_quant.evaluation.perplexity import perplexity, token_losses
from ms_quant.files import reader
from ms_quant.files.reader import Checkpoint
from ms_quant.formats.opening import open_model
from ms_quant.models.block_forward import Positions
from ms_quant.models.config import load_config
from ms_quant.quantization import rotated
from ms_quant.quantization.rotated import RotatedCheckpoint

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "stdlib-qwen3-6m"
MODELS: list[dict[str, Any]] = [
    {"family": "llama", "biases": True, "tied": True, "dtype": "float32", "head_dim": 8},
    {"family": "qwen2", "dtype": "float16", "head_dim": 20, "hidden_size": 24},
    {"family": "qwen3", "biases": True, "shards": 3, "head_dim": 2, "hidden_size": 12},
]
Writer = Callable[[RotatedCheckpoint, str], Path]


def view(directory: Path, seed: int = 0) -> RotatedCheckpoint:
    return RotatedCheckpoint(Checkpoint(directory), load_config(directory), seed)


@pytest.fixture
def write(tmp_path: Path, save_tensors: Callable[[Path, Mapping[str, np.ndarray]], None]) -> Writer:
    """Writes a view as a model directory of float32 tensors."""

    def make(checkpoint: RotatedCheckpoint, name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        tensors = {name: checkpoint.read_float32(name) for name in checkpoint.names}
        save_tensors(directory / "model.safetensors", tensors)
        (directory / "config.json").write_text(json.dumps(checkpoint.config.raw))
        return directory

    return make


@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_float64_rounded_once(
    tiny_model: Callable[..., Path],
    load_tensors: Callable[[Path], dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
) -> None:
    directory = tiny_model(**model)
    stored = {name: array.astype(np.float64) for name, array in load_tensors(directory).items()}
    found, quarot = view(directory, 5), QuaRot(load_config(directory), 5)
    assert found.directory == directory
    assert found.config == quarot.config and not found.config.tied
    assert found.names == sorted(found.config.parameter_shapes())
    for block in (1, 100, rotated.BLOCK_ELEMENTS):
        monkeypatch.setattr(rotated, "BLOCK_ELEMENTS", block)
        for name in found.names:
            expected = quarot.tensor(name, stored.__getitem__).astype(np.float32)
            array, info = found.read_float32(name), found.info(name)
            assert (info.code, info.shape) == ("F32", array.shape) == ("F32", expected.shape)
            assert info.stop - info.start == array.nbytes
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("elements", [1, 17, 160, None])
def test_pieces_are_those_of_the_checkpoint_and_bits_those_of_the_tensor(
    tiny_model: Callable[..., Path], model: dict[str, Any], elements: int | None
) -> None:
    found = view(tiny_model(**model))
    plain = Checkpoint(found.directory)
    for name in found.names:
        pieces = list(found.float32_chunks(name, elements))
        whole = np.concatenate([rows for _, rows in pieces])
        assert whole.tobytes() == found.read_float32(name).tobytes(), name
        source = name if name in plain.names else "model.embed_tokens.weight"
        expected = [(start, len(rows)) for start, rows in plain.float32_chunks(source, elements)]
        assert [(start, len(rows)) for start, rows in pieces] == expected


def peak_bytes(pieces: Iterator[tuple[int, np.ndarray]]) -> int:
    tracemalloc.start()
    try:
        for _ in pieces:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float64 copy of either tensor would take twice its bytes."""
    monkeypatch.setattr(rotated, "BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 1 << 12)
    found = view(BUNDLED)
    table, mixed = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
    assert peak_bytes(found.float32_chunks(table, 1 << 12)) < 0.2 * found.info(table).stop
    assert peak_bytes(found.float32_chunks(mixed, 1 << 12)) < 1.3 * found.info(mixed).stop


def test_a_tied_head_that_is_stored_again_is_ignored(tiny_model: Callable[..., Path]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    options = {"tied": True, "head_dim": 8}
    plain = view(tiny_model("plain", **options))
    stored = view(tiny_model("stored", change=change, **options))
    assert stored.names == plain.names
    head = "lm_head.weight"
    np.testing.assert_array_equal(stored.read_float32(head), plain.read_float32(head))


def test_refusals(tiny_model: Callable[..., Path]) -> None:
    directory = tiny_model(head_dim=8)
    found = view(directory)
    for read in (found.info, found.read_float32, lambda name: list(found.float32_chunks(name))):
        with pytest.raises(MsQuantError, match=r"model: the rotated model has no tensor 'x'$"):
            read("x")
    with pytest.raises(
        MsQuantError, match=r"six/config\.json: head_dim: no Hadamard matrix of order 6,"
    ):
        view(tiny_model("six", head_dim=6))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3e38, r"once rotated holds \S+e\+3[89], expected"),
        (np.nan, "holds 256 NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
@pytest.mark.filterwarnings("error")
def test_values_that_do_not_fit_are_refused(
    tiny_model: Callable[..., Path], part: str, value: float, message: str
) -> None:
    """A rotation keeps lengths, so of n equal values one becomes at least as large; the gain of q
    and the heads of o, all of whose values gather in the first, double it.
    """
    name = f"model.layers.0.self_attn.{part}.weight"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][:] = value
        tensors["model.layers.0.input_layernorm.weight"][:] = 2

    found = view(tiny_model(dtype="float32", head_dim=4, change=change))
    for read in (found.read_float32, lambda name: list(found.float32_chunks(name))):
        with pytest.raises(MsQuantError, match=f"tensor {name!r} {message}"):
            read(name)


@pytest.mark.parametrize("model", MODELS)
def test_the_losses_are_the_same(
    tiny_model: Callable[..., Path], write: Writer, model: dict[str, Any]
) -> None:
    directory = tiny_model(**model)
    tokens = np.random.default_rng(0).integers(0, 320, (4, 16)).astype(np.int32)
    exact = token_losses(open_model(directory), tokens)
    found = token_losses(open_model(write(view(directory), "rotated")), tokens)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_the_perplexity_of_the_bundled_model_stays(write: Writer) -> None:
    tokens = eval_windows(ROOT / "models" / "text" / "heldout.txt", BUNDLED, 256)[:8]
    exact = perplexity(open_model(BUNDLED), tokens).perplexity
    found = perplexity(open_model(write(view(BUNDLED), "rotated")), tokens).perplexity
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """The bundled model with outlier channels."""
    path = ROOT / "tools" / "inject_outliers.py"
    spec = importlib.util.spec_from_file_location("inject_outliers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.inject(BUNDLED, tmp_path / "twin", channels=4, factor=32)
    return tmp_path / "twin"


def crests(directory: Path, tokens: np.ndarray) -> dict[str, float]:
    """max|x| / rms of the inputs of qkv and gate_up, in the mean over tokens."""
    model, found = open_model(directory), {}
    positions = Positions(model.config, tokens.shape[1])
    hidden = model.tensor("model.embed_tokens.weight")[tokens]
    for index in range(model.config.num_layers):
        hidden, inputs = block_with_inputs(load_block(model, index), hidden, positions)
        for path in ("self_attn.q_proj", "mlp.gate_proj"):
            x = inputs[path]
            crest = np.abs(x).max(-1) / np.sqrt(np.square(x).mean(-1))
            found[f"{index}.{path}"] = float(np.mean(crest))
    return found


def test_outlier_channels_are_gone(twin: Path, write: Writer) -> None:
    """The maximum of 384 normal numbers is near sqrt(2 ln 384) = 3.4 of their deviations.

    The powers of two that made the outliers cancel when the gains are folded, so nothing is left
    of them, not a bit.
    """
    plain, outliers = view(BUNDLED), view(twin)
    for name in plain.names:
        assert plain.read_float32(name).tobytes() == outliers.read_float32(name).tobytes(), name
    tokens = eval_windows(ROOT / "models" / "text" / "heldout.txt", BUNDLED, 256)[:2]
    before, after = crests(twin, tokens), crests(write(outliers, "rotated"), tokens)
    assert len(before) == 6
    for name, crest in before.items():
        assert crest > 8 and after[name] < 4, (name, crest, after[name])
