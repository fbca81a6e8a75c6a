"""What an analysis of attention says, against what is computed one mode at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, nn

import ms_quant
from ms_quant.analysis.attention import AttentionError, AttentionSensitivity
from ms_quant.attention.dense import attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.sparse import attend
from ms_quant.cells.diffusion import attention_sites
from ms_quant.cells.diffusion.plan import attention_plan
from ms_quant.errors import MsQuantError
from ms_quant.serve.attention import ranges
from ms_quant.timestep import TimestepManager

HEADS, SIZE, SHAPE = 2, 16, (8, 4, 4)
SPARSE = {"sparse": "rf_v3", "sparsity": 0.5, "block_shape": (16, 16), "latent_shape": SHAPE}


@pytest.fixture(autouse=True)
def unset(blocking_mindspore) -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx(None)


class Attention(nn.Cell):
    fa_quant = None

    def __init__(self, gain: float):
        super().__init__()
        self.heads, self.head_dim, self.gain = HEADS, SIZE, gain

    def construct(self, x):
        q = x * self.gain
        return self.fa_quant(q, x, x, layout="BNSD") if self.fa_quant else x


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Attention(1.0), Attention(3.0)])

    def construct(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


RNG = np.random.default_rng(3)
X = RNG.standard_normal((1, HEADS, 128, SIZE), np.float32)


def sample(network):
    for step in (0, 1):
        with TimestepManager.at(step):
            network(Tensor(X * (1 + step)))


def inputs(step: int) -> list[np.ndarray]:
    """What comes to the two attentions of a float network in a step."""
    first = X * np.float32(1 + step)
    return [first, first + attention(first, first, first)]


def relative(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def test_errors_are_those_of_each_mode_in_the_float_network():
    network = Network()
    found = ms_quant.analyze_attention(network, sample, ["FP8_DYNAMIC", SPARSE])
    assert found.modes == ("FP8_DYNAMIC", "rf_v3 0.5")
    assert found.layers == ("blocks.0", "blocks.1") and found.steps == (0, 1)
    assert len(found.calls) == 8
    rule, grid = SparseRule("rf_v3", 0.5, block_shape=(16, 16)), TokenGrid.of(SHAPE, 128)
    rotation = walsh_rotation(SIZE)
    for call in found.calls:
        x = inputs(call.step or 0)[found.layers.index(call.layer)]
        q = x * np.float32(1 if call.layer == "blocks.0" else 3)
        exact = attention(q, x, x)
        if call.mode == "FP8_DYNAMIC":
            other, density = fa_quant(q, x, x, rotation, rotation), 1.0
        else:
            mask = make_mask(rule, q, x, grid)
            other, density = attend(q, x, x, mask), float(mask.density().mean())
            assert call.densities == tuple(mask.density()[0])
            assert call.kinds == mask.names == ("windows", "windows")
        np.testing.assert_allclose(call.heads, relative(other, exact)[0], rtol=1e-3)
        assert call.density == pytest.approx(density)
    assert all(site.cell.fa_quant is None for site in attention_sites(network))  # as it was


def test_names_of_a_mapping_and_a_table():
    found = ms_quant.analyze_attention(Network(), sample, {"eight bits": "INT8_DYNAMIC"})
    assert found.modes == ("eight bits",)
    text = str(found)
    assert "eight bits: density 1.00" in text and "blocks.1" in text and "step 1" in text
    assert max(map(len, text.splitlines())) <= 80


def test_it_goes_to_a_file_and_back(tmp_path):
    found = ms_quant.analyze_attention(Network(), sample, ["MIX", SPARSE])
    found.save(tmp_path / "found.json")
    assert AttentionSensitivity.load(tmp_path / "found.json") == found
    for text in ('{"version": 1}', '{"version": 1, "calls": [{"layer": "a"}]}', "[]"):
        (tmp_path / "found.json").write_text(text)
        with pytest.raises(MsQuantError, match=r"found\.json"):
            AttentionSensitivity.load(tmp_path / "found.json")


def test_a_heat_map_says_what_each_head_is():
    calls = [
        AttentionError("b.0", 0, "m", (0.1, 0.3), 0.75, (0.5, 1.0), ("temporal", "dense")),
        AttentionError("b.0", 1, "m", (0.3, 0.3), 0.75, (0.7, 0.8), ("spatial", "dense")),
        AttentionError("b.0", 2, "m", (0.2, 0.3), 0.75, (0.6, 0.6), ("spatial", "spatial")),
        AttentionError("b.1", 0, "m", (0.2, 0.2)),
    ]
    found = AttentionSensitivity(tuple(calls))
    wanted = {
        "mode": "m",
        "layers": ["b.0", "b.1"],
        "errors": [[0.2, 0.3], [0.2, 0.2]],
        "densities": [[0.6, 0.8], [1.0, 1.0]],
        "kinds": [["spatial", "dense"], ["", ""]],
    }
    heat = found.heat_map("m")
    for key in ("errors", "densities"):
        np.testing.assert_allclose(heat.pop(key), wanted.pop(key))
    assert json.loads(json.dumps(heat)) == wanted
    assert "heads: 0 spatial 0.60, 1 dense 0.80" in str(found)


def test_what_is_recommended_makes_a_network_so():
    """The first 3 of 8 steps are float, and layers that are off by more; one call takes it all."""
    network = Network()
    network.unused = nn.Dense(SIZE, SIZE)  # quantize asks for one linear at least

    def longer(network):
        for step in range(8):
            with TimestepManager.at(step):
                network(Tensor(X * (1 + step)))

    found = ms_quant.analyze_attention(network, longer, ["FP8_DYNAMIC", SPARSE])
    advice = found.recommend("FP8_DYNAMIC", most=0.5)
    assert advice.steps == (0, 1, 2) and advice.layers == () and advice.count == 8
    assert found.keep_float("FP8_DYNAMIC", most=0.5).steps == ()
    made = ms_quant.quantize(network, lambda path, cell: None, attention=advice.attention())
    longer(made)
    for row in ms_quant.attention_summary(made):
        assert row.calls == {"FLOAT (dense step)": 3, "FP8_DYNAMIC": 5}
    thinned = found.recommend("rf_v3 0.5", most=9).attention()["blocks.1"]
    plan = attention_plan(thinned, "x")
    assert plan.sparse == SparseRule("rf_v3", 0.5, block_shape=(16, 16))
    assert plan.latent_shape == SHAPE and plan.window.refresh == 1
    assert plan.float_steps == (0, 1, 2)


def table(errors: dict[tuple[int, int], float]) -> AttentionSensitivity:
    return AttentionSensitivity(
        tuple(AttentionError(f"b.{layer}.attn", s, "m", (e,)) for (layer, s), e in errors.items())
    )


def test_what_stays_float_is_what_is_off():
    errors = {(layer, step): 0.01 for layer in range(4) for step in range(5)}
    errors |= {(2, step): 0.3 for step in range(5)}  # a layer that is always off
    errors |= {(layer, 0): 0.2 for layer in range(4)}  # the first step
    kept = table(errors).keep_float("m", 0.05)
    assert kept.layers == ("b.2.attn",) and kept.steps == (0,)
    assert kept.vllm_omni() == {
        "--diffusion-kv-cache-skip-layers": "2",
        "--diffusion-kv-cache-skip-steps": "0",
    }
    assert table(errors).keep_float("m", 0.5).vllm_omni() == {}
    every = table(errors).keep_float("m", 0.001)
    assert len(every.layers) == 4 or len(every.steps) == 5
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == ""


@pytest.mark.parametrize(
    ("modes", "loop", "reason"),
    [
        ([], sample, "modes: none, expected"),
        (["INT8"], sample, "INT8 has static scales"),
        (["FP9"], sample, "kind 'FP9', expected one of|FP9"),
        (["MIX"], lambda network: None, "sample: called no self attention"),
        ([SPARSE], lambda network: network(Tensor(X)), "blocks.0: no timestep is set"),
    ],
)
def test_what_cannot_be_analysed_is_refused(modes, loop, reason):
    network = Network()
    with pytest.raises(MsQuantError, match=reason):
        ms_quant.analyze_attention(network, loop, modes)
    assert all(site.cell.fa_quant is None for site in attention_sites(network))


def test_a_wrong_mode_or_layer_is_named():
    found = table({(0, 0): 0.1})
    with pytest.raises(MsQuantError, match="mode: 'x', expected one of m"):
        found.by_layer("x")
    with pytest.raises(MsQuantError, match=r"layer: 'x', expected one of b\.0\.attn"):
        found.by_head("m", "x")
    with pytest.raises(MsQuantError, match="most: 0, expected"):
        found.keep_float("m", 0)
