"""How the predictions of two models agree, against the definition."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ms_quant
from ms_quant.evaluation.divergence import agreement
from ms_quant.evaluation.perplexity import measure

TOKENS = np.arange(3 * 10, dtype=np.int32).reshape(3, 10)


def pieces(head: np.ndarray, step: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(head), step):
        yield start, head[start : start + step]


def slow(logits: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum p (log p - log q), p of the other, in float64."""
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (exact, logits))
    return (np.exp(p) * (p - q)).sum(axis=1), logits.argmax(axis=1) == exact.argmax(axis=1)


@pytest.mark.parametrize("steps", [(50, 50), (7, 50), (7, 11)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_divergence_is_that_of_the_definition(steps: tuple[int, int], scale: float) -> None:
    """Hidden sizes differ, and pieces of the heads end at different rows. Logits are float32 sums
    of 16 products of up to 20 * 3: 2^-24 * 16 * 60 of error at most."""
    draw = np.random.default_rng(0)
    sizes = (16, 12)
    heads = [draw.standard_normal((50, size)).astype(np.float32) for size in sizes]
    states = [(scale * draw.standard_normal((9, size))).astype(np.float32) for size in sizes]
    found = agreement(
        pieces(heads[0], steps[0]), states[0], pieces(heads[1], steps[1]), states[1], 4000
    )
    logits = [x.astype(np.float64) @ head.T for x, head in zip(states, heads, strict=True)]
    divergences, same = slow(*logits)
    assert found.divergences == pytest.approx(divergences, abs=1e-4)
    assert (found.same == same).all()


def test_a_model_agrees_with_itself(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("model"), tmp_path / "copy")
    found = ms_quant.compare(tmp_path / "model", tmp_path / "copy", TOKENS)
    assert (found.kl_divergence, found.kl_divergence_error, found.top1_agreement) == (0, 0, 1)


def test_what_is_kept_does_not_change_the_losses(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = ms_quant.open_model(tiny_model("model"))
    (tmp_path / "kept").mkdir()
    kept, plain = measure(model, TOKENS, keep=tmp_path / "kept"), measure(model, TOKENS)
    assert (kept.losses == plain.losses).all()
    assert plain.last is None
    assert kept.last is not None
    assert kept.last.states.shape == (3, 10, model.config.hidden_size)
