"""Scores of requests that share their beginnings, against each computed alone and slowly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from routed_models import DEEPSEEK, save_routed

import ms_quant
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.opening import ServedModel
from ms_quant.tasks.encoding import Request
from ms_quant.tasks.scoring import Scores, score
from ms_quant.tasks.trees import Rows, grouped

LONGEST = 64


def requests(vocab: int, shots: int = 30, seed: int = 0) -> list[Request]:
    """Questions behind one prefix, with continuations of one token and of several."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return draw.integers(1, vocab, count).astype(np.int32)

    prefix, found = ids(shots), []
    for question in range(7):
        context = np.concatenate([prefix, ids(1 + 2 * question)])
        more = tuple(ids(1 if question % 2 else 1 + choice) for choice in range(4))
        found.append(Request(context, more))
    return found


def alone(model: ServedModel, request: Request) -> list[float]:
    """The same, each continuation by itself, by what perplexity runs."""
    found = []
    for more in request.continuations:
        tokens = np.concatenate([request.context, more])[-(LONGEST + 1) :]
        losses = token_losses(model, tokens[None])
        found.append(-float(losses[0, -len(more) :].sum()))
    return found


def scored(
    model: ServedModel, asked: list[Request], directory: Path, **options: int
) -> tuple[Scores, np.ndarray]:
    directory.mkdir(exist_ok=True)
    rows = [Rows.of(request, LONGEST) for request in asked]
    sizes = {key: options.pop(key) for key in ("batch_tokens", "sharing") if key in options}
    found = score(model, [grouped(rows, **sizes)], directory, **options)
    table = [[found.likelihoods[i, choice] for choice in range(4)] for i in range(len(asked))]
    return found, np.array(table)


@pytest.fixture(params=["dense", "mla"])
def model(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> ServedModel:
    if request.param == "dense":
        return ms_quant.open_model(tiny_model("tasks"))
    return ms_quant.open_model(save_routed(tmp_path / "mla", DEEPSEEK))


@pytest.mark.parametrize(
    "sizes", [{}, {"batch_tokens": 8}, {"sharing": False}, {"hidden_bytes": 1}]
)
def test_shared_beginnings_change_nothing_but_rounding(
    model: ServedModel, tmp_path: Path, sizes: dict[str, int]
) -> None:
    """A sum of 64 terms in another order: relative 64 * 2^-24 a layer, with room for softmax."""
    asked = requests(model.config.vocab_size)
    _, found = scored(model, asked, tmp_path, **sizes)
    expected = np.array([alone(model, request) for request in asked])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_prefix_is_computed_once(model: ServedModel) -> None:
    rows = [Rows.of(request, LONGEST) for request in requests(model.config.vocab_size)]
    group = grouped(rows)
    assert len(group.prefix) == 30
    assert group.count < sum(len(tokens) for one in rows for tokens in one.tokens) / 5


def test_what_is_longer_than_the_model_loses_its_beginning(
    model: ServedModel, tmp_path: Path
) -> None:
    asked = requests(model.config.vocab_size, shots=58)
    rows = [Rows.of(request, LONGEST) for request in asked]
    assert [one.cut for one in rows] == [False] * 2 + [True] * 5
    _, found = scored(model, asked, tmp_path)
    expected = np.array([alone(model, request) for request in asked])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_ends_are_the_states_that_predict_the_first_token(
    model: ServedModel, tmp_path: Path
) -> None:
    """Also of a request without continuations."""
    asked = requests(model.config.vocab_size)
    found, _ = scored(model, asked, tmp_path / "a")
    bare = [Rows.of(Request(request.context, ()), LONGEST) for request in asked]
    (tmp_path / "b").mkdir()
    other = score(model, [grouped(bare)], tmp_path / "b").ends
    assert len(other) == len(asked)
    assert np.abs(found.ends[:] - other[:]).max() < 1e-4


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W4A16"])
@pytest.mark.parametrize("cache", ["float", "C8_DYNAMIC"])
def test_quantized_models_are_scored_as_alone(
    tiny_model: Callable[..., Path], tmp_path: Path, scheme: str, cache: str
) -> None:
    """Rounding may turn a code of an activation or of the cache: a step is 1/127 of a maximum."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    ms_quant.quantize_checkpoint(tiny_model("tasks-128", **shape), tmp_path / "out", scheme)
    model = ms_quant.open_model(tmp_path / "out")
    asked = requests(model.config.vocab_size)
    rows = [Rows.of(request, LONGEST) for request in asked]
    groups = [grouped([one], number) for number, one in enumerate(rows)]
    places = tmp_path / "a", tmp_path / "b"
    for place in places:
        place.mkdir()
    shared = score(model, [grouped(rows)], places[0], kv_cache=cache).likelihoods
    each = score(model, groups, places[1], kv_cache=cache).likelihoods
    assert each.keys() == shared.keys()
    assert max(abs(each[key] - shared[key]) for key in each) < 2e-2
