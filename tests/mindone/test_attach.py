"""Attention of mindone's networks is found, taken over and given back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from mindspore import Tensor, ops
from networks import NETWORKS, TEXT, run
from shims import attention

from ms_quant.cells.diffusion import (
    attach_attention,
    attention_sites,
    attention_summary,
    detach_attention,
)
from ms_quant.errors import MsQuantError
from ms_quant.recipe.patterns import matches


class Recorder:
    """Computes dense attention as the network does, and keeps what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, q, k, v, *, layout, mask, scale, call):
        self.seen.append((q, k, v, layout, mask, scale, call))
        if layout == "BNSD":
            return attention(q, k, v, mask, scale=scale)
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        return attention(q, k, v, mask, scale=scale).permute(0, 2, 1, 3)


def tokens_and_text(known) -> tuple[int, int]:
    return int(np.prod(known.latent_shape)), 0 if known.text == "none" else TEXT


def test_sites(known):
    network = known.build()
    sites = {site.path: site for site in attention_sites(network)}
    own = {path for path in sites if matches(path, known.own)}
    left = {path for path in sites if matches(path, known.left)}
    assert own and own | left == set(sites)
    for path in own:
        assert sites[path].is_self and sites[path].family == known.family
        assert (sites[path].heads, sites[path].head_size) == (2, 64)
        expected = "none" if path.endswith("0.attn2") else known.text
        assert sites[path].tokens == expected
    assert not any(sites[path].is_self for path in left)


def test_an_attention_that_does_nothing_changes_nothing(known):
    network, inputs = known.build(), known.inputs()
    before, recorder = run(network, inputs), Recorder()
    processors = {s.path: s.cell.get_processor() for s in attention_sites(network)}
    attributes = {s.path: dict(vars(s.cell)) for s in attention_sites(network)}
    attach_attention(network, lambda site: recorder)
    during = run(network, inputs)
    if known.family == "dispatch":
        np.testing.assert_array_equal(during, before)
    else:
        np.testing.assert_allclose(during, before, rtol=0, atol=1e-6 * np.abs(before).max())
    own = [s.path for s in attention_sites(network) if matches(s.path, known.own)]
    assert [seen[-1].path for seen in recorder.seen] == own
    detach_attention(network)
    np.testing.assert_array_equal(run(network, inputs), before)
    assert len(recorder.seen) == len(own)
    for site in attention_sites(network):
        assert site.cell.get_processor() is processors[site.path]
        assert vars(site.cell).keys() == attributes[site.path].keys()


def test_functions_are_given_the_shape_of_the_picture_and_the_side_of_the_text(known):
    network, recorder = known.build(), Recorder()
    attach_attention(network, lambda site: recorder)
    run(network, known.inputs())
    video, text = tokens_and_text(known)
    for q, _, _, layout, mask, _, call in recorder.seen:
        assert call.latent_shape == known.latent_shape
        dual = call.path.endswith("0.attn2")  # of SD3, over the picture alone
        length = video + (0 if dual else text)
        assert q.shape == ((1, 2, length, 64) if layout == "BNSD" else (1, length, 2, 64))
        if known.name.startswith("Hunyuan"):
            kept = mask.asnumpy().reshape(-1)
            assert kept[: video + 12].all() and not kept[video + 12 :].any()
        else:
            assert mask is None


def test_text_is_on_the_side_that_the_table_says(known):
    """Other text changes the queries of the first block at the text's places alone."""
    if known.text == "none":
        pytest.skip("its self attention has no text")
    video, text = tokens_and_text(known)
    firsts = []
    for seed in (2, 9):
        network, recorder, inputs = known.build(), Recorder(), known.inputs()
        shape = inputs["encoder_hidden_states"].shape
        other = np.random.default_rng(seed).standard_normal(shape).astype("f4")
        inputs["encoder_hidden_states"] = Tensor(other)
        attach_attention(network, lambda site, recorder=recorder: recorder)
        run(network, inputs)
        v, layout = recorder.seen[0][2], recorder.seen[0][3]
        firsts.append(v.asnumpy() if layout == "BSND" else v.asnumpy().swapaxes(1, 2))
    changed = (firsts[0] != firsts[1]).any(axis=(0, 2, 3))
    places = slice(None, text) if known.text == "first" else slice(video, None)
    if known.name.startswith("Hunyuan"):  # its picture's modulation is of time alone, too
        assert changed[video:].all()
    expected = np.zeros(video + text, bool)
    expected[places] = True
    np.testing.assert_array_equal(changed, expected)


def test_the_networks_own_attention_is_at_hand(known):
    network, inputs = known.build(), known.inputs()
    before = run(network, inputs)
    attach_attention(network, lambda site: lambda q, k, v, *, call, **_: call.original(q, k, v))
    np.testing.assert_array_equal(run(network, inputs), before)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_a_deep_copy_has_hooks_of_its_own(name):
    known = NETWORKS[name]
    network, inputs = known.build(), known.inputs()
    before = run(network, inputs)
    attach_attention(network, lambda site: lambda q, k, v, **_: ops.zeros_like(v))
    changed = run(network, inputs)
    assert not np.array_equal(changed, before)
    twin = copy.deepcopy(network)
    np.testing.assert_array_equal(run(twin, inputs), changed)
    detach_attention(twin)
    np.testing.assert_array_equal(run(twin, inputs), before)
    np.testing.assert_array_equal(run(network, inputs), changed)


def test_a_backend_that_is_set_later_is_that_of_the_other_calls():
    known = NETWORKS["Wan"]
    network, inputs, recorder = known.build(), known.inputs(), Recorder()
    attach_attention(network, lambda site: recorder)
    network.set_attention_backend("_native_math")
    run(network, inputs)
    assert len(recorder.seen) == 2


def test_the_table_says_what_is_float_and_why():
    network = NETWORKS["Wan"].build()
    attach_attention(network, lambda site: Recorder(), layers=["blocks.0.*"])
    assert "none yet" in str(attention_summary(network))
    run(network, NETWORKS["Wan"].inputs())
    rows = {row.path: row for row in attention_summary(network)}
    assert rows["blocks.0.attn1"].attention == "Recorder"
    assert rows["blocks.0.attn2"].reason == "cross"
    assert rows["blocks.1.attn1"].reason == "not chosen"
    assert rows["blocks.0.attn1"].calls == {"Recorder": 1}


def test_pictures_of_several_sizes_are_told_apart():
    """As QwenImage's editing has them: the pictures follow each other, after the text."""
    network, recorder = NETWORKS["QwenImage"].build(), Recorder()
    inputs = NETWORKS["QwenImage"].inputs()
    inputs["img_shapes"] = [[(1, 8, 16), (1, 16, 8)]]
    attach_attention(network, lambda site: recorder)
    run(network, inputs)
    assert recorder.seen[0][-1].latent_shape == ((1, 8, 16), (1, 16, 8))


def test_an_attention_with_an_image_adapter_stays_float_and_says_why():
    from mindone.diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    network = NETWORKS["Flux"].build()
    first, *_ = attention_sites(network)
    first.cell.set_processor(FluxIPAdapterAttnProcessor(128, 32))
    attach_attention(network, lambda site: Recorder())
    rows = {row.path: row.reason for row in attention_summary(network)}
    said = "its processor FluxIPAdapterAttnProcessor is a Cell"
    assert rows.pop(first.path) == said and set(rows.values()) == {""}
    detach_attention(network)
    with pytest.raises(
        MsQuantError, match=rf"{first.path} \(FluxAttention\) is left float \({said}"
    ):
        attach_attention(network, lambda site: Recorder(), layers=[first.path])


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["blocks.*.attention"], "matches no attention"),
        (["blocks.*.attn2"], r"is left float \(cross\)"),
    ],
)
def test_zero_matches_are_refused(layers, said):
    network = NETWORKS["Wan"].build()
    with pytest.raises(MsQuantError, match=said):
        attach_attention(network, lambda site: Recorder(), layers=layers)


def test_classes_are_matched():
    network = NETWORKS["Flux"].build()
    attach_attention(network, lambda site: Recorder(), layers=["*Attention"])
    assert all(row.attention == "Recorder" for row in attention_summary(network))
