"""The two orders of rows that make rotary pairs."""

from __future__ import annotations

import numpy as np
from routed_models import DEEPSEEK

from ms_quant.models.config import parse_config
from ms_quant.models.rotary_rows import RotaryRows


def test_the_first_ones_of_all_pairs_come_first():
    order = RotaryRows(unit=7, turned=4).halves(14)
    assert order.tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]


def test_turning_halves_of_reordered_rows_gives_the_scores_of_turning_pairs():
    rng, size, position = np.random.default_rng(0), 8, 5
    q, k = rng.normal(size=(2, size))
    angle = position * 100.0 ** (-np.arange(size // 2) * 2 / size)
    order = RotaryRows(size, size).halves(size)

    def pairs(x: np.ndarray) -> np.ndarray:
        a, b = x[0::2], x[1::2]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.stack(turned, axis=1).ravel()

    def halves(x: np.ndarray) -> np.ndarray:
        a, b = x[: size // 2], x[size // 2 :]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.concatenate(turned)

    np.testing.assert_allclose(halves(q[order]) @ k[order], pairs(q) @ k, atol=1e-12)


def test_which_linears_have_such_rows():
    def of(**changed: object) -> dict[str, RotaryRows]:
        linears = parse_config({**DEEPSEEK, **changed}).block(1).linears
        return {
            path.rpartition(".")[2]: spec.rotary_rows
            for path, spec in linears.items()
            if spec.rotary_rows is not None
        }

    key, query = RotaryRows(40, 8), RotaryRows(24, 8)
    assert of() == {"kv_a_proj_with_mqa": key, "q_b_proj": query}
    assert of(q_lora_rank=None) == {"kv_a_proj_with_mqa": key, "q_proj": query}
    assert of(rope_interleave=False) == {}
