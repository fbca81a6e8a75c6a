"""Several texts at once: what is computed of each is what is computed of it alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed_models import DEEPSEEK, QWEN, save_routed

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.decoder import Decoder
from ms_quant.evaluation.generation import Generator
from ms_quant.formats.opening import open_model
from ms_quant.models.linear_forward import ReadWhenCalled
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.pipeline.options import split_options
from ms_quant.pipeline.run import QuantizeOptions, run_job

SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("float", {}),
    ("W8A8", {"algorithm": "smoothquant"}),
    ("W8A8_MIX", {}),
    ("W8A8_DYNAMIC", {"kv_cache": "C8"}),
    ("W8A16", {"group_size": 32, "symmetric": False}),
    ("W8A16", {}),
    ("W4A16", {"group_size": 64}),
    ("W4A8_DYNAMIC", {"group_size": 32}),
    ("W4A4_DYNAMIC", {"algorithm": "quarot"}),
    ("W4A4_FLATQUANT_DYNAMIC", {"algorithm": "flatquant", "steps": 2}),
    ("W8A8FP8_DYNAMIC", {}),
    ("W4A4_MXFP4_DUALSCALE", {}),
    ("W4A4_MXFP4_SVD", {"rank": 4}),
]


@pytest.fixture
def checkpoint(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> Callable[..., Path]:
    """A checkpoint of a scheme."""

    def make(scheme: str, options: dict[str, Any]) -> Path:
        shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        source = tiny_model(family="qwen2", layers=2, **shape)
        if scheme == "float":
            return source
        options = {**options}
        request = QuantizeOptions(
            source,
            tmp_path / "out",
            scheme,
            options.pop("algorithm", DEFAULTS.algorithm),
            kv_cache=options.pop("kv_cache", DEFAULTS.kv_cache),
            **split_options(options),
        )
        with suppress(MsQuantError):  # most need no data, and refuse it
            run_job(request)
            return tmp_path / "out"
        run_job(replace(request, calib=calib_text, samples=2, seq_len=16))
        return tmp_path / "out"

    return make


def alone(decoder: Decoder, prompt: np.ndarray, steps: int) -> list[np.ndarray]:
    """The logits of each new token of a text that nobody is beside."""
    text = decoder.begin()
    found = [decoder.prefill(text, prompt)]
    while len(found) < steps:
        found.append(decoder.step([int(found[-1].argmax())], [text])[0])
    return found


def together(
    decoder: Decoder, prompts: list[np.ndarray], steps: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """The same of texts that join at any step, are left out of some, and leave, in any order."""
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    texts: dict[int, Any] = {}
    waiting = list(rng.permutation(len(prompts)))
    while waiting or texts:
        if waiting and (not texts or rng.random() < 0.5):
            which = int(waiting.pop())
            texts[which] = decoder.begin(int(rng.integers(1, 40)))
            found[which].append(decoder.prefill(texts[which], prompts[which]))
        some = [which for which in rng.permutation(list(texts)) if rng.random() < 0.8]
        if some:
            tokens = [int(found[which][-1].argmax()) for which in some]
            logits = decoder.step(tokens, [texts[which] for which in some])
            for which, row in zip(some, logits, strict=True):
                found[which].append(row)
        for which in [which for which in texts if len(found[which]) >= steps]:
            del texts[which]
    return found


def require_the_same(decoder: Decoder, seed: int, texts: int = 9, steps: int = 7) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = min(250, decoder.config.vocab_size)
    prompts = [rng.integers(0, vocabulary, rng.integers(1, 30)) for _ in range(texts)]
    found = together(decoder, prompts, steps, rng)
    for prompt, ours in zip(prompts, found, strict=True):
        for step, (row, expected) in enumerate(
            zip(ours, alone(decoder, prompt, steps), strict=False)
        ):
            np.testing.assert_array_equal(row, expected, f"{len(prompt)} tokens, step {step}")


@pytest.mark.parametrize(
    ("scheme", "options"), SCHEMES, ids=[f"{s}{''.join(map(str, o.values()))}" for s, o in SCHEMES]
)
def test_a_text_does_not_see_the_others(checkpoint, scheme, options):
    decoder = Decoder(open_model(checkpoint(scheme, options)))
    for seed in range(3):
        require_the_same(decoder, seed)


@pytest.mark.parametrize("kind", ["float", "C8_DYNAMIC"])
def test_nor_by_any_cache(checkpoint, kind):
    require_the_same(Decoder(open_model(checkpoint("float", {})), kind), 0)


@pytest.mark.parametrize("config", [QWEN, DEEPSEEK], ids=["experts", "latent"])
@pytest.mark.parametrize("scheme", ["float", "W8A8_DYNAMIC", "W8A16"])
def test_experts_and_latent_attention(config, scheme, tmp_path):
    source = save_routed(tmp_path / "model", config)
    if scheme != "float":
        run_job(QuantizeOptions(source, tmp_path / "out", scheme))
        source = tmp_path / "out"
    decoder = Decoder(open_model(source))
    for seed in range(2):
        require_the_same(decoder, seed)


def test_experts_that_are_read_when_tokens_come(tmp_path, monkeypatch):
    """The bits of experts in memory are those of experts on disk."""
    model = open_model(save_routed(tmp_path / "model", QWEN))
    held = Decoder(model)
    from ms_quant.budget import Budget
    from ms_quant.evaluation import decoder as module
    from ms_quant.evaluation.float32_forward import load_block

    monkeypatch.setattr(
        module, "load_block", lambda m, index: load_block(m, index, Budget(expert_bytes=0))
    )
    read = Decoder(model)
    assert any(isinstance(one, ReadWhenCalled) for one in read.first[-1].linears.values())
    require_the_same(read, 0, texts=3, steps=3)
    prompt = np.arange(9)
    for ours, theirs in zip(alone(read, prompt, 4), alone(held, prompt, 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_generate_says_what_a_batch_says(checkpoint):
    model = open_model(checkpoint("W8A8_DYNAMIC", {}))
    prompts = [np.arange(1, 2 + i) for i in range(6)]
    found = together(Decoder(model), prompts, 8, np.random.default_rng(3))
    for prompt, rows in zip(prompts, found, strict=True):
        tokens = list(Generator(model, stops=()).generate(prompt, 8))
        assert tokens == [int(row.argmax()) for row in rows[: len(tokens)]]


def test_a_prompt_of_every_token(checkpoint):
    """The logits of all positions, the last of them those of generation."""
    decoder = Decoder(open_model(checkpoint("W8A8_DYNAMIC", {})))
    prompt = np.arange(40, 63)
    every = decoder.prefill_all(decoder.begin(), prompt)
    last = decoder.prefill(decoder.begin(), prompt)
    np.testing.assert_array_equal(every(slice(22, 23))[0], last)
    np.testing.assert_array_equal(every(slice(0, 23))[22], last)
    for stop in (1, 7):  # what comes after a position does not change it, but for the last bits
        shorter = decoder.prefill(decoder.begin(), prompt[:stop])
        np.testing.assert_allclose(every(slice(stop - 1, stop))[0], shorter, atol=2e-2)


def test_what_ends_a_prompt_early_is_passed_on(checkpoint):
    class GoneError(Exception):
        pass

    def between() -> None:
        raise GoneError

    decoder = Decoder(open_model(checkpoint("float", {})))
    with pytest.raises(GoneError):
        decoder.prefill(decoder.begin(), np.arange(5), between)
    with pytest.raises(MsQuantError, match="the prompt has no tokens"):
        decoder.prefill(decoder.begin(), np.arange(0))
