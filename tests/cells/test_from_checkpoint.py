"""The decoder in MindSpore against the forward that eval and generate run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_decoder import SlowDecoder

pytest.importorskip("mindspore")

from mindspore import Tensor

from ms_quant import kernels
from ms_quant.cells.decoder import causal_mask, forward, rope_tensors
from ms_quant.cells.from_checkpoint import decoder_from_checkpoint
from ms_quant.cells.kv_cache import Int8KeyValueCache, KeyValueCache
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.evaluation.float32_forward import LastNorm, load_block
from ms_quant.formats.opening import ServedModel, open_model
from ms_quant.models import cache
from ms_quant.models.block_forward import Positions
from ms_quant.pipeline.run import QuantizeOptions, run_job

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
IDS = np.random.default_rng(0).integers(0, 300, (3, 17)).astype(np.int32)
MODELS: list[dict[str, Any]] = [
    {"family": "qwen3"},
    {"family": "qwen2", "tied": True, "dtype": "float32"},
    {"family": "llama", "biases": True, "dtype": "float16"},
    {"family": "smollm3", "no_rope_layers": [1, 0]},
]
BY_KERNELS = ["float", "W8A8", "W8A8_DYNAMIC", "W8A16", "W8A8_MIX"]


@pytest.fixture
def opened(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> Callable[..., ServedModel]:
    def make(scheme: str, **model: Any) -> ServedModel:
        source = tiny_model(**model)
        if scheme == "float":
            return open_model(source)
        static = scheme in ("W8A8", "W8A8_MIX")
        data = {"calib": calib_text, "samples": 2, "seq_len": 16} if static else {}
        run_job(QuantizeOptions(source, tmp_path / "out", scheme, **data))
        return open_model(tmp_path / "out")

    return make


def hidden_states(model: ServedModel, ids: np.ndarray, decode: bool = False) -> np.ndarray:
    """After the last norm, float32 (B, S, hidden), without MindSpore."""
    hidden = model.tensor("model.embed_tokens.weight")[ids]
    for index in range(model.config.num_layers):
        block = load_block(model, index)
        block = block.in_decode() if decode else block
        hidden = block(hidden, Positions(model.config, ids.shape[1]))
    return LastNorm(model)(hidden)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", BY_KERNELS)
def test_it_computes_what_eval_does(model: dict, scheme: str, opened: Callable) -> None:
    """The same bits where both call the same kernels."""
    checkpoint = opened(scheme, **model)
    network = decoder_from_checkpoint(checkpoint)
    swapped = [p for p, cell in network.cells_and_names() if isinstance(cell, QuantLinear)]
    assert len(swapped) == (0 if scheme == "float" else 14)
    length = IDS.shape[1]
    angles, mask = rope_tensors(network.config, 0, length), causal_mask(length)
    found, expected = network.model(Tensor(IDS), *angles, mask), hidden_states(checkpoint, IDS)
    tolerance = 0 if kernels.available() else 1e-5
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", ["W8A8FP8_DYNAMIC", "W8A8_MXFP8"])
def test_schemes_without_kernels(scheme: str, opened: Callable) -> None:
    """Sums in another order move a value to the next step of its input's format at times."""
    checkpoint = opened(scheme, hidden_size=32, intermediate_size=64, head_dim=32)
    logits = forward(decoder_from_checkpoint(checkpoint), IDS).asnumpy()
    exact = hidden_states(checkpoint, IDS) @ checkpoint.tensor("lm_head.weight").T
    assert np.abs(logits - exact).mean() < 0.01 * np.abs(exact).mean()


def test_its_logits_are_those_of_the_definition(opened: Callable) -> None:
    checkpoint = opened("float", family="qwen3")
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.config.parameter_shapes()}
    slow = SlowDecoder(checkpoint.config, tensors)
    logits = forward(decoder_from_checkpoint(checkpoint), IDS).asnumpy()
    np.testing.assert_allclose(logits[1], slow.logits(IDS[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float", "C8_DYNAMIC"])
def test_it_decodes_with_a_cache(kind: str, opened: Callable) -> None:
    """Prefill, then token by token, a linear in each phase as it is for that."""
    checkpoint = opened("W8A8_MIX", family="qwen3")
    network, block = decoder_from_checkpoint(checkpoint), load_block(checkpoint, 0)
    theirs = KeyValueCache() if kind == "float" else Int8KeyValueCache()
    ours = cache.KeyValueCache() if kind == "float" else cache.Int8KeyValueCache()
    hidden = checkpoint.tensor("model.embed_tokens.weight")[IDS[:1]]
    for start, stop in [(0, 8), (8, 9), (9, 10)]:
        part, which = hidden[:, start:stop], block.in_decode() if start else block
        expected = which(part, Positions(checkpoint.config, stop, start), ours.extend)
        angles = rope_tensors(checkpoint.config, start, stop)
        mask = causal_mask(stop)[:, :, start:]
        x = Tensor(np.ascontiguousarray(part))
        found = network.model.layers[0](x, *angles, mask, theirs, start > 0)
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    assert theirs.length == ours.length == 10
