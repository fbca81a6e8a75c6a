"""What a layer for further tokens drafts, against equations computed slowly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from routed_models import DEEPSEEK, QWEN, routed_tensors, save_routed
from slow_routed import SlowRouted

import ms_quant
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.drafts import drafts
from ms_quant.evaluation.perplexity import measure
from ms_quant.formats.opening import open_model

RAW = {**DEEPSEEK, "rms_norm_eps": 1e-6}
TOKENS = np.random.default_rng(3).integers(0, 256, (3, 20)).astype(np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_drafts_are_what_the_equations_say(tmp_path: Path) -> None:
    model = open_model(save_routed(tmp_path / "model", RAW))
    weights = {name: model.tensor(name) for name in routed_tensors(RAW)}
    slow, hits, losses, lost = SlowRouted(model.config, weights), [], [], []
    for window in TOKENS:
        own, drafted = slow.logits(window), slow.further(window)
        hits += (drafted.argmax(axis=1) == own[1:].argmax(axis=1)).tolist()
        rows = log_softmax(drafted[:-1])
        losses += (-np.take_along_axis(rows, window[2:, None], axis=1)).ravel().tolist()
        rows = log_softmax(own[:-1])
        lost += (-np.take_along_axis(rows, window[1:, None], axis=1)).ravel().tolist()
    found = drafts(model, TOKENS)
    assert found.tokens == 3 * 19 and found.acceptance == np.mean(hits)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert measure(model, TOKENS).found.loss == pytest.approx(np.mean(lost), rel=1e-5)


def test_a_model_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    model = ms_quant.open_model(save_routed(tmp_path / "model", QWEN))
    with pytest.raises(MsQuantError, match="no layer that predicts further tokens"):
        drafts(model, TOKENS)
