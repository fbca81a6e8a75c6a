"""The decoder under jit, and with a key-value cache, against the plain forward."""

from __future__ import annotations

import numpy as np
import pytest
import toy_family
from routed_models import DEEPSEEK, QWEN

ms = pytest.importorskip("mindspore")

from ms_quant import kernels  # noqa: E402
from ms_quant.budget import Budget  # noqa: E402
from ms_quant.cells import attention, direct, experts, layers  # noqa: E402
from ms_quant.cells.decoder import (  # noqa: E402
    CausalLM,
    DecoderBlock,
    causal_mask,
    rope_tensors,
)
from ms_quant.cells.kv_cache import KeyValueCache  # noqa: E402
from ms_quant.errors import MsQuantError  # noqa: E402
from ms_quant.kernels import matrix  # noqa: E402
from ms_quant.models import attention as on_arrays  # noqa: E402
from ms_quant.models import families  # noqa: E402
from ms_quant.models.config import ModelConfig, parse_config  # noqa: E402

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 16}
QWEN3 = {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 4,
    "beta_fast": 2,
    "beta_slow": 0.25,
}
FEW = {**DEEPSEEK, "n_routed_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": QWEN3,
    "qwen2_moe": {
        **QWEN,
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": 8,
    },
    "deepseek_v3": {**FEW, "first_k_dense_replace": 0},
    "kimi_k2": {
        **FEW,
        "model_type": "kimi_k2",
        "q_lora_rank": None,
        "rope_interleave": False,
        "rope_scaling": YARN,
    },
}
CONFIGS = {name: parse_config({**shape, **SMALL}) for name, shape in FAMILIES.items()}
LENGTH = 7
pytestmark = pytest.mark.usefixtures("blocking_mindspore")
ASKING = attention, direct, experts, layers


@pytest.fixture(params=[True, False], ids=["native", "mindspore"], autouse=True)
def native(request, monkeypatch) -> bool:
    """Whether Cells call native kernels: both ways compute the same."""
    if request.param and not kernels.available():
        pytest.skip("no C++ compiler at install time")
    for module in ASKING:
        monkeypatch.setattr(module, "has_kernels", lambda: request.param)
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def block(config) -> DecoderBlock:
    block, rng = DecoderBlock(config), np.random.default_rng(0)
    for parameter in block.get_parameters():
        values = rng.normal(1.0 if parameter.ndim == 1 else 0.0, 0.3, parameter.shape)
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    return block


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, LENGTH, 24)).astype(np.float32)


def plain(config: ModelConfig, block: DecoderBlock, hidden: np.ndarray) -> np.ndarray:
    cos, sin = rope_tensors(config, 0, hidden.shape[1])
    return block(ms.Tensor(hidden), cos, sin, causal_mask(hidden.shape[1])).asnumpy()


@pytest.mark.parametrize("native", [False], indirect=True)
def test_jit_gives_the_same(config, block, hidden):
    cos, sin = rope_tensors(config, 0, LENGTH)
    mask = causal_mask(LENGTH)

    @ms.jit
    def run(x):
        return block(x, cos, sin, mask)

    found = run(ms.Tensor(hidden)).asnumpy()
    np.testing.assert_allclose(found, plain(config, block, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [False], indirect=True)
@pytest.mark.parametrize("config", ["qwen3", "kimi_k2"], indirect=True)
def test_whole_networks_compile(config):
    network, rng = CausalLM(config), np.random.default_rng(0)
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    ids = ms.Tensor(rng.integers(0, 16, (2, LENGTH)).astype(np.int32))
    angles, mask = rope_tensors(config, 0, LENGTH), causal_mask(LENGTH)

    @ms.jit
    def run(ids):
        return network(ids, *angles, mask)

    expected = network(ids, *angles, mask).asnumpy()
    np.testing.assert_allclose(run(ids).asnumpy(), expected, rtol=1e-4, atol=1e-4)


def rounding(expected: np.ndarray) -> float:
    """What a block's output may be off by: some 30 roundings of its largest value, which the many
    sums before it may differ by in another order."""
    return 2.0**-19 * float(np.abs(expected).max())


def test_a_cache_gives_the_same_token_by_token(config, block, hidden):
    cache, outputs = KeyValueCache(), []
    for position in range(LENGTH):
        cos, sin = rope_tensors(config, position, position + 1)
        mask = causal_mask(position + 1)[:, :, position:]
        x = ms.Tensor(hidden[:, position : position + 1])
        outputs.append(block(x, cos, sin, mask, cache).asnumpy())
    assert cache.length == LENGTH
    found = np.concatenate(outputs, axis=1)
    expected = plain(config, block, hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=rounding(expected))


@pytest.mark.skipif(not kernels.has_product(), reason="no AMX")
@pytest.mark.parametrize("config", ["qwen3"], indirect=True)
def test_products_on_amx_give_the_same(config, block, hidden, monkeypatch):
    expected, product, seen = plain(config, block, hidden), matrix.product, []
    monkeypatch.setattr(matrix, "MANY_ROWS", 1)
    monkeypatch.setattr(matrix, "product", lambda x, *a: seen.append(len(x)) or product(x, *a))
    np.testing.assert_allclose(plain(config, block, hidden), expected, rtol=1e-5, atol=1e-5)
    assert seen in ([2 * LENGTH] * 7, []), "all seven linears, or none of MindSpore's"


@pytest.mark.parametrize("hides", [None, (1, 2), (0, LENGTH)])
def test_keys_that_no_query_of_a_slice_sees_are_left_out(monkeypatch, hides):
    """Also where padding hides more, or everything from a query: then it has the mean of all."""
    if not kernels.available():
        pytest.skip("no C++ compiler at install time")
    attention = np.ones((2, LENGTH), int)
    if hides is not None:
        attention[1, slice(*hides)] = 0
    mask = on_arrays.causal_mask(LENGTH, attention)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, heads, LENGTH, 8)).astype("f4") for heads in (6, 2, 2))
    whole = on_arrays.attend(q, k, v, mask)
    seen, attend = [], on_arrays._attend_slice
    monkeypatch.setattr(
        on_arrays, "_attend_slice", lambda *a: seen.append(a[1].shape[2]) or attend(*a)
    )
    np.testing.assert_allclose(
        on_arrays.attend(q, k, v, mask, budget=Budget(queries=2)), whole, rtol=1e-5, atol=1e-6
    )
    assert seen == ([LENGTH] * 4 if hides == (0, LENGTH) else [2, 4, 6, 7])


@pytest.mark.parametrize("queries", [1, 3, 4])
def test_slices_of_queries_give_the_same(config, block, hidden, monkeypatch, native, queries):
    whole = plain(config, block, hidden)
    budget = Budget(score_bytes=queries * 4 * 2 * config.num_heads * LENGTH)
    sliced = DecoderBlock(config, budget=budget)
    ms.load_param_into_net(sliced, block.parameters_dict())
    holder, name = (on_arrays, "_attend_slice") if native else (sliced.self_attn, "attend_slice")
    seen, attend = [], getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda q, *a: seen.append(q) or attend(q, *a))
    np.testing.assert_allclose(plain(config, sliced, hidden), whole, rtol=1e-5, atol=1e-5)
    assert sum(q.shape[2] for q in seen) == LENGTH
    assert max(q.shape[2] for q in seen) == queries


def test_native_kernels_compute_what_mindspore_does(config, block, hidden, monkeypatch, native):
    found = plain(config, block, hidden)
    for module in ASKING:
        monkeypatch.setattr(module, "has_kernels", lambda: not native and kernels.available())
    made = plain(config, block, hidden)
    np.testing.assert_allclose(made, found, rtol=1e-5, atol=rounding(found))


@pytest.mark.parametrize("native", [False], indirect=True)
def test_gradients_are_those_of_the_function(config, block, hidden):
    """Along a random direction, against differences of what is computed without a gradient."""
    cos, sin = rope_tensors(config, 0, LENGTH)
    mask, rng = causal_mask(LENGTH), np.random.default_rng(3)
    weight, way = (rng.normal(size=hidden.shape).astype("f4") for _ in range(2))
    slope = ms.grad(lambda x: (block(x, cos, sin, mask) * ms.Tensor(weight)).sum())
    found = float((slope(ms.Tensor(hidden)).asnumpy() * way).sum())
    after, before = (plain(config, block, hidden + sign * 1e-3 * way) for sign in (1, -1))
    expected = float(((after - before).astype(np.float64) * weight).sum() / 2e-3)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "kimi_k2"])
def test_among_equal_experts_the_first_is_chosen(name):
    """As the definition says, also where groups are equal."""
    routing = CONFIGS[name].routing
    router, rng = experts.Router(routing.experts, routing), np.random.default_rng(0)
    router.weight.set_data(ms.Tensor(np.eye(routing.experts, dtype=np.float32)))
    products, correction = rng.integers(0, 3, (200, routing.experts)).astype(np.float32), None
    if routing.scoring == "sigmoid":
        correction = rng.integers(-1, 2, routing.experts).astype(np.float32)
        router.e_score_correction_bias.set_data(ms.Tensor(correction))
    weights = router(ms.Tensor(products)).asnumpy()
    chosen, expected = routing.route(products, correction)
    np.testing.assert_array_equal(np.nonzero(weights)[1].reshape(chosen.shape), chosen)
    np.testing.assert_allclose(np.take_along_axis(weights, chosen, 1), expected, rtol=1e-5)


def test_an_expert_computes_only_the_tokens_that_go_to_it(hidden):
    """Outside graphs, and none if none do; whoever looks on."""
    config = CONFIGS["deepseek_v3"]
    cell, seen = experts.Experts(config), []
    cell.register_forward_pre_hook(lambda cell, inputs: None)
    for expert in cell.experts:
        expert.register_forward_pre_hook(lambda cell, inputs: seen.append(len(inputs[0])))
    wanted = (np.arange(config.routing.experts) < config.routing.per_token).astype(np.float32)
    cell.gate.e_score_correction_bias.set_data(ms.Tensor(wanted))
    cell(ms.Tensor(hidden))
    assert seen == [2 * LENGTH] * config.routing.per_token


def test_other_branches_are_refused(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family.FAMILY)
    with pytest.raises(MsQuantError, match=r"block 1 of this toy .*toy_family.Experts, expected"):
        DecoderBlock(parse_config(toy_family.CONFIG), 1)


def test_padding_keys_change_nothing(config, block, hidden):
    """Tokens that are masked as keys may hold anything."""
    attention = np.ones((2, LENGTH), int)
    attention[1, :3] = 0
    cos, sin = rope_tensors(config, 0, LENGTH)
    mask = causal_mask(LENGTH, attention)
    other = hidden.copy()
    other[1, :3] = 5.0
    first, second = (block(ms.Tensor(x), cos, sin, mask).asnumpy()[1, 3:] for x in (hidden, other))
    # Experts compute other rows beside these then, and some kernels sum another number of rows in
    # another order.
    tolerance = 0 if config.routing is None else rounding(first)
    np.testing.assert_allclose(first, second, rtol=0, atol=tolerance)


def test_transpose_heads_is_a_transpose():
    x = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    np.testing.assert_array_equal(
        layers.transpose_heads(ms.Tensor(x)).asnumpy(), x.transpose(0, 2, 1, 3)
    )


def test_softmax_and_swap_gradients_match_mindspore(hidden):
    """The two Cells with gradients of their own, against those that MindSpore derives."""
    x = ms.Tensor(hidden.reshape(2, LENGTH, 6, 4))
    weight = ms.Tensor(np.random.default_rng(2).normal(size=x.shape).astype(np.float32))
    swapped = ms.Tensor(weight.asnumpy().transpose(0, 2, 1, 3).copy())
    softmax, swap = layers.Softmax(), layers.TransposeHeads()
    found = ms.grad(lambda x: (softmax(x) * weight).sum())(x).asnumpy()
    expected = ms.grad(lambda x: (ms.ops.softmax(x, -1) * weight).sum())(x).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found = ms.grad(lambda x: (swap(x) * swapped).sum())(x).asnumpy()
    np.testing.assert_array_equal(found, weight.asnumpy())
