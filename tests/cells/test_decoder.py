"""The decoder under jit, and with a key-value cache, against the plain forward."""

from __future__ import annotations

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from ms_quant import kernels  # noqa: E402
from ms_quant.budget import Budget  # noqa: E402
from ms_quant.cells import decoder, direct, layers  # noqa: E402
from ms_quant.cells.decoder import (  # noqa: E402
    DecoderBlock,
    causal_mask,
    rope_tensors,
)
from ms_quant.cells.kv_cache import KeyValueCache  # noqa: E402
from ms_quant.kernels import matrix  # noqa: E402
from ms_quant.models import attention as on_arrays  # noqa: E402
from ms_quant.models.config import parse_config  # noqa: E402

CONFIG = parse_config(
    {
        "model_type": "qwen3",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 16,
    }
)
LENGTH = 7


@pytest.fixture(params=[True, False], ids=["native", "mindspore"], autouse=True)
def native(request, monkeypatch) -> bool:
    """Whether Cells call native kernels: both ways compute the same."""
    if request.param and not kernels.available():
        pytest.skip("no C++ compiler at install time")
    for module in (decoder, direct, layers):
        monkeypatch.setattr(module, "has_kernels", lambda: request.param)
    return request.param


@pytest.fixture(scope="module")
def block() -> DecoderBlock:
    block, rng = DecoderBlock(CONFIG), np.random.default_rng(0)
    for parameter in block.get_parameters():
        values = rng.normal(1.0 if parameter.ndim == 1 else 0.0, 0.3, parameter.shape)
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    return block


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, LENGTH, 24)).astype(np.float32)


def plain(block: DecoderBlock, hidden: np.ndarray) -> np.ndarray:
    cos, sin = rope_tensors(CONFIG, 0, hidden.shape[1])
    return block(ms.Tensor(hidden), cos, sin, causal_mask(hidden.shape[1])).asnumpy()


def test_jit_gives_the_same(block, hidden):
    cos, sin = rope_tensors(CONFIG, 0, LENGTH)
    mask = causal_mask(LENGTH)

    @ms.jit
    def run(x):
        return block(x, cos, sin, mask)

    found = run(ms.Tensor(hidden)).asnumpy()
    np.testing.assert_allclose(found, plain(block, hidden), rtol=1e-5, atol=1e-5)


def test_a_cache_gives_the_same_token_by_token(block, hidden):
    cache, outputs = KeyValueCache(), []
    for position in range(LENGTH):
        cos, sin = rope_tensors(CONFIG, position, position + 1)
        mask = causal_mask(position + 1)[:, :, position:]
        x = ms.Tensor(hidden[:, position : position + 1])
        outputs.append(block(x, cos, sin, mask, cache).asnumpy())
    assert cache.length == LENGTH
    found = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(found, plain(block, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not kernels.has_product(), reason="no AMX")
def test_products_on_amx_give_the_same(block, hidden, monkeypatch):
    expected, product, seen = plain(block, hidden), matrix.product, []
    monkeypatch.setattr(matrix, "MANY_ROWS", 1)
    monkeypatch.setattr(matrix, "product", lambda x, *a: seen.append(len(x)) or product(x, *a))
    np.testing.assert_allclose(plain(block, hidden), expected, rtol=1e-5, atol=1e-5)
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
def test_slices_of_queries_give_the_same(block, hidden, monkeypatch, native, queries):
    whole = plain(block, hidden)
    budget = Budget(score_bytes=queries * 4 * 2 * CONFIG.num_heads * LENGTH)
    sliced = DecoderBlock(CONFIG, budget=budget)
    ms.load_param_into_net(sliced, block.parameters_dict())
    holder, name = (on_arrays, "_attend_slice") if native else (sliced.self_attn, "attend_slice")
    seen, attend = [], getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda q, *a: seen.append(q) or attend(q, *a))
    np.testing.assert_allclose(plain(sliced, hidden), whole, rtol=1e-5, atol=1e-5)
    assert sum(q.shape[2] for q in seen) == LENGTH
    assert max(q.shape[2] for q in seen) == queries


def test_native_kernels_compute_what_mindspore_does(block, hidden, monkeypatch, native):
    found = plain(block, hidden)
    for module in (decoder, direct, layers):
        monkeypatch.setattr(module, "has_kernels", lambda: not native and kernels.available())
    np.testing.assert_allclose(plain(block, hidden), found, rtol=1e-5, atol=1e-5)


def test_padding_keys_change_nothing(block, hidden):
    """Tokens that are masked as keys may hold anything."""
    attention = np.ones((2, LENGTH), int)
    attention[1, :3] = 0
    cos, sin = rope_tensors(CONFIG, 0, LENGTH)
    mask = causal_mask(LENGTH, attention)
    other = hidden.copy()
    other[1, :3] = 5.0
    first, second = (block(ms.Tensor(x), cos, sin, mask).asnumpy()[1, 3:] for x in (hidden, other))
    np.testing.assert_array_equal(first, second)


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
