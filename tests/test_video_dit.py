"""The video diffusion transformer in the tree: its files, its Cells, and how they are sampled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
import moving_shapes
import video_dit
import video_measures

from ms_quant import TimestepManager
from ms_quant.attention.dense import attention as dense_attention

pytestmark = pytest.mark.usefixtures("any_timesteps")
ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "moving-shapes-dit"
CARD = json.loads((MODEL / "training.json").read_text())


@pytest.fixture(scope="module")
def network():
    return video_dit.load()


def test_its_files_are_small_and_of_the_shape_that_the_card_says(network):
    assert (MODEL / "model.safetensors").stat().st_size < 2e6
    assert sum(p.size for p in network.get_parameters()) == CARD["parameters"]
    card = (MODEL / "README.md").read_text()
    assert f"{CARD['parameters']:,} parameters" in card
    assert CARD["command"] in card and f"| {CARD['held_out_loss']['0.5']} |" in card


def test_cells_compute_what_the_trained_network_does(network):
    """float32 sums in another order: 3e-6 of outputs up to 3 is what was seen."""
    stored = np.load(ROOT / "tests" / "golden" / "video_dit.npz")
    x = stored["x"].astype(np.float32)
    found = network(*(ms.Tensor(part) for part in (x, stored["time"], stored["words"]))).asnumpy()
    assert np.abs(found - stored["velocity"]).max() < 2e-5


def test_the_loss_on_held_out_clips_is_that_of_the_card(network):
    """Four clips of the card's 32, which differ among themselves."""
    videos, words = moving_shapes.clips(4, video_measures.HELD_OUT)
    tokens, eps = moving_shapes.to_tokens(videos), moving_shapes.noise(4, video_measures.HELD_OUT)
    half = ms.Tensor(((tokens + eps) / 2).astype(np.float32))
    at = ms.Tensor(np.full(4, 0.5, np.float32))
    velocity = network(half, at, ms.Tensor(words)).asnumpy()
    loss = np.mean((velocity - (eps - tokens)) ** 2)
    assert loss == pytest.approx(CARD["held_out_loss"]["0.5"], rel=0.25)


def test_heads_look_where_the_card_says(network):
    """Two of the card's clips at its times: shares are within 0.1 of its means."""
    seen = []

    def look(q, k, v, layer, step):
        seen.append((layer, q, k))
        return dense_attention(q, k, v)

    video_dit.attach(network, look)
    video_measures.velocities(network, 2)
    frame, down, across = (at.ravel() for at in np.indices(moving_shapes.GRID))
    near = (abs(down[:, None] - down) <= 1) & (abs(across[:, None] - across) <= 1)
    own = frame[:, None] == frame
    text = moving_shapes.TEXT
    for row in CARD["heads"]:
        calls = [(q[:, row["head"]], k[:, row["head"]]) for n, q, k in seen if n == row["block"]]
        q, k = (np.concatenate(parts) for parts in zip(*calls, strict=True))
        p = np.exp(q[:, text:] @ k.swapaxes(1, 2) / 4)
        p = (p / p.sum(-1, keepdims=True))[..., text:]
        assert (p * near).sum(-1).mean() == pytest.approx(row["place"], abs=0.1)
        assert (p * own).sum(-1).mean() == pytest.approx(row["own_frame"], abs=0.1)
    names = [row["name"] for row in CARD["heads"]]
    assert names.count("temporal") >= 2 and names.count("spatial") >= 2


def test_an_attached_attention_is_told_layer_and_denoising_step():
    """The step is that of the loop: a shipped adaptation passed the number of the block."""
    network, calls = video_dit.load(), []

    def look(q, k, v, layer, step):
        calls.append((step, layer, q.shape))
        return dense_attention(q, k, v)

    start, words = moving_shapes.noise(1, 0), moving_shapes.words("disk red square cyan")[None]
    own = video_dit.sample(network, start, words, steps=3)
    video_dit.attach(network, look)
    attached = video_dit.sample(network, start, words, steps=3)
    assert calls == [(step, layer, (1, 4, 516, 16)) for step in range(3) for layer in range(4)]
    assert video_measures.relative_l2(attached, own) < 1e-5
    assert TimestepManager.get_timestep_idx() is None


def test_patches_are_put_back_where_they_were():
    videos, _ = moving_shapes.clips(2, 5)
    tokens = moving_shapes.to_tokens(videos)
    assert tokens.shape == (2, 512, 12)
    assert np.array_equal(moving_shapes.to_videos(tokens), videos)
    # token (frame 3, row 2, column 5) holds pixels (4..5, 10..11)
    assert np.array_equal(tokens[1, 3 * 64 + 2 * 8 + 5], videos[1, 3, 4:6, 10:12].ravel())


def test_clips_are_what_their_words_say():
    """The shape in front has the colour of the last word, beside the tint and a little noise."""
    videos, words = moving_shapes.clips(8, 3)
    for video, prompt in zip(videos, words, strict=True):
        colour = 1.2 * np.array(moving_shapes.COLOURS[moving_shapes.WORDS[prompt[3]]])
        distance = np.abs(video - colour).max(axis=-1)
        assert (distance.min(axis=(1, 2)) < 1.3).all()
    again, _ = moving_shapes.clips(8, 3)
    assert np.array_equal(again, videos)


@pytest.mark.parametrize("prompt", ["disk red disk", "red disk square cyan", "disk red disk pink"])
def test_a_prompt_of_other_words_is_refused(prompt):
    with pytest.raises(ValueError, match=f"prompt: '{prompt}', expected kind, colour, kind and"):
        moving_shapes.words(prompt)


def test_measures():
    """Two clips: the first at 20 dB, which is 20 log10(4 / 0.4), the second at 40."""
    exact = np.array([[0.0, 1.0, 2.0, 4.0]] * 2)
    found = exact + np.array([[0.4, -0.4, 0.4, -0.4], [0.04, 0.04, -0.04, -0.04]])
    assert video_measures.psnr(found, exact) == pytest.approx(30)
    assert video_measures.relative_l2(found[:1], exact[:1]) == pytest.approx(0.8 / 21**0.5)
    assert video_measures.cosine(2 * exact, exact) == pytest.approx(1)
    assert video_measures.psnr(exact, exact) == np.inf
