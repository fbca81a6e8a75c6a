"""Block-sparse attention against float64 and a mask of pairs, on every instruction set here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_quant import kernels
from ms_quant.attention.block_attention import block_attention as definition
from ms_quant.attention.operands import in_order
from ms_quant.errors import BadArgumentError
from ms_quant.kernels import Codes, block_attention
from ms_quant.numerics.minifloat import E4M3, decode, encode

ISAS = [name for name in kernels.ISAS if kernels.available() and kernels.has_isa(name)]
pytestmark = pytest.mark.skipif(not ISAS, reason="no C++ compiler at install time")
each_isa = pytest.mark.parametrize("isa", ISAS)


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def pairs(
    shape, blocks=None, block_shape=(128, 128), band=None, first=0, leading=None, kept=None
) -> np.ndarray:
    """Which pairs are kept, bool (B, heads, queries, keys)."""
    queries, keys = shape[2:]
    found = np.ones(shape, bool)
    i, j = np.arange(queries)[:, None], np.arange(keys)
    if blocks is not None:
        found &= blocks[:, :, i // block_shape[0], j // block_shape[1]] != 0
    if band is not None:
        width = band[:, None, None]
        found &= (width < 0) | (abs(i - j) <= width) | (i < first) | (j < first)
    if leading is not None:
        reach = leading[:, None, None]
        found &= (reach < 0) | (i < first) | (j < reach)
    return found if kept is None else found & kept[:, None, None]


def decoded(x: np.ndarray | Codes) -> np.ndarray:
    if not isinstance(x, Codes):
        return x.astype(np.float64)
    tokens, size = x.codes.shape[2:]
    scales = x.scales.repeat(x.block[0], axis=2)[:, :, :tokens]
    numbers = x.codes if x.codes.dtype == np.int8 else decode(x.codes, E4M3)
    return numbers.astype(np.float64) * scales.repeat(x.block[1], axis=3)[..., :size]


def oracle(q, k, v, scale: float, **masks) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and how far float32 may be from it.

    A score is off by less than 32 * 2^-24 of the sum of the magnitudes in it, for the D up to 1024
    that there are; a power by as much as its score, relatively, and so is the sum of all powers.
    """
    q, k, v = (decoded(x) for x in (q, k, v))
    keep = pairs((*q.shape[:3], k.shape[2]), **masks)
    scores = np.where(keep, q @ k.transpose(0, 1, 3, 2) * scale, -np.inf)
    most = scores.max(axis=-1, keepdims=True, initial=-1e300)
    powers = np.exp(scores - most)
    total = powers.sum(axis=-1, keepdims=True)
    weights = powers / np.where(total > 0, total, 1)
    sizes = np.abs(q) @ np.abs(k).transpose(0, 1, 3, 2) * abs(scale)
    off = np.where(keep, sizes, 0).max(axis=-1, keepdims=True, initial=0)
    bound = 64 * (off + 1) * 2**-24 * (weights @ np.abs(v)) + 1e-30
    return weights @ v, bound


def check(q, k, v, scale: float, isa: str, threads: int = 2, **masks) -> np.ndarray:
    found = block_attention(q, k, v, scale=scale, threads=threads, isa=isa, **masks)
    expected, bound = oracle(q, k, v, scale, **masks)
    worst = np.max(np.abs(found - expected) / bound, initial=0)
    assert worst <= 1, worst
    return found


@dataclass(frozen=True)
class Problem:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    masks: dict


@st.composite
def problems(draw) -> Problem:
    """Any number of tokens, heads and numbers, and any of the masks together."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = st.sampled_from([1, 2, 15, 16, 17, 33, 100, 128, 129, 300])
    queries, keys = draw(lengths), draw(lengths)
    size, values = draw(st.sampled_from([1, 3, 16, 30, 64, 128, 200])), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 1 << 20))
    rng = np.random.default_rng(seed)
    masks: dict = {}
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(128, 128), (1, 1), (16, 24), (64, 256), (33, 7), (500, 3)]))
        down, across = -(-queries // shape[0]), -(-keys // shape[1])
        leading = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
        density = draw(st.sampled_from([0.0, 0.2, 0.7]))
        masks["blocks"] = (rng.random((*leading, down, across)) < density).astype(np.uint8)
        masks["block_shape"] = shape
    if draw(st.booleans()):
        masks["band"] = rng.choice([-1, 0, 1, 20, 60, 500], heads).astype(np.int64)
        masks["first"] = draw(st.sampled_from([0, 1, 20, 40, 1000]))
    if draw(st.booleans()):
        masks["leading"] = rng.choice([-1, 0, 1, 20, 500], heads).astype(np.int64)
    if draw(st.booleans()):
        masks["kept"] = rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    q = random((batch, heads, queries, size), seed, draw(st.sampled_from([0.1, 1, 10])))
    k, v = random((batch, heads, keys, size), seed + 1), random((batch, heads, keys, values), seed)
    return Problem(q, k, v, masks)


@each_isa
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_any_masks_together(isa: str, problem: Problem) -> None:
    p = problem
    found = check(p.q, p.k, p.v, p.q.shape[3] ** -0.5, isa, **p.masks)
    none = ~pairs((*p.q.shape[:3], p.k.shape[2]), **p.masks).any(axis=-1)
    assert (found[none] == 0).all()


def heads_inside(x: np.ndarray) -> np.ndarray:
    """The same numbers as (B, tokens, heads, D) has them in memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


@each_isa
@given(
    problem=problems(),
    shared=st.booleans(),
    runs=st.sampled_from([1, 8, 200]),
    inside=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    int8=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_order_is_gather_and_scatter(isa: str, problem: Problem, shared, runs, inside, int8):
    """Bit for bit, whatever lies where in memory; codes are by place already."""
    masks = problem.masks
    k, v = problem.k, problem.v
    q = random(k.shape, k.shape[2])
    batch, heads, tokens, size = k.shape
    rng = np.random.default_rng(tokens)
    order = np.empty((1 if shared else heads, tokens), np.int64)
    for row in order:  # stretches that lie one after the other, too
        cuts = [np.arange(i, min(i + runs, tokens)) for i in range(0, tokens, runs)]
        row[:] = np.concatenate([cuts[i] for i in rng.permutation(len(cuts))])
    if "blocks" in masks:
        down, across = (-(-tokens // side) for side in masks["block_shape"])
        masks["blocks"] = (rng.random((batch, heads, down, across)) < 0.5).astype(np.uint8)
    placed = [in_order(x, order) for x in (q, k, v)]
    given_as = [heads_inside(x) if i else x for x, i in zip((q, k, v), inside, strict=True)]
    if int8:
        for i in range(2):
            given_as[i] = placed[i] = quantized(placed[i], "int8", 48)
    expected = np.empty((*q.shape[:3], v.shape[3]), np.float32)
    for head in range(heads):  # alone, as each may have other padding in its order
        own = {name: x for name, x in masks.items() if name not in ("blocks", "kept")}
        own |= {name: own[name][head : head + 1] for name in ("band", "leading") if name in own}
        if "blocks" in masks:
            own["blocks"] = masks["blocks"][:, head : head + 1].copy()
        if "kept" in masks:
            own["kept"] = np.ascontiguousarray(masks["kept"][:, order[head % len(order)]])
        found = check(*(of_head(x, head) for x in placed), size**-0.5, isa, **own)
        expected[:, head, order[head % len(order)]] = found[:, 0]
    found = block_attention(*given_as, order=order, isa=isa, **masks)
    np.testing.assert_array_equal(found, expected)
    assert (found.strides[1] < found.strides[2]) == (inside[0] and not int8 and heads > 1) or (
        tokens == 1
    )


def of_head(x: np.ndarray | Codes, head: int) -> np.ndarray | Codes:
    if isinstance(x, Codes):
        return replace(x, codes=of_head(x.codes, head), scales=of_head(x.scales, head))
    return np.ascontiguousarray(x[:, head : head + 1])


@each_isa
@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(isa: str, queries: int, keys: int) -> None:
    q, k = random((1, 2, queries, 8), 0), random((1, 2, keys, 8), 1)
    found = block_attention(q, k, k, scale=1, isa=isa)
    assert found.shape == q.shape and not found.any()


def quantized(x: np.ndarray, kind: str, rows: int, columns: int = 128) -> Codes:
    """Codes with the largest number of a block at the end of their range."""
    batch, heads, tokens, size = x.shape
    down, across = -(-tokens // rows), -(-size // columns)
    scales = np.zeros((batch, heads, down, across), np.float32)
    for r in range(down):
        for c in range(across):
            part = x[:, :, r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            scales[:, :, r, c] = np.abs(part).max(axis=(2, 3)) / (127 if kind == "int8" else 448)
    spread = scales.repeat(rows, axis=2)[:, :, :tokens].repeat(columns, axis=3)[..., :size]
    near = x / np.where(spread > 0, spread, 1)
    codes = np.rint(near).astype(np.int8) if kind == "int8" else encode(near, E4M3)
    return Codes(codes, scales, (rows, columns))


@each_isa
@given(
    problem=problems(),
    kinds=st.sampled_from(
        [
            "int8 int8 e4m3",
            "int8 int8 float",
            "e4m3 e4m3 e4m3",
            "int8 float int8",
            "float e4m3 int8",
        ]
    ),
    rows=st.sampled_from([(128, 128), (128, 256), (1, 1), (48, 1000), (1000, 5)]),
    columns=st.sampled_from([128, 32, 1, 1000]),
    per_channel=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_codes(isa: str, problem: Problem, kinds: str, rows, columns, per_channel) -> None:
    operands = []
    tall = (*rows, rows[1])
    for name, x, kind in zip("qkv", (problem.q, problem.k, problem.v), kinds.split(), strict=True):
        if kind == "float":
            operands.append(x)
        elif name == "v" and per_channel:
            operands.append(quantized(x, kind, x.shape[2], 1))
        else:
            operands.append(quantized(x, kind, tall["qkv".index(name)], columns))
    check(*operands, problem.q.shape[3] ** -0.5, isa, **problem.masks)


@each_isa
@pytest.mark.parametrize("size", [7, 128, 1000, 1024])
def test_products_of_codes_are_exact(isa: str, size: int) -> None:
    """Keys whose sums are 0, 1, 2, ... less than the largest there can be, as powers of two."""
    lower, keys = np.arange(20), np.full((1, 1, 20, size), -128, np.int8)
    keys[0, 0, :, 1] = 100 - lower
    q = np.full((1, 1, 33, size), -128, np.int8)
    q[..., 1] = 1
    scale, one = np.float32(np.log(2)), np.ones((1, 1, 1, 1), np.float32)
    assert scale * np.float32(np.log2(np.e)) == 1
    found = block_attention(
        *(Codes(codes, one, (33, 1024)) for codes in (q, keys)),
        np.eye(20, dtype=np.float32)[None, None],
        scale=float(scale),
        isa=isa,
    )
    expected = np.exp2(-lower) / np.exp2(-lower).sum()
    np.testing.assert_allclose(found[0, 0], np.broadcast_to(expected, (33, 20)), rtol=1e-6)


@each_isa
def test_every_e4m3_code(isa: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 256)
    v = Codes(codes, np.full((1, 1, 1, 2), 0.5, np.float32), (1, 128))
    one = np.ones((1, 1, 1, 4), np.float32)
    found = block_attention(one, one, v, isa=isa)
    np.testing.assert_array_equal(found, codes.view(E4M3.dtype).astype(np.float32) / 2)


@each_isa
@pytest.mark.parametrize("int8", [False, True])
def test_threads_change_nothing(isa: str, int8: bool) -> None:
    """Heads with few and with many blocks, a band, padding."""
    q, k, v = (random((2, 3, 300, 40), seed) for seed in range(3))
    if int8:
        q, k = quantized(q, "int8", 64), quantized(k, "int8", 64)
    density = np.array([0.1, 0.9, 0.5])[:, None, None]
    masks = {
        "blocks": (np.random.default_rng(0).random((2, 3, 10, 10)) < density).astype(np.uint8),
        "block_shape": (32, 32),
        "band": np.array([-1, 100, 7]),
        "first": 37,
        "kept": np.random.default_rng(1).random((2, 300)) < 0.9,
    }
    one = check(q, k, v, 0.2, isa, threads=1, **masks)
    for threads in (2, 5):
        again = block_attention(q, k, v, scale=0.2, threads=threads, isa=isa, **masks)
        np.testing.assert_array_equal(again, one)


@each_isa
def test_a_block_is_computed_as_if_it_were_alone(isa: str) -> None:
    q, k, v = (random((1, 1, 256, 64), seed) for seed in range(3))
    blocks = np.eye(2, dtype=np.uint8)[None, None]
    found = block_attention(q, k, v, scale=0.1, blocks=blocks, isa=isa)
    for half in (slice(0, 128), slice(128, 256)):
        own = [np.ascontiguousarray(x[:, :, half]) for x in (q, k, v)]
        np.testing.assert_array_equal(found[:, :, half], block_attention(*own, scale=0.1, isa=isa))


@each_isa
def test_what_is_left_out_is_not_read(isa: str) -> None:
    """NaN in blocks that no query keeps, in padding and beyond a band."""
    q, k, v = (random((1, 2, 300, 32), seed) for seed in range(3))
    kept = np.ones((1, 300), bool)
    kept[:, [5, 6, 299]] = False
    blocks = np.ones((1, 1, 10, 10), np.uint8)
    blocks[..., 3] = 0
    for x in (k, v):
        x[:, :, [5, 6, 299]] = np.nan
        x[:, :, 96:128] = np.inf
    masks = {"blocks": blocks, "block_shape": (32, 32), "kept": kept}
    clean = [np.nan_to_num(x, nan=0, posinf=0) for x in (k, v)]
    found = block_attention(q, k, v, scale=0.2, isa=isa, **masks)
    np.testing.assert_array_equal(found, check(q, *clean, 0.2, isa, **masks))


@each_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_those_of_ieee(isa: str, value: float) -> None:
    q, k, v = random((1, 1, 40, 8), 0), np.abs(random((1, 1, 200, 8), 1)), random((1, 1, 200, 8), 2)
    q[0, 0, :] = np.abs(q[0, 0, :])
    k[0, 0, 150, 3] = value  # its scores are the value itself
    found = block_attention(q, k, v, scale=0.2, isa=isa)
    if value == -np.inf:  # no weight
        kept = np.arange(200)[None] != 150
        expected, bound = oracle(q, np.nan_to_num(k), v, 0.2, kept=kept)
        assert (np.abs(found - expected) <= bound).all()
    else:
        assert np.isnan(found).all()
    q = random((1, 1, 40, 8), 0)
    q[0, 0, 17] = value
    alone = np.isnan(block_attention(q, v[:, :, :40].copy(), v[:, :, :40].copy(), scale=1, isa=isa))
    assert not np.delete(alone, 17, axis=2).any()
    assert alone[0, 0, 17].all()


@each_isa
@pytest.mark.parametrize("spread", [1e-6, 1.0, 30.0, 1e4])
def test_scores_of_any_size(isa: str, spread: float) -> None:
    """Small ones leave all keys equal, large ones only one key."""
    q, k, v = (random((1, 2, 200, 64), seed) for seed in range(3))
    check(q * np.float32(spread), k, v, 0.125, isa)
    check(q, k, v, -0.125 * spread, isa)


@each_isa
def test_powers(isa: str) -> None:
    """A weight is off by a few units in the last place, and by what its score was rounded by."""
    x = np.linspace(-75, 0, 4001, dtype=np.float32)
    keys, values = np.float32([0, 1]), np.float32([[0], [1]])
    found = block_attention(
        x.reshape(1, 1, -1, 1), keys.reshape(1, 1, 2, 1), values[None, None], scale=1, isa=isa
    )[0, 0, :, 0]
    wide = np.exp(x.astype(np.float64))
    kept = x * np.log2(np.e) > -99.999  # less is 0
    expected = np.where(kept, wide / (1 + wide), 0)
    bound = (8 + 2 * np.abs(x)) * 2**-24 * expected
    sure = np.abs(x * np.log2(np.e) + 100) > 1e-3
    assert (np.abs(found - expected)[sure] <= bound[sure]).all()


GOOD = {
    "q": np.zeros((2, 3, 10, 8), np.float32),
    "k": np.zeros((2, 3, 20, 8), np.float32),
    "v": np.zeros((2, 3, 20, 8), np.float32),
    "blocks": np.ones((2, 1, 3, 3), np.uint8),
    "block_shape": (4, 7),
    "band": np.zeros(3, np.int64),
    "leading": np.zeros(3, np.int64),
    "kept": np.ones((2, 20), bool),
}
TWENTY = {"q": GOOD["k"], "blocks": None}
CODES = Codes(np.zeros((2, 3, 20, 8), np.int8), np.ones((2, 3, 2, 1), np.float32), (10, 128))
BAD = [
    ({"q": GOOD["q"].astype(np.float64)}, "q is float64, expected float32"),
    ({"q": GOOD["q"].tolist()}, "q is list, expected float32"),
    ({"k": CODES.codes}, "k is int8, expected float32"),
    ({"q": GOOD["q"][0]}, r"q has shape \(3, 10, 8\), expected \(batch, heads, tokens, size\)"),
    ({"k": GOOD["k"][..., :7].copy()}, r"k has shape \(2, 3, 20, 7\), expected \(2, 3, 20, 8\)"),
    ({"v": GOOD["v"][:, :, 1:].copy()}, r"k has shape \(2, 3, 20, 8\), expected \(2, 3, 19, 8\)"),
    ({"v": GOOD["v"][:1].copy()}, r"v has shape \(1, 3, 20, 8\), expected \(2, 3, 20, 8\)"),
    ({"k": np.zeros((2, 3, 8, 20), np.float32).swapaxes(2, 3)}, "k has strides .*, expected"),
    ({"leading": np.zeros(2, np.int64)}, r"leading has shape \(2,\), expected \(3,\)"),
    ({"order": np.arange(20)[None]}, r"order has shape \(1, 20\) for 10 queries and 20 keys"),
    ({**TWENTY, "order": np.arange(40).reshape(2, 20)}, r"expected \(1 or 3, tokens\)"),
    ({**TWENTY, "order": np.arange(20)[None] // 2}, "order is no permutation, expected each token"),
    ({**TWENTY, "order": np.arange(20)[None] + 1}, "order is no permutation"),
    ({**TWENTY, "order": np.arange(20)[None] - 1}, "order is no permutation"),
    ({**TWENTY, "order": np.arange(20, dtype=np.int32)[None]}, "order is int32, expected int64"),
    ({"blocks": np.ones((2, 1, 3, 3))}, "blocks is float64, expected uint8 or bool"),
    ({"blocks": np.ones((2, 2, 3, 3), np.uint8)}, r"blocks has shape \(2, 2, 3, 3\), expected "),
    ({"blocks": np.ones((2, 3, 3, 2), np.uint8)}, r"expected \(1 or 2, 1 or 3, 3, 3\)"),
    ({"block_shape": (0, 7)}, r"block_shape is \(0, 7\), expected 1 or more"),
    ({"band": np.zeros(3, np.int32)}, "band is int32, expected int64"),
    ({"band": np.zeros(2, np.int64)}, r"band has shape \(2,\), expected \(3,\)"),
    ({"first": -1}, "first is -1, expected 0 or more"),
    ({"kept": np.ones((2, 20), np.uint8)}, "kept is uint8, expected bool"),
    ({"kept": np.ones((2, 19), bool)}, r"kept has shape \(2, 19\), expected \(2, 20\)"),
    ({"isa": "mmx"}, "instruction set 'mmx' is not here"),
    (
        {"v": replace(CODES, codes=CODES.codes.view(np.bool_))},
        "v is bool, expected int8 or uint8",
    ),
    (
        {"v": replace(CODES, block=(20, 128))},
        r"the scale of v has shape \(2, 3, 2, 1\), expected \(2, 3, 1, 1\)",
    ),
    (
        {"v": replace(CODES, block=(0, 8))},
        r"a scale of v is of a block of \(0, 8\), expected 1 or more",
    ),
    (
        {"v": replace(CODES, scales=CODES.scales.astype("f8"))},
        "the scale of v is float64, expected float32",
    ),
]


@pytest.mark.parametrize("changed, sentence", BAD)
def test_bad_arguments(changed: dict, sentence: str) -> None:
    block_attention(**GOOD, scale=1)
    with pytest.raises(BadArgumentError, match=sentence):
        block_attention(**{**GOOD, **changed}, scale=1)


def test_heads_that_are_too_large_are_refused() -> None:
    x = np.zeros((1, 1, 2, 1025), np.float32)
    with pytest.raises(BadArgumentError, match="size of a head of q is 1025, expected up to 1024"):
        block_attention(x, x, x, scale=1)


@given(problem=problems())
@settings(max_examples=25, deadline=None)
def test_the_definition_agrees(problem: Problem) -> None:
    """The same arguments to the NumPy code that says what is computed."""
    p = problem
    blocks = p.masks.get("blocks")
    if blocks is not None:  # of each head there
        shape = (blocks.shape[0], p.q.shape[1], *blocks.shape[2:])
        p.masks["blocks"] = np.broadcast_to(blocks, shape).copy()
    values = random(p.k.shape, 7)  # of as many numbers as keys, there
    if p.q.shape == p.k.shape:
        p.masks["order"] = np.random.default_rng(0).permutation(p.q.shape[2])[None]
    expected = definition(p.q, p.k, values, **p.masks)
    found = block_attention(p.q, p.k, values, **p.masks)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_definition_has_the_same_arguments() -> None:
    kernel, numpy = (signature(f).parameters.values() for f in (block_attention, definition))
    assert [(x.name, x.default) for x in kernel] == [(x.name, x.default) for x in numpy]
