"""The decoder in MindSpore against the forward that eval and generate run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed_models import DEEPSEEK, QWEN, save_routed
from slow_decoder import SlowDecoder

pytest.importorskip("mindspore")

from mindspore import Tensor, jit

from ms_quant import kernels, quantize
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
QWEN2_MOE = {
    **QWEN,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 32,
}
FEW = {**DEEPSEEK, "n_routed_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "float": (FEW, {}),
    "golden-stick": (FEW, {"scheme": "W8A8", "samples": 8, "seq_len": 16}),
    "ascend": (QWEN2_MOE, {"scheme": "W8A8_DYNAMIC"}),
    "compressed-tensors": (FEW, {"scheme": "W4A16", "scheme_options": {"group_size": 32}}),
}
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


@pytest.fixture(scope="module", params=ROUTED)
def routed(request, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A checkpoint of each format with experts, and layers that predict further tokens."""
    directory, (raw, options) = tmp_path_factory.mktemp("routed"), ROUTED[request.param]
    source, output = save_routed(directory / "float", raw), directory / "out"
    if not options:
        return open_model(source)
    if "samples" in options:
        tokens = np.random.default_rng(2).integers(0, 256, (8, 16))
        np.savez(directory / "tokens.npz", tokens=tokens)
        options = {**options, "calib": directory / "tokens.npz"}
    run_job(QuantizeOptions(source, output, formats=(request.param,), **options))
    return open_model(output)


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


def test_experts_and_latent_attention(routed: ServedModel) -> None:
    network, config = decoder_from_checkpoint(routed), routed.config
    swapped = {p for p, cell in network.cells_and_names() if isinstance(cell, QuantLinear)}
    blocks = range(config.num_layers)
    paths = (f"model.layers.{i}.{m}" for i in blocks for m in config.block(i).linears)
    assert swapped == {path for path in paths if routed.linear(path) is not None}
    length, ids = IDS.shape[1], IDS % config.vocab_size
    angles, mask = rope_tensors(config, 0, length), causal_mask(length)
    found, expected = network.model(Tensor(ids), *angles, mask), hidden_states(routed, ids)
    tolerance = 0 if kernels.available() else 1e-5
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("routed", ["golden-stick", "ascend"], indirect=True)
def test_experts_and_latent_attention_compiled(routed: ServedModel) -> None:
    """Where every expert computes all tokens. Sums in another order move an input to the next code
    at times: inputs that are off by 2^-24 change what eval computes by 0.009 of it."""
    layer, block = decoder_from_checkpoint(routed).model.layers[1], load_block(routed, 1)
    length, x = IDS.shape[1], routed.tensor("model.embed_tokens.weight")[IDS % 256]
    angles, mask = rope_tensors(routed.config, 0, length), causal_mask(length)

    @jit
    def compiled(x: Tensor) -> Tensor:
        return layer(x, *angles, mask)

    expected = block(x.copy(), Positions(routed.config, length)) - x
    difference = np.abs(compiled(Tensor(x)).asnumpy() - x - expected).mean()
    assert difference < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize("kind", ["float", "C8_DYNAMIC"])
def test_latent_attention_decodes_with_a_cache(kind: str, routed: ServedModel) -> None:
    """Of each token one vector and one key for all heads are kept."""
    network, block = decoder_from_checkpoint(routed), load_block(routed, 0)
    theirs = KeyValueCache() if kind == "float" else Int8KeyValueCache()
    ours = cache.KeyValueCache() if kind == "float" else cache.Int8KeyValueCache()
    hidden = routed.tensor("model.embed_tokens.weight")[IDS[:2] % 256]
    for start, stop in [(0, 8), (8, 9), (9, 12)]:
        part = np.ascontiguousarray(hidden[:, start:stop])
        expected = block(part, Positions(routed.config, stop, start), ours)
        angles = rope_tensors(routed.config, start, stop)
        mask = causal_mask(stop)[:, :, start:]
        found = network.model.layers[0](Tensor(part), *angles, mask, theirs, start > 0)
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    assert theirs.length == 12


def test_networks_with_experts_are_quantized_in_place(tmp_path: Path) -> None:
    """Linears of one input share it, each expert has its own, and no router is one of them."""
    model = open_model(save_routed(tmp_path / "float", FEW))
    network, length = decoder_from_checkpoint(model), 64
    ids = np.random.default_rng(0).integers(0, 256, (8, length)).astype(np.int32)
    inputs = Tensor(ids), *rope_tensors(model.config, 0, length), causal_mask(length)
    quantize(network, "W8A8", calibration=[inputs], exclude=["lm_head"])
    block = network.model.layers[1]
    attention, (first, second) = block.self_attn, (block.mlp.experts[i] for i in range(2))
    scales = [
        [cell.input_scale.asnumpy() for cell in cells]
        for cells in (
            (attention.q_a_proj, attention.kv_a_proj_with_mqa),
            (first.gate_proj, first.up_proj),
            (first.gate_proj, second.gate_proj),
        )
    ]
    assert [np.array_equal(*pair) for pair in scales] == [True, True, False]
    router = model.tensor("model.layers.1.mlp.gate.weight")
    np.testing.assert_array_equal(block.mlp.gate.weight.asnumpy(), router)
    hidden, slots = model.tensor("model.embed_tokens.weight")[ids[:1, :12]], KeyValueCache()
    whole = block(Tensor(hidden), *rope_tensors(model.config, 0, 12), causal_mask(12)).asnumpy()
    for start, stop in [(0, 8), (8, 12)]:  # kv_b_proj is quantized, and not absorbed
        part = Tensor(np.ascontiguousarray(hidden[:, start:stop]))
        angles = rope_tensors(model.config, start, stop)
        found = block(part, *angles, causal_mask(stop)[:, :, start:], slots).asnumpy()
        assert np.abs(found - whole[:, start:stop]).mean() < 0.05 * np.abs(whole).mean()


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
        expected = which(part, Positions(checkpoint.config, stop, start), ours)
        angles = rope_tensors(checkpoint.config, start, stop)
        mask = causal_mask(stop)[:, :, start:]
        x = Tensor(np.ascontiguousarray(part))
        found = network.model.layers[0](x, *angles, mask, theirs, start > 0)
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    assert theirs.length == ours.length == 10
